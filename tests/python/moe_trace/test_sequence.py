"""Which rows of a request count, and whose rows cached positions share. Ids say where and when a row was executed."""

from __future__ import annotations

import numpy as np
import pytest
import segment_bytes as sb

import moe_trace
import moe_trace.info
import moe_trace.summary
from moe_trace.sequence import STATES

RECOMPUTED, REJECTED, SUPERSEDED, UNDECIDED = 1, 2, 4, 16
A, B, C, D, E = range(5)


def step(number, *runs, layers=(0, 3)):
    """Runs are (request, position, count[, flags]). A row's ids are [step, position + layer] and its weights the
    request."""
    full = [(request, position, n, sb.DECODE, *(flags or (0,))) for request, position, n, *flags in runs]
    positions = np.concatenate([np.arange(position, position + n) for _, position, n, *_ in runs])
    requests = np.concatenate([np.full(n, request) for request, _, n, *_ in runs])
    fields = {
        layer: {
            "ids": np.stack([np.full(len(positions), number), positions + layer], axis=1).astype(np.uint8),
            "weights": np.stack([requests, requests], axis=1).astype(np.float16),
        }
        for layer in layers
    }
    return sb.Step(number, full, fields)


def request(index, name, **info):
    return {"type": "request", "index": index, "id": name, **info}


def amend(step_, row, count, flag):
    return {"type": "amend", "step": step_, "row": row, "count": count, "set": [flag]}


def write(path, steps, notes, *, run="run-1", rank="rank-0", layers=(0, 3), **metadata):
    metadata["layers"] = sb.ledger(layers, k=2)
    # A block a step: what is said of a row may be in a later one.
    blocks = [sb.rows_block([s], n, notes=notes if n == len(steps) - 1 else ()) for n, s in enumerate(steps)]
    sb.write_rank(path / run / rank, [sb.segment(blocks, metadata)], metadata=metadata)
    return path


def executed_in(sequence):
    """The step of each position's row, -1 where there is none."""
    steps = sequence.ids[..., 0, 0].astype(int)
    return np.where(steps == 255, -1, steps).tolist()


def states(sequence):
    return [STATES[state] for state in sequence.state]


@pytest.fixture
def repeated(tmp_path):
    """a is preempted after position 5 and starts over; b has drafts in steps 1 and 4."""
    steps = [
        step(0, (A, 0, 4), (B, 0, 2)),
        step(1, (A, 4, 1), (B, 2, 3)),  # b: 2 is sampled; 3 and 4 are drafts, 4 is rejected
        step(2, (A, 5, 1), (B, 4, 1, RECOMPUTED)),
        step(3, (A, 0, 6, RECOMPUTED), (B, 5, 1)),
        step(4, (A, 6, 1), (B, 6, 2)),  # b: 7 is a draft of its last step
    ]
    notes = [request(A, "a"), request(B, "b"), amend(1, 3, 1, "rejected"), amend(4, 2, 1, "undecided")]
    return moe_trace.open(write(tmp_path, steps, notes))


def test_of_several_rows_of_a_position_the_last_counts(repeated):
    a = repeated.request("a")
    assert a.rows == 13 and a.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6]
    assert a.flags.tolist() == [SUPERSEDED] * 6 + [RECOMPUTED] * 6 + [0]
    current = a.current()
    assert current.rows == len(current) == 7
    assert current.positions.tolist() == list(range(7))
    assert current.ids[:, 0, 0].tolist() == [3] * 6 + [4]
    assert current.flags.tolist() == [RECOMPUTED] * 6 + [0]


def test_rejected_and_undecided_drafts_do_not_count(repeated):
    b = repeated.request("b")
    assert b.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert b.flags.tolist() == [0, 0, 0, 0, REJECTED | SUPERSEDED, RECOMPUTED, 0, 0, UNDECIDED]
    assert b.current().positions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert b.current().ids[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 3, 4]


def test_counts_of_current_rows_are_those_of_their_ids(repeated):
    current = repeated.current()
    expected = np.bincount(current.layer(0).ids.reshape(-1), minlength=60)
    assert np.array_equal(current.layer(0).counts(), expected)
    assert repeated.counts().sum() > current.counts().sum()
    assert current.rows == 14 and repeated.rows == 22
    assert "current" in repr(current)


def test_a_sequence_has_a_row_a_position(repeated):
    a = repeated.sequence("a")
    assert len(a) == 7 and a.complete and a.request == "a" and a.layers == (0, 3)
    assert executed_in(a) == [3] * 6 + [4]
    assert a.ids.shape == (7, 2, 2) and a.ids[:, 1, 1].tolist() == [p + 3 for p in range(7)]
    assert a.weights.shape == (7, 2, 2) and set(a.sources) == {"a"}
    one = repeated.layer(3).sequence("a")
    assert np.array_equal(one.ids, a.ids[:, 1]) and one.ids.shape == (7, 2)
    assert "7 executed" in repr(a)


def test_a_sequence_says_which_positions_it_lacks(tmp_path):
    steps = [step(0, (A, 0, 3)), step(2, (A, 4, 1))]  # the step between them was lost
    a = moe_trace.open(write(tmp_path, steps, [request(A, "a")])).sequence("a")
    assert states(a) == ["executed"] * 3 + ["missing", "executed"]
    assert not a.complete
    assert executed_in(a) == [0, 0, 0, -1, 2]
    assert np.isnan(a.weights[3].astype(float)).all() and a.sources[3] is None


@pytest.fixture
def shared(tmp_path):
    """b shares 4 positions of a; c shares 8 of b, of which 4 are a's; d's source is not known; e's not in the trace."""
    steps = [
        step(0, (A, 0, 6)),
        step(1, (A, 6, 1), (B, 4, 6)),
        step(2, (C, 8, 2), (D, 4, 1)),
        step(3, (E, 4, 1)),
    ]
    notes = [
        request(A, "a"),
        request(B, "b", cached=[[0, 4, A]]),
        request(C, "c", cached=[[0, 4, A], [4, 4, B]]),
        request(D, "d", cached=[[0, 4, None]]),
        request(E, "e", cached=[[0, 4, 77]]),
    ]
    return moe_trace.open(write(tmp_path, steps, notes))


def test_cached_positions_have_the_rows_of_whom_they_share_them_with(shared):
    b, c = shared.sequence("b"), shared.sequence("c")
    assert states(b) == ["cached"] * 4 + ["executed"] * 6
    assert executed_in(b) == [0] * 4 + [1] * 6
    assert b.sources.tolist() == ["a"] * 4 + ["b"] * 6 and b.complete
    assert executed_in(c) == [0] * 4 + [1] * 4 + [2] * 2
    assert c.sources.tolist() == ["a"] * 4 + ["b"] * 4 + ["c"] * 2
    assert np.array_equal(c.ids[:, 0, 1], np.arange(10))
    assert shared.requests["c"].cached_tokens == 8


def test_a_chain_of_sources_is_followed_to_its_end(tmp_path):
    steps = [step(0, (A, 0, 4)), step(1, (B, 4, 1)), step(2, (C, 5, 1))]
    notes = [request(A, "a"), request(B, "b", cached=[[0, 4, A]]), request(C, "c", cached=[[0, 5, B]])]
    c = moe_trace.open(write(tmp_path, steps, notes)).sequence("c")
    assert c.sources.tolist() == ["a"] * 4 + ["b", "c"] and executed_in(c) == [0] * 4 + [1, 2]


def test_requests_that_name_each_other_as_sources_end(tmp_path):
    notes = [request(A, "a", cached=[[0, 4, B]]), request(B, "b", cached=[[0, 4, A]])]
    a = moe_trace.open(write(tmp_path, [step(0, (A, 4, 1), (B, 4, 1))], notes)).sequence("a")
    assert states(a) == ["unresolved"] * 4 + ["executed"]


def test_what_cannot_be_known_is_unresolved(shared):
    for name in ("d", "e"):
        sequence = shared.sequence(name)
        assert states(sequence) == ["unresolved"] * 4 + ["executed"] and not sequence.complete
        assert (sequence.ids[:4] == 255).all()
    assert states(shared.sequence("b", resolve_cached=False)) == ["unresolved"] * 4 + ["executed"] * 6


def test_rows_of_its_own_count_more_than_cached_ones(tmp_path):
    # b was preempted, and its cached blocks had gone when it started over.
    steps = [step(0, (A, 0, 4)), step(1, (B, 4, 1)), step(2, (B, 0, 4), (B, 4, 1, RECOMPUTED))]
    notes = [request(A, "a"), request(B, "b", cached=[[0, 4, A]])]
    b = moe_trace.open(write(tmp_path, steps, notes)).sequence("b")
    assert executed_in(b) == [2] * 5 and set(b.sources) == {"b"}


def test_layers_of_pipeline_stages_are_joined_by_position(tmp_path):
    for stage, layers in enumerate([(0,), (3,)]):
        parallel = {"pipeline_parallel_rank": stage}
        # The stages number their requests differently, and one of them refused a step.
        indices = (A, B) if stage == 0 else (B, A)
        steps = [step(0, (indices[0], 0, 3), layers=layers), step(1, (indices[0], 3, 1), layers=layers)]
        notes = [request(indices[0], "a"), request(indices[1], "b")]
        write(tmp_path, steps[: 2 - stage], notes, rank=f"rank-{stage}", layers=layers, parallel=parallel)
    a = moe_trace.open(tmp_path).sequence("a")
    assert states(a) == ["executed"] * 3 + ["missing"]
    assert a.ids[:, 0, 1].tolist() == [0, 1, 2, 3] and a.ids[:, 1, 1].tolist() == [3, 4, 5, 255]


def test_requests_of_one_name_must_be_told_apart(tmp_path):
    write(tmp_path, [step(0, (A, 0, 2), (B, 0, 3))], [request(A, "x"), request(B, "x")])
    write(tmp_path, [step(0, (A, 0, 4))], [request(A, "x")], run="run-2")
    trace = moe_trace.open(tmp_path)
    with pytest.raises(moe_trace.TraceError, match=r"3 requests, in the runs run-1, run-2: .*which=0"):
        trace.sequence("x")
    assert [len(trace.sequence("x", which=n)) for n in (0, 1, 2, -1)] == [2, 3, 4, 4]
    assert len(trace.run("run-2").sequence("x")) == 4
    with pytest.raises(moe_trace.TraceError, match="only 3"):
        trace.sequence("x", which=3)
    with pytest.raises(moe_trace.TraceError, match="no request 'y'"):
        trace.sequence("y")


def test_stages_of_a_reused_name_are_joined_by_the_engines_own_name(tmp_path):
    """The first stage has lost its oldest segment, and with it the first of two requests of one name."""
    for stage, lost in ((0, 1), (1, 0)):
        steps = [step(0, (A, 0, 2), layers=(stage,)), step(1, (B, 0, 3), layers=(stage,))][lost:]
        notes = [request(A, "x", internal="x-1"), request(B, "x", internal="x-2")][lost:]
        parallel = {"pipeline_parallel_size": 2, "pipeline_parallel_rank": stage}
        write(tmp_path, steps, notes, rank=f"rank-{stage}", layers=(stage,), parallel=parallel)
    trace = moe_trace.open(tmp_path)
    assert [len(trace.sequence("x", which=n)) for n in (0, 1)] == [2, 3]
    assert trace.sequence("x", which=1).ids[:, :, 0].tolist() == [[1, 1]] * 3


def test_what_was_not_recorded_is_said(shared):
    with pytest.raises(moe_trace.TraceError, match="no logits of layer 0"):
        _ = shared.sequence("a").logits


def test_a_hostile_position_is_refused(tmp_path):
    far = sb.Step(0, [(A, 1 << 31, 1, sb.DECODE, 0)], step(0, (A, 0, 1)).layers)
    notes = [request(A, "a"), request(B, "b", cached=[[0, 1 << 31, A], ["x", 2, 3], 5])]
    trace = moe_trace.open(write(tmp_path, [far, step(1, (B, 0, 1))], notes))
    for name in "ab":
        with pytest.raises(moe_trace.DamagedTrace, match="not credible"):
            trace.sequence(name)


def test_the_summary_counts_what_was_executed_again_and_drafts(tmp_path):
    runs = [(A, 0, 3, sb.PREFILL, 0), (A, 3, 1, sb.DECODE, 0), (A, 4, 2, sb.DECODE | 1 << 8, 0)]
    again = [(A, 0, 3, sb.PREFILL | 1 << 7, RECOMPUTED)]
    like = step(0, (A, 0, 6)), step(1, (A, 0, 3))
    steps = [sb.Step(0, runs, like[0].layers), sb.Step(1, again, like[1].layers)]
    trace = moe_trace.open(write(tmp_path, steps, [request(A, "a", cached=[[7, 2, None]])], left_out=["a draft model"]))
    assert dict(trace.rows_by_class) == {
        sb.PREFILL: 3,
        sb.DECODE: 1,
        sb.DECODE | 1 << 8: 2,
        sb.PREFILL | 1 << 7: 3,
    }
    of = moe_trace.summary.standing(trace)
    assert [(k["phase"], k["recomputed"], k["draft"], k["rows"]) for k in of["kinds"]] == [
        ("prefill", False, False, 3),
        ("decode", False, False, 1),
        ("prefill", True, False, 3),
        ("decode", False, True, 2),
    ]
    assert of["left_out"] == ["a draft model"]
    assert moe_trace.info.describe(trace)["cached"] == 2


def test_tokens_by_class_are_those_of_all_runs_whatever_layers_they_recorded(tmp_path):
    for run, layers in enumerate([(0, 3), (3,)]):
        write(tmp_path, [step(0, (A, 0, 4), layers=layers)], [request(A, "a")], run=f"run-{run}", layers=layers)
    trace = moe_trace.open(tmp_path)
    assert dict(trace.rows_by_class) == {sb.DECODE: 8} and trace.executed_rows == 8
