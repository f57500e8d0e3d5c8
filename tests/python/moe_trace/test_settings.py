"""The one table of settings: its own order, and the README that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_trace import settings

README = Path(__file__).parents[3] / "README.md"


def test_settings_are_named_after_their_keys():
    for setting in settings.SETTINGS:
        assert setting.name == "MOE_NATIVE_" + setting.key.upper()
        assert setting.meaning and settings.default(setting.name) == setting.default
    with pytest.raises(KeyError, match="MOE_NATIVE_NONE"):
        settings.default("MOE_NATIVE_NONE")


def test_the_readme_has_the_table():
    assert settings.markdown() in README.read_text(encoding="utf-8")


def test_unknown_names():
    environment = {
        "MOE_NATIVE_TRACE": "",
        "MOE_NATIVE_LAYER": "3",
        "MOE_TRACE_FIELDS": "ids",
        "MOENATIVE_Q": "",
        "PATH": "",
    }
    assert settings.unknown(environment) == {
        "MOENATIVE_Q": None,
        "MOE_NATIVE_LAYER": "MOE_NATIVE_LAYERS",
        "MOE_TRACE_FIELDS": "MOE_NATIVE_FIELDS",
    }
