"""Recorder: what goes in by steps comes out by requests and positions, and a misuse is told."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from routed_program import EXPERTS, LAYERS, K, Program

import moe_native
import moe_trace
from moe_native.runs import RUN_DTYPE, row_class


def test_round_trip_by_request(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        prompts = {"a": 5, "b": 7}
        with recorder.step(requests=["a", "b"], positions=[range(0, 5), range(0, 7)], prompt_lens=prompts):
            program.forward(12)
        for i in range(4):  # one name a row
            with recorder.step(requests=["b", "a"], positions=[7 + i, 5 + i], prompt_lens=prompts):
                program.forward(2)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.rows == 20
    for layer in range(LAYERS):
        assert np.array_equal(trace.layer(layer).ids, program.all_ids(layer))
    a = trace.layer(1).request("a")
    assert a.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    expected = np.concatenate([program.ids[1][0][:5]] + [step[1:] for step in program.ids[1][1:]])
    assert np.array_equal(a.ids, expected)
    assert trace.prefill().rows == 12 and trace.decode().rows == 8
    assert trace.layer(0).decode().request("b").positions.tolist() == [7, 8, 9, 10]


def test_padding_is_left_out(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder, 1)
        with recorder.step(requests=["a", "b"], positions=[range(2), range(3)], spans=[(1, 2), (3, 3)]):
            program.forward(8)
    assert np.array_equal(moe_trace.open(tmp_path / "t").layer(0).ids, program.all_ids(0)[[1, 2, 3, 4, 5]])


def test_tokens_and_logits(tmp_path):
    tokens = np.array([5, 151_643, 7])
    recorder = moe_native.Recorder(tmp_path / "t", fields=["logits", "tokens"])
    with recorder, recorder.step(rows=3, tokens=tokens):
        Program(recorder, 1).forward(3)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.layer(0).tokens.tolist() == tokens.tolist()
    assert np.array_equal(np.sort(np.argsort(-trace.layer(0).logits, 1)[:, :K]), np.sort(trace.layer(0).ids))


def test_layers_asked_for(tmp_path):
    with moe_native.Recorder(tmp_path / "t", layers=[1]) as recorder, recorder.step(rows=3):
        program = Program(recorder)
        program.forward(3)
    trace = moe_trace.open(tmp_path / "t")
    assert np.array_equal(trace.layer(1).ids, program.all_ids(1))
    assert {entry.layer: entry.status for entry in trace.coverage} == {0: "skipped", 1: "exact", 2: "skipped"}
    assert trace.complete


def test_an_exception_aborts_the_step_and_is_counted(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        with pytest.raises(RuntimeError, match="boom"), recorder.step(rows=4):
            program.forward(4)
            raise RuntimeError("boom")
        with recorder.step(rows=2):
            program.forward(2)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 2
    assert np.array_equal(trace.layer(0).ids, program.ids[0][1])
    assert not trace.complete


def test_nothing_outside_a_step(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        program.forward(5)
        with recorder.step(rows=2):
            program.forward(2)
        program.forward(5)
    assert np.array_equal(moe_trace.open(tmp_path / "t").layer(2).ids, program.ids[2][1])


def test_pause_and_resume(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        for paused in (False, True, False):
            (recorder.pause if paused else recorder.resume)()
            with recorder.step(rows=2):
                program.forward(2)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 4 and trace.complete


def test_flush_makes_a_live_trace_current(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        for n in range(1, 4):
            with recorder.step(rows=2):
                program.forward(2)
            recorder.flush()
            assert moe_trace.open(tmp_path / "t").rows == 2 * n


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_small_ring_loses_nothing_under_block(tmp_path, lanes):
    with moe_native.Recorder(tmp_path / "t", ring_bytes=1 << 18, overflow="block", lanes=lanes) as recorder:
        program = Program(recorder)
        for _ in range(100):
            with recorder.step(rows=500):
                program.forward(500)
        assert recorder.counters()["lost"] == {}
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete
    for layer in range(LAYERS):
        assert np.array_equal(trace.layer(layer).ids, program.all_ids(layer))


def test_a_step_larger_than_the_ring(tmp_path):
    with moe_native.Recorder(tmp_path / "t", fields=["logits"], ring_bytes=1 << 18, overflow="block") as recorder:
        program = Program(recorder)
        for rows in (3, 20_000, 3):
            with recorder.step(requests=["r"], positions=[range(rows)]):
                program.forward(rows)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.rows == 20_006
    for layer in range(LAYERS):
        one = trace.layer(layer)
        assert np.array_equal(one.ids, program.all_ids(layer))
        assert np.array_equal(np.sort(np.argsort(-one.logits, 1)[:, :K]), np.sort(one.ids))
        assert np.array_equal(one.counts(), np.bincount(program.all_ids(layer).ravel(), minlength=EXPERTS))


def test_amendments_reach_the_reader(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        with recorder.step(requests=["a"], positions=[range(4)]):
            program.forward(4)
        recorder.amend(0, 2, 2, ["rejected"])
        with recorder.step(requests=["a"], positions=[[2]]):
            program.forward(1)
    batch = next(iter(moe_trace.open(tmp_path / "t").layer(0).batches()))
    assert (batch.flags & 2 != 0).tolist() == [False, False, True, True, False]


def test_files_are_private_and_named_by_run_and_rank(tmp_path):
    with moe_native.Recorder(tmp_path / "t", rank="rank-3") as recorder:
        with recorder.step(rows=2):
            Program(recorder).forward(2)
        recorder.flush()
        files = [p for p in (tmp_path / "t").rglob("*") if p.is_file()]
        assert {p.name for p in files} == {"rank.json", "000000.moe.open"}
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert recorder.directory.name == "rank-3"
        assert recorder.directory.parent.name.endswith(f"Z-{os.getpid()}")
        assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o700
        rank = json.loads((recorder.directory / "rank.json").read_text())
        assert os.path.exists(rank["ring"]["path"]) and stat.S_IMODE(os.stat(rank["ring"]["path"]).st_mode) == 0o600
    closed = json.loads((recorder.directory / "rank.json").read_text())
    assert closed["closed"] and closed["ring"] is None
    assert not os.path.exists(rank["ring"]["path"])


def test_metadata_is_merged(tmp_path):
    with moe_native.Recorder(tmp_path / "t", metadata={"model": "m", "versions": {"vllm": "1"}}) as recorder:
        recorder.update_metadata(seed=7)
        with recorder.step(rows=1):
            Program(recorder, 1).forward(1)
    metadata = moe_trace.open(tmp_path / "t").metadata
    assert metadata["model"] == "m" and metadata["seed"] == 7
    assert metadata["versions"]["vllm"] == "1" and metadata["versions"]["torch"] == torch.__version__


def test_many_requests_at_once_do_not_overflow_a_step(tmp_path):
    """Definitions of requests are spread over steps when one step's record could not hold them."""
    names = [f"request-{i:05d}-{'x' * 100}" for i in range(3000)]
    with moe_native.Recorder(tmp_path / "t", ring_bytes=1 << 19, overflow="block") as recorder:
        program = Program(recorder, 1)
        with recorder.step(requests=names, positions=[0] * 3000):
            program.forward(3000)
        for _ in range(20):
            with recorder.step(requests=names[:1], positions=[1]):
                program.forward(1)
        assert recorder.counters()["lost"] == {}
    trace = moe_trace.open(tmp_path / "t")
    assert set(trace.requests) == set(names)
    assert trace.layer(0).request(names[-1]).rows == 1


def test_requests_that_nobody_finishes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_native.notes.MOST_REQUESTS", 10)
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder, 1)
        for i in range(50):
            with recorder.step(requests=[f"r{i}", "again"], positions=[0, i]):
                program.forward(2)
        assert len(recorder._notes) <= 11
    trace = moe_trace.open(tmp_path / "t")
    assert trace.layer(0).request("again").positions.tolist() == list(range(50))


def test_two_recorders_at_once(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as a, moe_native.Recorder(tmp_path / "t") as b:
        programs = Program(a), Program(b)
        for recorder, program in zip((a, b), programs, strict=True):
            with recorder.step(rows=3):
                program.forward(3)
    trace = moe_trace.open(tmp_path / "t")
    assert len(trace.runs) == 2 and trace.rows == 6


CRASHING = """
    import os, sys, torch, moe_native
    sys.path.insert(0, {here!r})
    from test_recorder import Program
    recorder = moe_native.Recorder({trace!r}, flush_seconds=3600)
    program = Program(recorder)
    for i in range(20):
        with recorder.step(requests=["a"], positions=[range(5 * i, 5 * i + 5)], prompt_lens={{"a": 50}}):
            program.forward(5)
        if i == 9 and {flush}:
            recorder.flush()
    if {inside}:
        recorder.begin_step(7)
        program.forward(7)
    os.kill(os.getpid(), 9)
"""


def crash(trace, flush=False, inside=False):
    code = CRASHING.format(here=os.path.dirname(__file__), trace=str(trace), flush=flush, inside=inside)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert done.returncode == -signal.SIGKILL


def expected_ids(steps, last_rows=0):
    class Silent:
        def bind(self, *_, **__):
            return 0

        def record(self, *_):
            pass

    program = Program(Silent())
    for _ in range(steps):
        program.forward(5)
    if last_rows:
        program.forward(last_rows)
    return program


@pytest.mark.parametrize("flush", [False, True], ids=["all in the ring", "half in a segment"])
@pytest.mark.parametrize("inside", [False, True], ids=["between steps", "inside a step"])
def test_sigkill_loses_nothing(tmp_path, flush, inside):
    crash(tmp_path / "t", flush, inside)
    program = expected_ids(20, 7 if inside else 0)

    def check(trace):
        assert trace.rows == (107 if inside else 100)
        for layer in range(LAYERS):
            assert np.array_equal(trace.layer(layer).ids, program.all_ids(layer))
            assert trace.layer(layer).request("a").positions.tolist() == list(range(100))
            assert trace.layer(layer).counts().sum() == trace.rows * K
        assert trace.prefill().rows == 50

    trace = moe_trace.open(tmp_path / "t")
    check(trace)
    ring = json.loads(next((tmp_path / "t").rglob("rank.json")).read_text())["ring"]["path"]
    assert os.path.exists(ring)
    # The next recorder that meets it folds the ring into the run's segments and removes it.
    with moe_native.Recorder(tmp_path / "t"):
        pass
    assert not os.path.exists(ring)
    check(moe_trace.open(tmp_path / "t"))


def test_a_forked_child_leaves_the_parents_recording_alone(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        # torch itself does not work after a fork, so these are made before it.
        ids, weights = torch.zeros(3, K, dtype=torch.int32), torch.zeros(3, K)
        child = os.fork()
        if child == 0:
            with recorder.step(rows=3) as admitted:
                recorder.record(program.bindings[0], ids, weights)
            recorder.close()
            os._exit(0 if not admitted and "parent" in repr(recorder) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert os.path.exists(recorder._core.ring_path)
        with recorder.step(rows=2):
            program.forward(2)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 2 and np.array_equal(trace.layer(0).ids, program.all_ids(0))


def test_row_class_reaches_the_statistics(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder, 1)
        assert recorder.begin_step(6)
        program.forward(6)
        runs = np.zeros(2, RUN_DTYPE)
        runs["count"] = 4, 2
        runs["cls"] = row_class("prefill", "image", True), row_class("decode", "text", True)
        runs["request"] = recorder.request("a", prompt_len=4)
        runs["position"] = 0, 4
        assert recorder.end_step(runs)
    trace = moe_trace.open(tmp_path / "t")
    image = np.bincount(program.all_ids(0)[:4].ravel(), minlength=EXPERTS)
    assert np.array_equal(trace.layer(0).modality("image").counts(), image)
    assert trace.requests["a"].prompt_len == 4


def test_a_late_amendment_is_kept(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        assert recorder.step_number == -1
        program = Program(recorder)
        with recorder.step(requests=["a"], positions=[range(4)]):
            program.forward(4)
        recorder.amend(recorder.step_number, 1, 2, ["rejected"])
    trace = moe_trace.open(tmp_path / "t")
    assert trace.layer(0).flags.tolist() == [0, 2, 2, 0] and trace.complete


def test_the_length_of_a_prompt_may_come_late(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        for first, prompts in ((0, {}), (0, {"a": 4}), (4, {})):
            with recorder.step(requests=["a"], positions=[range(first, first + 4)], prompt_lens=prompts):
                program.forward(4)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.requests["a"].info["prompt_len"] == 4
    assert [trace.phase(phase).layer(0).rows for phase in ("unknown", "prefill", "decode")] == [4, 4, 4]


def test_closing_waits_for_the_disk_only_when_nothing_else_is_left(tmp_path, monkeypatch):
    """vLLM kills a worker 5 s after it was told to end, and a busy disk takes longer."""
    seen = []

    def killed_while_it_waits(handle):
        seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        raise OSError(errno.EIO, "as if killed")

    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        with recorder.step(rows=2):
            program.forward(2)
        monkeypatch.setattr(os, "fdatasync", killed_while_it_waits)
    trace = moe_trace.open(tmp_path / "t")
    assert seen == ["000000.moe"]
    assert [rank.state for rank in trace.ranks] == ["closed"] and trace.rows == 2 and not trace.problems


def test_a_recorder_that_is_dropped_closes_its_trace(tmp_path):
    recorder = moe_native.Recorder(tmp_path / "t")
    program = Program(recorder)
    with recorder.step(rows=2):
        program.forward(2)
    del program, recorder
    gc.collect()
    trace = moe_trace.open(tmp_path / "t")
    assert [rank.state for rank in trace.ranks] == ["closed"] and trace.rows == 2
