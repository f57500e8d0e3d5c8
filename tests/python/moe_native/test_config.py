"""Settings: where they come from, which win, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_native.config import Config, ConfigError
from moe_trace import settings


def test_nothing_set_is_the_table_of_defaults() -> None:
    config = Config.parse({})
    assert config == Config()
    assert config.trace is None
    written = {setting.name: setting.default for setting in settings.SETTINGS if setting.name != "MOE_NATIVE_RING_DIR"}
    assert Config.parse(written) == config


def test_environment(tmp_path: Path) -> None:
    config = Config.parse(
        {
            "MOE_NATIVE_TRACE": "/data/trace",
            "MOE_NATIVE_FIELDS": "logits, ids",
            "MOE_NATIVE_LAYERS": "0,4-6,5",
            "MOE_NATIVE_MAX_BYTES": "2GiB",
            "MOE_NATIVE_RING_BYTES": "128MiB",
            "MOE_NATIVE_RING_DIR": str(tmp_path),
            "MOE_NATIVE_OVERFLOW": "Block",
            "MOE_NATIVE_WEIGHTS_DTYPE": "exact",
            "MOE_NATIVE_FLUSH_SECONDS": "0.5",
            "MOE_NATIVE_SAMPLE": "0.01",
            "UNRELATED": "1",
        }
    )
    assert config == Config(
        Path("/data/trace"), ("ids", "logits"), (0, 4, 5, 6), 2 << 30, 128 << 20, tmp_path, "block", "exact", 0.5, 0.01
    )


def test_additional_config_wins_key_by_key_and_takes_json_types() -> None:
    environment = {"MOE_NATIVE_TRACE": "/a", "MOE_NATIVE_FIELDS": "ids", "MOE_NATIVE_OVERFLOW": "block"}
    config = Config.parse(
        environment, {"trace": "/b", "fields": ["weights"], "layers": [3, "5-6"], "max_bytes": 1 << 30}
    )
    assert config.trace == Path("/b")
    assert config.fields == ("ids", "weights")  # ids are always stored
    assert config.layers == (3, 5, 6)
    assert config.max_bytes == 1 << 30
    assert config.overflow == "block"


def test_any_iterable_names_fields_and_layers() -> None:
    for layers in (np.array([5, 3]), torch.tensor([3, 5]), {3, 5}, range(3, 6, 2), (n for n in (5, 3)), ["3", "5-5"]):
        assert Config.of_arguments(layers=layers).layers == (3, 5)
    assert Config.of_arguments(layers=np.array(3)).layers == (3,) == Config.of_arguments(layers=np.int64(3)).layers
    for fields in (np.array(["logits", "ids"]), {"logits"}, (name for name in ["logits"]), np.str_("logits")):
        assert Config.of_arguments(fields=fields).fields == ("ids", "logits")
    for wrong in (np.array([1.5]), np.array([[1, 2]]), np.array([True]), np.array([], int), torch.tensor([-1])):
        with pytest.raises(ConfigError, match="layer"):
            Config.of_arguments(layers=wrong)


def test_tiers() -> None:
    assert Config.parse({"MOE_NATIVE_FIELDS": "Counts"}).fields == ("counts",)
    assert Config.parse({}, {"fields": ["counts"], "sample": 0}).sample == 0.0
    assert Config.parse({"MOE_NATIVE_LAYERS": "all"}).layers is None
    assert Config.of_arguments(sample=0.25).recorder_arguments()["sample"] == 0.25


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("True", True), ("0", False), ("False", False), ("", False)]
)
def test_captures_are_switched_on_and_off(value: str, on: bool) -> None:
    assert Config.parse({"MOE_NATIVE_CAPTURE": value}).capture is on
    config = Config.parse({"MOE_NATIVE_CAPTURE": "1"}, {"capture": on})
    assert config.capture is on and config.trace is None and "capture" not in config.recorder_arguments()


@pytest.mark.parametrize("off", [None, "", False])
def test_additional_config_can_switch_off(off: Any) -> None:
    assert Config.parse({"MOE_NATIVE_TRACE": "/a"}, {"trace": off}).trace is None


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("MOE_NATIVE_FIELDS", "ids,wieghts", "ids, weights, logits, hidden, tokens"),
        ("MOE_NATIVE_FIELDS", "counts,ids", "counts stands alone"),
        ("MOE_NATIVE_FIELDS", " ,", "no field is named"),
        ("MOE_NATIVE_SAMPLE", "1.01", "from 0 to 1"),
        ("MOE_NATIVE_SAMPLE", "-0.1", "from 0 to 1"),
        ("MOE_NATIVE_SAMPLE", "nan", "from 0 to 1"),
        ("MOE_NATIVE_SAMPLE", "1%", "from 0 to 1"),
        ("MOE_NATIVE_LAYERS", "4-", "0,4-7"),
        ("MOE_NATIVE_LAYERS", "7-4", "range of layers"),
        ("MOE_NATIVE_LAYERS", "-1", "0,4-7"),
        ("MOE_NATIVE_LAYERS", "65535", "65534"),
        ("MOE_NATIVE_LAYERS", ",", "unset"),
        ("MOE_NATIVE_RING_DIR", "/not/there", "no such directory"),
        ("MOE_NATIVE_MAX_BYTES", "lots", "MiB"),
        ("MOE_NATIVE_MAX_BYTES", "1000", "at least 1 MiB"),
        ("MOE_NATIVE_RING_BYTES", "2GiB", "at most 1 GiB"),
        ("MOE_NATIVE_OVERFLOW", "wait", "drop or block"),
        ("MOE_NATIVE_WEIGHTS_DTYPE", "float8", "float16 or exact"),
        ("MOE_NATIVE_FLUSH_SECONDS", "0", "above 0"),
        ("MOE_NATIVE_FLUSH_SECONDS", "nan", "above 0"),
        ("MOE_NATIVE_CAPTURE", "on", "use 1 or 0"),
    ],
)
def test_a_wrong_value_names_the_variable_the_value_and_what_is_right(name: str, value: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse({name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_not_passed_over() -> None:
    with pytest.raises(ConfigError, match=r"'field' .* did you mean 'fields'"):
        Config.parse({}, {"trace": "/a", "field": "ids"})
