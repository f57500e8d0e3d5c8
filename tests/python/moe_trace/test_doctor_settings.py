"""What the doctor has to say of environment variables: whatever is set and cannot be used is named, with what to do."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from moe_trace import doctor, doctor_settings


def findings(check, *args):
    found = list(check(*args))
    assert all(f.todo for f in found if f.status != "ok"), "whoever complains says what to do"
    return found


# -- settings


def test_typing_errors_are_named_with_the_near_setting():
    env = {"MOE_NATIVE_TRACE": "/t", "MOE_NATIVE_FEILDS": "ids", "MOE_NATIVE_XYZZY": "1", "MOE_NATIVE_READER_ONLY": "1"}
    found = findings(doctor.check_settings, env)
    assert (found[0].status, found[0].todo) == ("warning", "did you mean MOE_NATIVE_FIELDS?")
    assert len(found) == 2 and "MOE_NATIVE_XYZZY" in found[1].what


def test_settings_are_listed():
    (found,) = findings(doctor.check_settings, {"MOE_NATIVE_TRACE": "/t", "MOE_NATIVE_MAX_BYTES": "2GiB"})
    assert found.status == "ok" and "MOE_NATIVE_MAX_BYTES=2GiB" in found.what
    env = {"MOE_NATIVE_TRACE": "/t", "MOE_NATIVE_FIELDS": "x"}
    (found,) = findings(doctor.check_settings, env, "MOE_NATIVE_FIELDS is 'x'")
    assert found.what == "settings: MOE_NATIVE_TRACE=/t", "what is refused is not ok"


# -- captures


@pytest.mark.parametrize(
    ("value", "status", "said"),
    [
        ("1", "ok", "MOE_NATIVE_CAPTURE=1: engines that are built here can be captured"),
        ("True", "ok", "can be captured"),
        ("yes", "problem", "is 'yes': nothing is recorded, nor captured"),
        ("0", "warning", "MOE_NATIVE_CAPTURE=0 forbids captures"),
    ],
)
def test_captures(value, status, said):
    (found,) = findings(doctor_settings.check_captures, {"MOE_NATIVE_CAPTURE": value})
    assert found.status == status and said in found.what


def test_captures_of_which_there_is_nothing_to_say():
    for env in ({}, {"MOE_NATIVE_CAPTURE": ""}, {"MOE_NATIVE_CAPTURE": "0", "MOE_NATIVE_TRACE": "/t"}):
        assert not findings(doctor_settings.check_captures, env)
    assert not findings(doctor_settings.check_captures, {"MOE_NATIVE_CAPTURE": "x"}, "MOE_NATIVE_CAPTURE is 'x': use")


# -- VLLM_LOG_MOE


def log(tmp_path, **env):
    return findings(doctor_settings.check_log, {"VLLM_LOG_MOE": str(tmp_path / "new" / "a.jsonl"), **env})


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "will have layer 0, as none is named, when the program ends"),
        ({"VLLM_LOG_MOE_LAYER": "3"}, "will have layer 3 (VLLM_LOG_MOE_LAYER) when"),
        ({"VLLM_LOG_LAYER": "0,4-7"}, "will have layer 0,4-7 (VLLM_LOG_LAYER) when"),
        ({"VLLM_LOG_MOE_LAYERS": "all"}, "will have all layers when"),
        ({"MOE_NATIVE_LAYERS": "2"}, "will have layer 2 (MOE_NATIVE_LAYERS) when"),
        ({"VLLM_NUM_MOE_LAYERS": "24"}, "; VLLM_NUM_MOE_LAYERS is not needed, and not read"),
        ({"VLLM_LOG_MOE_LAYERS": "1", "VLLM_LOG_LAYER": "1", "MOE_NATIVE_LAYERS": "0-3"}, "will have layer 1 ("),
    ],
)
def test_a_log_that_will_be_written(tmp_path, env, said):
    (found,) = log(tmp_path, **env)
    assert found.status == "ok" and said in found.what + " " and str(tmp_path) in found.what
    assert not (tmp_path / "new").exists(), "the doctor changes nothing"


@pytest.mark.parametrize("name", [*doctor_settings.LOG_LAYERS, "MOE_NATIVE_LAYERS"])
@pytest.mark.parametrize("layers", ["x", "7-4", "1;2", ",", "-1", "65535"])
def test_layers_that_cannot_be_used(tmp_path, name, layers):
    (found,) = [f for f in log(tmp_path, **{name: layers}) if f.status != "warning"]
    assert found.status == "problem" and found.what == f"{name} is {layers!r}: nothing is recorded for VLLM_LOG_MOE"


@pytest.mark.skipif(find_spec("moe_native") is None, reason="asks the real recorder, which is not installed here")
@pytest.mark.parametrize(
    "layers", ["0", "0,4-7", " 1 , 3 - 4 ", "all", "All", "x", "7-4", "1-", "-", ",", "1,,2", "65534", "65535", "²"]
)
def test_layers_are_read_as_the_recorder_reads_them(layers):
    config = pytest.importorskip("moe_native.config", exc_type=ImportError)
    try:
        expected = set(config.Config.of_arguments(layers=layers).layers or ())
    except config.ConfigError:
        expected = None
    assert doctor_settings.parse_layers(layers) == expected


def test_a_file_that_is_there_is_moved_aside(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (found,) = log(tmp_path, VLLM_LOG_MOE=str(tmp_path / "a.jsonl"))
    assert found.status == "ok" and "what is there now will be moved aside" in found.what


def test_files_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for value, said in ((tmp_path, "is no file"), (tmp_path / "file" / "a.jsonl", "cannot be written to")):
        (found,) = log(tmp_path, VLLM_LOG_MOE=str(value))
        assert found.status == "problem" and said in found.what and str(value) in found.what
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    (found,) = log(tmp_path)
    assert found.status == "problem" and f"{tmp_path} cannot be written to" in found.what


def test_layers_that_do_not_count(tmp_path):
    first, second = log(tmp_path, VLLM_LOG_MOE_LAYERS="1", VLLM_LOG_LAYER="2")
    assert (first.status, second.status) == ("warning", "ok")
    assert first.what == "VLLM_LOG_LAYER=2 has no effect: VLLM_LOG_MOE_LAYERS=1 counts"


@pytest.mark.parametrize(("layers", "left"), [("1-5", "4, 5"), ("all", "all others")])
def test_layers_of_the_log_that_are_not_recorded(tmp_path, layers, left):
    first, _ = log(tmp_path, VLLM_LOG_MOE_LAYERS=layers, MOE_NATIVE_LAYERS="0-3")
    assert first.status == "warning"
    assert first.what == f"MOE_NATIVE_LAYERS=0-3 leaves out layers that VLLM_LOG_MOE is to have: {left}"


def test_layers_without_a_log():
    for value in ("", "0"):
        env = {"VLLM_LOG_MOE": value, "VLLM_LOG_LAYER": "1", "VLLM_NUM_MOE_LAYERS": "24"}
        (found,) = findings(doctor_settings.check_log, env)
        assert found.status == "warning" and "of VLLM_LOG_LAYER, VLLM_NUM_MOE_LAYERS nothing comes" in found.what
        assert not findings(doctor_settings.check_log, {"VLLM_LOG_MOE": value})


def test_the_doctor_asks_all_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "check_package", lambda env: iter([]))
    env = {"VLLM_LOG_MOE": str(tmp_path / "a.jsonl"), "MOE_NATIVE_CAPTURE": "1", "MOE_NATIVE_RING_DIR": str(tmp_path)}
    said = "\n".join(f.what for f in doctor.examine(None, env))
    for part in ("settings: MOE_NATIVE_CAPTURE=1", "MOE_NATIVE_CAPTURE=1: engines", "VLLM_LOG_MOE="):
        assert part in said
