"""Rings of dead processes, built by the tables of csrc/RING.md, read in memory and folded into segments."""

from __future__ import annotations

import numpy as np
import pytest
import ring_bytes as rb
import segment_bytes as sb
from crashes import META, Crash, both_ways, check, request_notes

import moe_trace


def test_everything_in_the_ring(tmp_path):
    steps, notes = sb.make_steps([5, 1, 8])
    crash = Crash(tmp_path)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    crash.write()
    report = both_ways(crash, steps)
    assert "14" in str(report)


@pytest.mark.parametrize("closed_segments", [0, 1])
def test_some_in_segments(tmp_path, closed_segments):
    steps, notes = sb.make_steps([5, 1, 8, 3])
    crash = Crash(tmp_path)
    ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
    block = sb.rows_block(steps[:2], notes=notes, lanes=[(0, 1, ends[1])])
    segment = sb.segment([block], META, closed=bool(closed_segments), ring_id=rb.RING_ID)
    crash.segments = [segment] + (
        [sb.segment([], META, closed=False, number=1, ring_id=rb.RING_ID)] if closed_segments else []
    )
    crash.write()
    both_ways(crash, steps)


def test_a_recovered_segment_alone_knows_its_requests(tmp_path):
    """Requests of ring records may have been defined in an earlier, closed segment."""
    steps, notes = sb.make_steps([5, 4])
    crash = Crash(tmp_path)
    ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
    crash.segments = [
        sb.segment([sb.rows_block(steps[:1], notes=notes, lanes=[(0, 1, ends[0])])], META, ring_id=rb.RING_ID),
        sb.segment([], META, closed=False, number=1, ring_id=rb.RING_ID),
    ]
    crash.write()
    both_ways(crash, steps)
    alone = moe_trace.open(crash.directory / "000001.moe")
    named = {"a", "b"} & set(alone.request_ids.tolist())
    assert named and None not in alone.request_ids.tolist()


def test_the_last_step_without_its_record_is_kept_as_nobodys(tmp_path):
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.layer(steps[1], 0)
    crash.ring.layer(steps[1], 3, state=rb.RESERVED)
    crash.write()
    cut = sb.Step(1, [(sb.NOBODY, sb.NOBODY, 6, 0, 0)], {0: steps[1].layers[0]}, time_ns=steps[1].time_ns)
    for recovered in (False, True):
        trace = moe_trace.open(crash.trace)
        check(trace, [steps[0], cut], layers=(0,))
        assert np.array_equal(trace.layer(3).ids, steps[0].layers[3]["ids"])
        assert not trace.complete, f"a step was cut off (recovered: {recovered})"
        moe_trace.recover(crash.trace)


def test_a_partial_layer_of_the_cut_step_is_counted(tmp_path):
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.layer(steps[1], 0)
    crash.ring.layer(steps[1], 3, 0, 4)
    crash.write()
    for _ in range(2):
        trace = moe_trace.open(crash.trace)
        assert trace.layer(0).rows == 11 and trace.layer(3).rows == 5
        assert trace.losses["incomplete"].layers == 1
        moe_trace.recover(crash.trace)


def test_aborted_steps_and_records_are_skipped(tmp_path):
    steps, notes = sb.make_steps([5, 6, 2])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.layer(steps[1], 0)
    crash.ring.step(steps[1], aborted=True)
    crash.ring.layer(steps[2], 0, state=rb.ABORTED)
    crash.ring.whole(steps[2])
    crash.ring.lose("aborted", 1, 2, 6)
    crash.write()
    both_ways(crash, [steps[0], steps[2]])
    assert moe_trace.open(crash.trace).losses["aborted"].rows == 6


def test_a_step_that_never_got_its_record_is_no_step(tmp_path):
    """Its end found no room and was counted; the steps after it are whole."""
    steps, notes = sb.make_steps([5, 6, 2])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.layer(steps[1], 0)
    crash.ring.whole(steps[2])
    crash.write()
    both_ways(crash, [steps[0], steps[2]])


def test_losses_are_those_of_the_ring(tmp_path):
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path, [sb.segment([sb.rows_block([], losses=[(0, 1, 2, 3)])], META, closed=False)])
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.lose("ring_full", 4, 8, 90)
    crash.write()
    for _ in range(2):
        loss = moe_trace.open(crash.trace).losses["ring_full"]
        assert (loss.steps, loss.layers, loss.rows) == (4, 8, 90)
        moe_trace.recover(crash.trace)


def test_several_lanes(tmp_path):
    steps, notes = sb.make_steps([5, 6, 4])
    crash = Crash(tmp_path, lanes=3)
    for i, step in enumerate(steps):
        crash.ring.layer(step, 0, lane=1)
        crash.ring.layer(step, 3, 0, 2, lane=2)
        crash.ring.layer(step, 3, 2, lane=0)
        end = crash.ring.step(step, *request_notes(notes if i == 0 else []))
        if i == 0:
            block = sb.rows_block(steps[:1], notes=notes, lanes=[(0, 1, end), (1, 1, 1), (2, 1, 1)])
    crash.segments = [sb.segment([block], META, closed=False)]
    crash.write()
    both_ways(crash, steps)


def test_laps_and_reused_descriptors(tmp_path):
    """The ring goes round: descriptors and payloads of records in the segment are left behind and overwritten."""
    steps, notes = sb.make_steps([7] * 60)
    crash = Crash(tmp_path, descriptors=16, arena_bytes=2048)
    ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
    for held in (1, 3, 4):
        block = sb.rows_block(steps[:-held], notes=notes, lanes=[(0, 1, ends[-held - 1])])
        crash.segments = [sb.segment([block], META, closed=False)]
        crash.trace, crash.directory = tmp_path / f"t{held}", tmp_path / f"t{held}" / "run-1" / "rank-0"
        crash.write()
        both_ways(crash, steps)


def test_after_an_io_error_only_what_was_not_overwritten_is_read(tmp_path):
    """Records are freed without a block when the disk fails (counted as io_error). What a later record overwrote is
    no data.
    """
    steps, notes = sb.make_steps([7] * 12)
    crash = Crash(tmp_path, descriptors=64, arena_bytes=2048)
    ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
    block = sb.rows_block(steps[:2], notes=notes, lanes=[(0, 1, ends[1])])
    crash.segments = [sb.segment([block], META, closed=False)]
    crash.write()
    trace = moe_trace.open(crash.trace)
    kept = sorted(set(trace.step_numbers.tolist()))
    assert kept[:2] == [0, 1] and kept[2:] == list(range(kept[2], 12)), "the newest are kept, without a hole"
    assert len(kept) < 12, "the arena cannot hold them all"
    check(trace, [steps[i] for i in kept])


def test_after_an_io_error_longer_than_the_descriptors(tmp_path):
    steps, notes = sb.make_steps([2] * 40)
    crash = Crash(tmp_path, descriptors=16, arena_bytes=64 << 10)
    ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
    block = sb.rows_block(steps[:2], notes=notes, lanes=[(0, 1, ends[1])])
    crash.segments = [sb.segment([block], META, closed=False)]
    crash.write()
    trace = moe_trace.open(crash.trace)
    assert sorted(set(trace.step_numbers.tolist())) == [0, 1, *range(35, 40)], (
        "15 of the 16 records are five whole steps"
    )
    check(trace, [*steps[:2], *steps[35:]])


def test_weights_are_narrowed_as_in_segments(tmp_path):
    """The ring holds them as the router gave them; the trace says float16."""
    steps, notes = sb.make_steps([5])
    for fields in steps[0].layers.values():
        fields["weights"] = fields["weights"].astype(np.float32) * np.float32(1.0001)
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    for _ in range(2):
        weights = moe_trace.open(crash.trace).layer(3).weights
        assert weights.dtype == np.float16 and np.array_equal(weights, steps[0].layers[3]["weights"].astype(np.float16))
        moe_trace.recover(crash.trace)


def test_bfloat16_logits_tokens_and_wide_ids(tmp_path):
    steps, notes = sb.make_steps([5], experts=300, logits=True, tokens=True)
    for fields in steps[0].layers.values():
        fields["logits"] = fields["logits"].view(np.uint32) >> 16
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    for _ in range(2):
        trace = moe_trace.open(crash.trace)
        assert np.array_equal(trace.layer(3).ids, steps[0].layers[3]["ids"]) and trace.layer(3).ids.dtype == np.uint16
        assert np.array_equal(trace.layer(3).logits, (steps[0].layers[3]["logits"] << 16).view(np.float32))
        assert np.array_equal(trace.tokens, steps[0].tokens)
        moe_trace.recover(crash.trace)


def test_notes_other_than_requests(tmp_path):
    steps, notes = sb.make_steps([5, 2])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    amend = {"type": "amend", "step": 0, "row": 3, "count": 2, "set": ["rejected"]}
    more = rb.note(rb.LINE, 0, amend) + rb.note(rb.ENDED, 0) + rb.note(9, 5, {"type": "novelty"})
    crash.ring.whole(steps[1], more, 3)
    crash.write()
    for _ in range(2):
        assert moe_trace.open(crash.trace).flags.tolist() == [0, 0, 0, 2, 2, 0, 0]
        moe_trace.recover(crash.trace)


def test_fragments_in_the_segment_and_the_rest_in_the_ring(tmp_path):
    steps, notes = sb.make_steps([3, 20, 2])
    crash = Crash(tmp_path, arena_bytes=1 << 20)
    first = crash.ring.whole(steps[0], *request_notes(notes))
    big = steps[1]
    crash.ring.layer(big, 0, 0, 8, flags=2)
    cut = crash.ring.layer(big, 0, 8, flags=2)
    blocks = [
        sb.rows_block(steps[:1], 0, notes=notes, lanes=[(0, 1, first)]),
        sb.fragment(big, [(0, 0, 20)], 1, lanes=[(0, first + 1, cut)]),
    ]
    crash.ring.layer(big, 3, 0, 8, flags=2)
    crash.ring.layer(big, 3, 8, flags=2)
    crash.ring.step(big)
    crash.ring.whole(steps[2])
    crash.segments = [sb.segment(blocks, META, closed=False)]
    crash.write()
    both_ways(crash, steps)


def test_fragments_of_a_step_that_the_ring_aborts(tmp_path):
    steps, notes = sb.make_steps([3, 20, 2])
    crash = Crash(tmp_path, arena_bytes=1 << 20)
    first = crash.ring.whole(steps[0], *request_notes(notes))
    cut = crash.ring.layer(steps[1], 0, flags=2)
    blocks = [
        sb.rows_block(steps[:1], 0, notes=notes, lanes=[(0, 1, first)]),
        sb.fragment(steps[1], [(0, 0, 20)], 1, lanes=[(0, first + 1, cut)]),
    ]
    crash.ring.layer(steps[1], 3, flags=2)
    crash.ring.step(steps[1], aborted=True)
    crash.ring.whole(steps[2])
    crash.segments = [sb.segment(blocks, META, closed=False)]
    crash.write()
    # Whatever is asked for first: it is the ring that says so, and nothing else may have read it yet.
    assert [batch.rows for batch in moe_trace.open(crash.trace).batches()] == [3, 2]
    both_ways(crash, [steps[0], steps[2]])


def test_fragments_of_a_step_that_was_cut_off(tmp_path):
    """The process died inside a streamed step: what is whole in fragments and ring together is kept as nobody's."""
    steps, notes = sb.make_steps([3, 20])
    crash = Crash(tmp_path, arena_bytes=1 << 20)
    first = crash.ring.whole(steps[0], *request_notes(notes))
    cut = crash.ring.layer(steps[1], 0, 0, 8, flags=2)
    blocks = [
        sb.rows_block(steps[:1], 0, notes=notes, lanes=[(0, 1, first)]),
        sb.fragment(steps[1], [(0, 0, 8)], 1, lanes=[(0, first + 1, cut)]),
    ]
    crash.ring.layer(steps[1], 0, 8, flags=2)
    crash.segments = [sb.segment(blocks, META, closed=False)]
    crash.write()
    for _ in range(2):
        trace = moe_trace.open(crash.trace)
        assert np.array_equal(trace.layer(0).ids, sb.of_rows(steps, 0)) and trace.layer(3).rows == 3
        assert trace.layer(0).phase("unknown").rows == 20
        assert trace.layer(0).counts().sum() == 23 * 4
        moe_trace.recover(crash.trace)


def test_a_torn_block_is_taken_from_the_ring_again(tmp_path):
    """Killed while it wrote a block: the body is there, the header is not, and its records had not been freed."""
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
    whole = sb.segment([sb.rows_block(steps[:1], notes=notes, lanes=[(0, 1, ends[0])])], META, closed=False)
    torn = sb.rows_block(steps[1:], 1, lanes=[(0, ends[0] + 1, ends[1])]).pack()
    crash.segments = [whole + bytes(128) + torn[128:]]
    crash.write()
    assert moe_trace.open(crash.trace).problems == [], "nothing is missing"
    both_ways(crash, steps)
