"""Recorder with less than everything stored: what is counted is what was executed, what is stored is whole, and what is
not asked for is in no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from routed_program import EXPERTS, LAYERS, K, Program

import moe_native
import moe_trace
from moe_native.tier import Tier

NAMES = [f"r{i}" for i in range(12)]
PROMPTS = {name: 3 + i % 4 for i, name in enumerate(NAMES)}
SAMPLE = 0.4
KEPT = [name for name in NAMES if Tier(("ids",), sample=SAMPLE).keeps(name)]
assert 0 < len(KEPT) < len(NAMES)


def serve(recorder, program, first_step=0, end=12):
    """Requests that begin and end at different times."""
    for step in range(first_step, end):
        active = [name for i, name in enumerate(NAMES) if i // 2 <= step < i // 2 + 5]
        first = {name: 0 if step == i // 2 else PROMPTS[name] + step - i // 2 - 1 for i, name in enumerate(NAMES)}
        positions = [range(PROMPTS[n]) if first[n] == 0 else range(first[n], first[n] + 1) for n in active]
        rows = sum(map(len, positions))
        if not rows:
            continue
        with recorder.step(requests=active, positions=positions, prompt_lens={n: PROMPTS[n] for n in active}):
            program.forward(rows)
        for name in active:
            if first[name] == PROMPTS[name] + 3:
                recorder.finish(name)


def recorded(path, **settings):
    with moe_native.Recorder(path, **settings) as recorder:
        serve(recorder, Program(recorder))
    return moe_trace.open(path)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("full") / "t", fields="ids,weights,logits")


def counts_agree(trace, full):
    for phase in ("prefill", "decode"):
        assert np.array_equal(trace.phase(phase).counts(), full.phase(phase).counts())
        assert np.array_equal(trace.phase(phase).weight_sums(), full.phase(phase).weight_sums())
    assert {layer: s.rows for layer, s in trace.stats().items()} == {layer: s.rows for layer, s in full.stats().items()}
    assert trace.executed_rows == full.rows and trace.losses == {}


def named(path):
    """The requests that any note of the trace names."""
    blocks = (block for rank in moe_trace.open(path).ranks for block in rank.blocks())
    return {note["id"] for block in blocks for note in block.notes if "id" in note}


@pytest.mark.parametrize("settings", [{"fields": "counts"}, {"sample": 0}], ids=["counts", "sample 0"])
def test_counts_alone(tmp_path, full, settings):
    trace = recorded(tmp_path / "t", **settings)
    counts_agree(trace, full)
    assert trace.rows == 0 and trace.complete and trace.requests == {}
    assert named(tmp_path / "t") == set()
    steps = np.concatenate([block.steps for rank in trace.ranks for block in rank.blocks()])
    assert steps["step"].tolist() == list(range(len(steps))) and len(steps) == 10 and not steps["rows"].any()
    assert trace.layer(1).ids.shape[0] == 0
    with pytest.raises(moe_trace.TraceError, match="counts only"):
        trace.first_choice_counts()
    assert f"{full.rows} rows executed, 0 stored" in repr(trace)


def test_a_share_of_the_requests(tmp_path, full):
    trace = recorded(tmp_path / "t", fields="ids,weights,logits", sample=SAMPLE)
    counts_agree(trace, full)
    assert list(trace.requests) == KEPT
    assert trace.rows == sum(full.request(name).rows for name in KEPT)
    assert named(tmp_path / "t") == set(KEPT)
    for name in KEPT:
        for layer in range(LAYERS):
            one, other = trace.layer(layer).request(name), full.layer(layer).request(name)
            for column in ("ids", "weights", "logits", "positions", "step_numbers", "flags"):
                assert np.array_equal(getattr(one, column), getattr(other, column)), column
    with pytest.raises(moe_trace.TraceError, match="sampled"):
        trace.request(next(name for name in NAMES if name not in KEPT))


def test_nobodys_rows_are_counted_and_not_sampled(tmp_path):
    for sample, stored in ((1.0, 5), (0.999, 0)):
        path = tmp_path / str(sample)
        with moe_native.Recorder(path, sample=sample) as recorder, recorder.step(rows=5):
            Program(recorder, 1).forward(5)
        trace = moe_trace.open(path)
        assert (trace.rows, trace.executed_rows, trace.layer(0).counts().sum()) == (stored, 5, 5 * K)


def test_late_facts_find_their_rows(tmp_path):
    """The row of a step is where it was executed, and others before it are not stored."""
    traces = []
    for sample in (1.0, SAMPLE):
        path = tmp_path / str(sample)
        with moe_native.Recorder(path, sample=sample) as recorder:
            program = Program(recorder, 1)
            with recorder.step(requests=NAMES, positions=[range(10, 14)] * len(NAMES)):
                program.forward(4 * len(NAMES))
            for i in range(len(NAMES)):  # as of drafts: the last rows of each request, and once of two requests
                recorder.amend(0, 4 * i + 2, 2 if i % 3 else 4, ["rejected"])
        traces.append(moe_trace.open(path))
    for name in KEPT:
        assert traces[1].request(name).flags.tolist() == traces[0].request(name).flags.tolist()
    assert traces[1].rows == 4 * len(KEPT) and set(traces[1].flags.tolist()) == {0, 2}


def test_a_time_that_cuts_a_block_says_how_far_the_counts_reach(tmp_path, full):
    trace = recorded(tmp_path / "t", fields="counts")
    with pytest.warns(UserWarning, match=r"steps 0 to 9\)"):
        assert np.array_equal(trace.steps(2, 4).counts(), full.counts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(trace.steps(0).counts(), full.counts())
        assert not trace.steps(50).counts().any()
        full.steps(2, 4).counts()


@pytest.mark.parametrize("fields", ["counts", "ids,weights"])
def test_a_step_that_the_ring_cannot_hold(tmp_path, fields):
    """In the counts tier no row of it is written on the way. With a share, it cannot be known in time whose rows they
    are: the others' stay in the trace as nobody's."""
    rows = 30_000
    with moe_native.Recorder(tmp_path / "t", ring_bytes=1 << 18, overflow="block", fields=fields, sample=SAMPLE) as r:
        program = Program(r)
        with r.step(requests=NAMES[:2], positions=[range(7), range(3)]):
            program.forward(10)
        names = [KEPT[0], next(name for name in NAMES if name not in KEPT)]
        with r.step(requests=names, positions=[range(rows), range(rows)], prompt_lens=dict.fromkeys(names, rows)):
            program.forward(2 * rows)
    trace = moe_trace.open(tmp_path / "t")
    for layer in range(LAYERS):
        assert np.array_equal(
            trace.layer(layer).counts(), np.bincount(program.all_ids(layer).ravel(), minlength=EXPERTS)
        )
        assert trace.layer(layer).prefill().stats()[layer].rows == 2 * rows
    assert trace.complete and trace.executed_rows == 2 * rows + 10
    if fields == "counts":
        assert trace.rows == 0
        size = sum(file.stat().st_size for file in (tmp_path / "t").rglob("*.moe"))
        assert size < rows  # 16 bytes a row and layer would be a hundred times as much
        return
    of_kept = trace.layer(1).steps(1).request(names[0])
    assert np.array_equal(of_kept.ids, program.ids[1][1][:rows]) and of_kept.positions.tolist() == list(range(rows))
    big = trace.layer(1).steps(1)
    assert big.rows == 2 * rows and set(big.request_ids[rows:]) == {None} and set(big.positions[rows:].tolist()) == {-1}
    assert named(tmp_path / "t") == {names[0]}


def test_settings_change_between_steps(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)

        def step(name, first):
            with recorder.step(requests=[name], positions=[range(first, first + 3)], tokens=np.arange(3)):
                recorder.set(sample=0.5)  # in the middle of a step: it holds from the next one on
                recorder.set(sample=1)
                program.forward(3)

        step("a", 0)
        recorder.set(fields="ids,logits,tokens", layers="0,2")
        assert recorder.fields == ("ids", "weights") and recorder.status()["fields"] == ["ids", "logits", "tokens"]
        step("a", 3)
        recorder.set(fields="counts", layers="all")
        step("c", 0)  # the first request of the first step after a change is already under it
        step("a", 6)
        step("b", 0)
        recorder.set(fields=["ids"])
        step("a", 9)
        step("b", 3)
        recorder.set(sample=0)
        step("a", 12)
        for wrong in ({"fields": "counts,ids"}, {"sample": 1.5}, {"layers": "x"}, {"fields": "id"}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                recorder.set(**wrong)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.executed_rows == 24
    # b began while nothing was to be stored, and so it is not.
    assert list(trace.requests) == ["a"] and trace.request("a").positions.tolist() == [*range(6), *range(9, 12)]
    assert trace.layer(1).rows == 6 and trace.layer(0).steps(1, 2).logits.shape == (3, EXPERTS)
    assert trace.steps(1, 2).tokens.tolist() == [0, 1, 2]
    with pytest.raises(moe_trace.TraceError, match="logits were not recorded"):
        _ = trace.layer(0).steps(0, 1).logits
    for layer, executed in ((0, 24), (1, 21), (2, 24)):
        assert trace.stats()[layer].rows == executed
    assert trace.metadata["fields"] == ["ids"] and trace.metadata["sample"] == 0.0
    assert {entry.status for entry in trace.coverage} == {"exact"}


def test_a_layer_that_is_left_out_is_skipped(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        for layers in ("all", "0-1"):
            recorder.set(layers=layers)
            with recorder.step(rows=2):
                program.forward(2)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and {layer: stats.rows for layer, stats in trace.stats().items()} == {0: 4, 1: 4, 2: 2}
    assert {entry.layer: entry.status for entry in trace.coverage} == {0: "exact", 1: "exact", 2: "skipped"}


def test_a_pause_is_data_and_no_loss(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        for paused in (False, True, True, False):
            (recorder.pause if paused else recorder.resume)()
            with recorder.step(rows=7):
                program.forward(7)
        assert recorder.counters()["paused"] == {"steps": 2, "layers": 0, "rows": 14}
        assert recorder.counters()["lost"] == {}
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.rows == 14 and trace.losses == {}
    assert (trace.paused.steps, trace.paused.rows) == (2, 14)
    assert "paused for 2 steps" in repr(trace)


def test_a_layer_that_is_never_called_is_missed_also_where_no_row_is_stored(tmp_path):
    with moe_native.Recorder(tmp_path / "t", fields="counts") as recorder:
        recorder.bind(9, experts=EXPERTS, top_k=K)
        program = Program(recorder)
        with recorder.step(rows=2):
            program.forward(2)
    trace = moe_trace.open(tmp_path / "t")
    assert [entry.layer for entry in trace.coverage if entry.status == "missed"] == [9]


CRASHING = """
    import os, sys, moe_native
    sys.path.insert(0, {here!r})
    from test_recorder_tiers import Program, serve
    recorder = moe_native.Recorder({trace!r}, flush_seconds=3600, **{settings})
    program = Program(recorder)
    serve(recorder, program, 0, 6)
    if {flush}:
        recorder.flush()
    serve(recorder, program, 6, 12)
    if {inside}:
        recorder.begin_step(4)
        program.forward(4)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("flush", [False, True], ids=["all in the ring", "half in a segment"])
@pytest.mark.parametrize("inside", [False, True], ids=["between steps", "inside a step"])
@pytest.mark.parametrize("sample", [0, SAMPLE])
def test_a_killed_process_leaves_what_was_to_be_stored_and_all_counts(tmp_path, full, flush, inside, sample):
    code = CRASHING.format(
        here=os.path.dirname(__file__), trace=str(tmp_path / "t"), flush=flush, inside=inside,
        settings={"fields": "ids,weights,logits", "sample": sample},
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120)
    assert done.returncode == -signal.SIGKILL

    def check(trace):
        kept = KEPT if sample else []
        counts_of = trace.phase("prefill", "decode")
        assert np.array_equal(counts_of.counts(), full.counts())
        assert np.allclose(counts_of.weight_sums(), full.weight_sums())
        assert list(trace.requests) == kept and trace.losses == {}
        assert trace.executed_rows == full.rows + 4 * inside
        # Whose the rows of the step that was cut off are nobody knows: they are stored unless none is to be.
        assert trace.rows == sum(full.request(name).rows for name in kept) + (4 if inside and sample else 0)
        assert trace.phase("unknown").stats()[0].rows == 4 * inside
        for name in kept:
            assert np.array_equal(trace.layer(1).request(name).ids, full.layer(1).request(name).ids)
            assert np.array_equal(trace.layer(1).request(name).logits, full.layer(1).request(name).logits)

    trace = moe_trace.open(tmp_path / "t")
    assert trace.state == "crashed"
    check(trace)
    moe_trace.recover(tmp_path / "t")
    assert moe_trace.open(tmp_path / "t").state == "closed"
    check(moe_trace.open(tmp_path / "t"))
    assert moe_trace.recover(tmp_path / "t").ranks == []


STREAMING = """
    import os, sys, time, moe_native
    sys.path.insert(0, {here!r})
    from test_recorder_tiers import Program
    recorder = moe_native.Recorder({trace!r}, flush_seconds=3600, ring_bytes=1 << 18, overflow="block", fields="counts")
    program = Program(recorder)
    with recorder.step(rows=10):
        program.forward(10)
    recorder.flush()
    recorder.begin_step(60_000)
    program.forward(60_000)
    os.kill(os.getpid(), 9)
"""


def test_a_process_killed_while_it_streams_out_what_is_only_counted(tmp_path):
    code = STREAMING.format(here=os.path.dirname(__file__), trace=str(tmp_path / "t"))
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120).returncode == -signal.SIGKILL

    def check(trace):
        assert (trace.rows, trace.executed_rows) == (0, 10)
        assert {layer: stats.rows for layer, stats in trace.stats().items()} == dict.fromkeys(range(LAYERS), 10)
        assert (trace.losses["incomplete"].steps, trace.losses["incomplete"].rows) == (1, 60_000)
        assert not trace.complete and any("its counts are lost" in problem for problem in trace.problems)

    check(moe_trace.open(tmp_path / "t"))
    moe_trace.recover(tmp_path / "t")
    assert moe_trace.open(tmp_path / "t").state == "closed"
    check(moe_trace.open(tmp_path / "t"))
