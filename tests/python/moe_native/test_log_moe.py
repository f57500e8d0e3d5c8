"""`VLLM_LOG_MOE`: who writes the file and when, what is in it, and what becomes of the trace that it is made from. The
recorders here are those of a worker; `test_vllm_log_moe.py` does it with real engines."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_trace
from moe_native import Recorder
from moe_native.config import Config
from moe_native.rank_directory import shared_run
from moe_native.vllm import log_moe, plugin
from moe_trace.exchange import jsonl

NAMES = (log_moe.FILE, *log_moe.LAYERS, log_moe.MARK, "MOE_NATIVE_TRACE", "MOE_NATIVE_SAMPLE", "VLLM_NUM_MOE_LAYERS")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No variable of ours, and nothing that this process would do at its end."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what claim() sets is taken back
        monkeypatch.delenv(name)
    kept: list[Any] = []  # with its lock on the directory, as the finalizer keeps it
    monkeypatch.setattr(log_moe, "Finalize", lambda *arguments, **__: kept.append(arguments))
    monkeypatch.setattr(logging.getLogger("moe_native"), "propagate", True)
    caplog.set_level("INFO", "moe_native")
    yield


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "out" / "routes.jsonl"
    monkeypatch.setenv("VLLM_LOG_MOE", str(path))
    return path


def recorder() -> Recorder:
    """As a worker makes it, of a model with the MoE layers 0 and 2; layer 1 is dense, 3 cannot be seen."""
    config = Config.parse(log_moe.environment())
    assert config.trace is not None
    run = shared_run(config.trace, f"{os.getpid():08x}")
    metadata = {"model": "m", **log_moe.label()}
    made = Recorder(config.trace, run=run, metadata=metadata, **config.recorder_arguments())
    assert [made.bind(layer, experts=8, top_k=2) for layer in (0, 2)] == [0, 1]
    made.miss(3, name="layers.3", detail="a fused kernel")
    return made


def step(made: Recorder, request: str = "a", first: int = 0, rows: int = 3) -> None:
    with made.step(requests=[request], positions=[range(first, first + rows)]):
        for binding, layer in ((0, 0), (1, 2)):
            ids = torch.tensor([[(layer + first + row) % 8, 7] for row in range(rows)], dtype=torch.int32)
            made.record(binding, ids, torch.full((rows, 2), 1 / 3))


def record() -> None:
    made = recorder()
    step(made)
    made.close()


def finish() -> None:
    """As at the end of this process."""
    claimed = log_moe.claim()
    assert claimed is not None
    log_moe._finish(claimed, None)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def hidden(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f".{file.name}*"))


def test_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv("VLLM_LOG_MOE", value)
        assert log_moe.claim() is None and log_moe.environment() is os.environ and log_moe.label() == {}
        assert log_moe.MARK not in os.environ


def test_the_file_has_layer_0_with_exact_weights_and_the_trace_is_gone(file: Path) -> None:
    record()
    assert not file.exists() and len(hidden(file)) == 1
    finish()
    meta, *routes = lines(file)
    assert meta == {
        "type": "meta", "model_id": "m", "vllm_version": None, "torch_version": torch.__version__, "device": None,
        "seed": None, "layers_logged": [0], "top_k": 2,
    }  # fmt: skip
    weights = [0.3333, 0.3333]  # of float16 it would be 0.3334, of 0.33325
    assert routes == [
        {"type": "route", "req_id": "a", "token_idx": n, "layer": 0, "topk_ids": [n, 7], "topk_weights": weights}
        for n in range(3)
    ]
    assert sorted(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("named", "layers"),
    [
        ({"VLLM_LOG_MOE_LAYER": "2"}, [2]),
        ({"VLLM_LOG_LAYER": "2"}, [2]),
        ({"VLLM_LOG_MOE_LAYERS": "0, 2", "VLLM_LOG_MOE_LAYER": "0"}, [0, 2]),
        ({"VLLM_LOG_MOE_LAYER": "2", "VLLM_LOG_LAYER": "0", "MOE_NATIVE_LAYERS": "0-2"}, [2]),
        ({"MOE_NATIVE_LAYERS": "2"}, [2]),
        ({"VLLM_LOG_MOE_LAYERS": "all"}, [0, 2]),
        ({"VLLM_NUM_MOE_LAYERS": "24"}, [0]),
    ],
)
def test_layers_are_chosen(
    file: Path, named: dict[str, str], layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    record()
    finish()
    meta, *routes = lines(file)
    assert meta["layers_logged"] == layers
    assert [route["layer"] for route in routes] == layers * 3


def test_a_wrong_layer_is_said_with_its_name_and_nothing_is_recorded(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_LOG_MOE_LAYER", "first")
    assert Config.parse(log_moe.environment()).trace is None
    assert "VLLM_LOG_MOE_LAYER is 'first': 'first' is not a layer" in caplog.text
    assert not file.parent.exists()
    caplog.clear()
    log_moe.environment()  # as in a worker below
    assert not caplog.text


@pytest.mark.parametrize("kind", ["directory", "device", "below a file"])
def test_a_file_that_cannot_be_written_is_said_at_the_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plain").write_text("")
    path = {"directory": tmp_path, "device": Path("/dev/null"), "below a file": tmp_path / "plain" / "x.jsonl"}[kind]
    monkeypatch.setenv("VLLM_LOG_MOE", str(path))
    assert log_moe.environment() is os.environ
    assert f"VLLM_LOG_MOE={path}: nothing is recorded for it" in caplog.text
    assert sorted(tmp_path.iterdir()) == [tmp_path / "plain"]


def test_layers_that_are_not_there(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_LOG_MOE_LAYERS", "1,3")
    record()
    finish()
    assert "layer 1 is no MoE layer of this model (those are 0, 2, 3" in caplog.text
    assert "layer 3 was missed: a fused kernel" in caplog.text
    assert list(file.parent.iterdir()) == []


def test_one_of_the_layers_is_not_there(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_LOG_MOE_LAYERS", "0,3")
    record()
    finish()
    assert len(lines(file)) == 4
    assert "is not whole: layer 3 was missed: a fused kernel; the trace stays: moe-native summary" in caplog.text
    assert len(hidden(file)) == 1


def test_an_engine_that_executed_nothing_leaves_a_file_of_one_line(file: Path) -> None:
    recorder().close()
    finish()
    (meta,) = lines(file)
    assert meta["layers_logged"] == [0] and meta["top_k"] == 2
    assert not hidden(file)


def test_no_engine_ran(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    log_moe.claim()
    finish()
    assert f"{file} was not written: nothing was recorded" in caplog.text
    assert list(file.parent.iterdir()) == []


def test_several_engines_have_their_runs_named(file: Path) -> None:
    record()
    record()
    finish()
    runs = [route["run"] for route in lines(file)[1:]]
    assert len(set(runs)) == 2 and runs == sorted(runs) and len(runs) == 6


def test_a_file_that_exists_is_kept_under_another_name(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_text("old")
    Path(f"{file}.1").write_text("older")
    record()
    finish()
    assert Path(f"{file}.1").read_text() == "older" and Path(f"{file}.2").read_text() == "old"
    assert len(lines(file)) == 4
    assert f"it is {file}.2 now" in caplog.text


def test_a_failure_names_the_trace_and_the_command_and_that_command_works(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    record()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        finish()
    (trace,) = hidden(file)  # and no half of a file
    (said,) = [line for line in caplog.messages if "was not written" in line]
    command = f"moe-native export {trace}/trace --format jsonl -o {file}"
    assert "No space left on device" in said and said.endswith(command)
    from moe_trace import cli

    assert cli.main(command.split()[1:]) == cli.LOSSY  # because of layer 3
    assert len(lines(file)) == 4


def test_a_trace_that_is_still_recorded_stays(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_moe, "PATIENCE", 0.3)
    made = recorder()
    step(made)
    finish()
    assert "a process still records for it" in caplog.text and not file.exists() and len(hidden(file)) == 1
    made.close()
    finish()
    assert len(lines(file)) == 4 and not hidden(file)


def test_losses_are_said_and_the_trace_stays(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = recorder()
    step(made)
    with pytest.raises(ZeroDivisionError), made.step(requests=["b"], positions=[range(2)]):
        raise ZeroDivisionError
    made.close()
    finish()
    assert len(lines(file)) == 4
    assert f"{file} is not whole: rows were lost (aborted)" in caplog.text
    assert len(hidden(file)) == 1


def test_a_sample_is_said(file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MOE_NATIVE_SAMPLE", "0")
    record()
    finish()
    assert "is not whole: 0 of 3 rows are stored" in caplog.text


# Beside MOE_NATIVE_TRACE.


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "theirs"
    monkeypatch.setenv("MOE_NATIVE_TRACE", str(path))
    return path


def test_a_trace_of_their_own_is_as_they_asked_for_and_stays(
    file: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOG_MOE_LAYER", "2")
    assert log_moe.environment() is os.environ
    record()
    finish()
    trace = moe_trace.open(theirs)
    assert trace.layers == (0, 2) and trace.metadata["weights_dtype"] == "float16"
    text = "".join(piece for piece, _ in jsonl.jsonl(trace, trace.layer([2]), []))
    assert file.read_text() == text
    assert sorted(file.parent.iterdir()) == [file]


def test_only_what_this_program_recorded_is_in_the_file(
    file: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before in (True, False):
        if not before:
            record()
        with Recorder(theirs) as other:  # another program's, before and during this one
            binding = other.bind(0, experts=8, top_k=2)
            with other.step(requests=["foreign"], positions=[range(1)]):
                other.record(binding, torch.tensor([[1, 2]], dtype=torch.int32), torch.full((1, 2), 0.5))
    finish()
    assert {route["req_id"] for route in lines(file)[1:]} == {"a"}
    assert "run" not in lines(file)[1]
    assert len(moe_trace.open(theirs).runs) == 3


def test_a_failure_beside_their_trace_names_the_layer(file: Path, theirs: Path) -> None:
    claimed = log_moe.claim()
    assert claimed is not None and claimed.command == f"moe-native export {theirs} --layer 0 --format jsonl -o {file}"


# Processes.


@pytest.mark.parametrize(("value", "asked"), [("routes.jsonl", True), ("", False), ("0", False)])
def test_the_plugin_asks(value: str, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[bool] = []
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "_wrap_workers", lambda: wrapped.append(True))
    monkeypatch.delenv("MOE_NATIVE_CAPTURE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_LOG_MOE", value)
    plugin.register()
    assert wrapped == ([True] if asked else [])
    assert len(hidden(tmp_path / "routes.jsonl")) == asked


def test_the_processes_below_record_into_the_same_trace_and_write_nothing(file: Path) -> None:
    owner = log_moe.claim()
    code = """
        from moe_native.vllm import log_moe
        log_moe.Finalize = lambda *_, **__: print("I would write it")
        print(log_moe.claim(), log_moe.environment()["MOE_NATIVE_TRACE"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120, cwd="/"
    )
    assert owner is not None and done.stdout.strip() == f"{owner} {owner.trace}"


def test_another_file_is_another_claim(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may change the variable between two engines."""
    first = log_moe.claim()
    record()
    monkeypatch.setenv("VLLM_LOG_MOE", str(tmp_path / "second.jsonl"))
    second = log_moe.claim()
    assert first is not None and second is not None and first.trace != second.trace
    record()
    finish()
    log_moe._finish(first, None)
    assert len(lines(file)) == len(lines(tmp_path / "second.jsonl")) == 4


PROGRAM = """
    import os, signal, sys, time
    sys.path.insert(0, sys.argv[1])
    from multiprocessing import get_context
    import test_log_moe
    from moe_native.vllm import log_moe

    def worker(killed, ready=None):
        made = test_log_moe.recorder()
        test_log_moe.step(made)
        if ready is not None:
            ready.set()
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        made.close()

    def program(kind):
        log_moe.claim()
        context = get_context("fork")
        if kind == "in this process":
            globals()["kept"] = made = test_log_moe.recorder()
            test_log_moe.step(made)
            return  # nobody closes it
        ready = context.Event()
        child = context.Process(target=worker, args=(kind == "its worker is killed", ready))
        child.start()
        if kind == "it is killed":
            ready.wait()
            child.join()
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "it raises":
            raise SystemExit(3)

    if __name__ == "__main__":
        kind = sys.argv[2]
        if kind == "it is a child itself":
            child = get_context("fork").Process(target=program, args=(kind,))
            child.start()
            child.join()
        else:
            program(kind)
"""


def run_program(kind: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    return subprocess.run(
        [sys.executable, str(program), str(Path(__file__).parent), kind], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "kind", ["in this process", "in a worker", "its worker is killed", "it raises", "it is a child itself"]
)
def test_the_file_is_there_when_the_program_has_ended(file: Path, tmp_path: Path, kind: str) -> None:
    done = run_program(kind, tmp_path)
    assert done.returncode == (3 if kind == "it raises" else 0), done.stderr
    assert [route["token_idx"] for route in lines(file)[1:]] == [0, 1, 2], done.stderr
    assert not hidden(file), done.stderr


def test_a_program_that_was_killed_leaves_its_trace_and_the_next_one_says_so(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_program("it is killed", tmp_path).returncode == -signal.SIGKILL
    assert not file.exists()
    (left,) = hidden(file)
    lock = log_moe.DirectoryLock(left)
    log_moe._say_what_is_left(file)
    assert not caplog.messages  # its program lives
    lock.release()
    log_moe._say_what_is_left(file)
    assert f"'moe-native export {left}/trace --format jsonl -o {file}.left'" in caplog.text
    assert moe_trace.open(left / "trace").rows == 3


@pytest.mark.parametrize("links", [True, False])
def test_programs_that_end_at_once_lose_nothing(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    file = tmp_path / "x.jsonl"
    parts = [tmp_path / f"part{n}" for n in range(6)]
    for part in parts:
        part.write_text(part.name)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=log_moe._put_in_place, args=(part, file)) for part in parts]
    for child in children:
        child.start()
        if not links:  # one after the other
            child.join(60)
    for child in children:
        child.join(60)
    found = sorted(tmp_path.glob("x.jsonl*"))
    assert found == [file, *(Path(f"{file}.{number}") for number in range(1, 6))]
    assert sorted(path.read_text() for path in found) == [part.name for part in parts]
