"""Runs that are made: where they are put, and that nothing half made is a trace."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import exchanged
import pytest

import moe_trace
from moe_trace import exchange
from moe_trace.exchange.new_run import new_runs


@pytest.fixture
def log(tmp_path):
    return exchanged.log(tmp_path / "log.jsonl", [exchanged.route("a", at, 0, [at]) for at in range(3)])


def test_a_new_trace_is_private_and_whole(log, tmp_path):
    exchange.load([log], tmp_path / "t")
    for path in (tmp_path / "t", *(tmp_path / "t").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "t"]
    trace = moe_trace.open(tmp_path / "t")
    assert trace.state == "closed" and trace.complete and moe_trace.recover(tmp_path / "t").ranks == []


def test_an_empty_directory_becomes_the_trace(log, tmp_path):
    (tmp_path / "t").mkdir()
    exchange.load([log], tmp_path / "t")
    assert moe_trace.open(tmp_path / "t").rows == 3


def test_a_trace_gets_a_run_more(log, tmp_path):
    exchanged.made(tmp_path / "t")
    names = [exchange.load([log], tmp_path / "t").runs[0] for _ in range(2)]
    trace = moe_trace.open(tmp_path / "t")
    assert len({*names, "run-1"}) == 3 and {run.name for run in trace.runs} == {*names, "run-1"}
    assert trace.run("run-1").rows == 14 and all(trace.run(name).rows == 3 for name in names)


def test_a_name_that_is_taken_or_no_name(tmp_path):
    exchanged.made(tmp_path / "t")
    with new_runs(tmp_path / "t") as runs:
        assert [runs.add(name).name for name in ("run-1", "x", "x")] == ["run-1-2", "x", "x-2"]
        assert all(runs.add(name).name.startswith("run-2") for name in ("../x", ".x", "a/b", "", None))


@pytest.mark.parametrize("what", ["file", "directory", "run", "rank", "segment"])
def test_what_is_there_and_no_trace_is_refused(log, tmp_path, what):
    exchanged.made(tmp_path / "t")
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "x").write_text("x")
    rank = tmp_path / "t" / "run-1" / "rank-0"
    path = {"run": rank.parent, "rank": rank, "segment": rank / "000000.moe"}.get(what, tmp_path / what)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(moe_trace.TraceError, match=r"is there already and is (no|only a part of a) trace: name a new"):
        exchange.load([log], path)
    assert sorted(tmp_path.rglob("*")) == before


def test_there_must_be_a_directory_for_it(log, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no directory {tmp_path / 'no'}"):
        exchange.load([log], tmp_path / "no" / "t")


@pytest.mark.parametrize("there", [False, True])
def test_what_is_interrupted_leaves_nothing(log, tmp_path, monkeypatch, there):
    if there:
        exchanged.made(tmp_path / "t")
    before = sorted(tmp_path.rglob("*"))
    for where in ("moe_trace.exchange.load_jsonl._Log._flush", "moe_trace.exchange.new_run.NewRun.close"):

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, interrupted)
            exchange.load([log], tmp_path / "t")
        assert sorted(tmp_path.rglob("*")) == before


def test_what_is_killed_leaves_no_trace(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    code = "import sys; from moe_trace import exchange; exchange.load([sys.argv[1]], sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path / "log.jsonl"), str(tmp_path / "t")]
    with subprocess.Popen(command, env={"PYTHONPATH": ":".join(sys.path)}) as process:  # noqa: SIM117
        with open(tmp_path / "log.jsonl", "w") as pipe:
            pipe.write('{"type": "route", "layer": 0, "topk_ids": [1]}\n' * 50_000)  # more than is held in memory
            pipe.flush()
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(".t.*/scratch/0/0")) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert list(tmp_path.glob(".t.*/scratch/0/0")), "it has begun"
            process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "t").exists()
