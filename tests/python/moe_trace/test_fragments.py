"""Steps that left the ring in pieces: fragment blocks and the block that completes them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import ring_bytes as rb
import segment_bytes as sb
from crashes import Crash, both_ways, request_notes

import moe_trace
from moe_trace.cli import LOSSY, main

META = {"model": "tiny", "layers": sb.ledger()}
(BEFORE, BIG, AFTER), NOTES = sb.make_steps([6, 20, 3], tokens=True)
FRAGMENTS = (
    sb.fragment(BIG, [(0, 0, 8)], 1),
    sb.fragment(BIG, [(0, 8, 12), (3, 0, 5)], 2),
)
REST = [(3, 5, 9), (3, 14, 6)]


def written(tmp_path, blocks, *, closed=True, owner=None):
    data = sb.segment(blocks, META, closed=closed)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata=META, closed=closed, owner=owner)
    return moe_trace.open(tmp_path / "t")


def before():
    return sb.rows_block([BEFORE], 0, notes=NOTES)


def after(number, losses=()):
    return sb.rows_block([AFTER], number, losses=losses)


def completing():
    return sb.completing(BIG, REST, 2, 3)


def same(trace, steps, layers=(0, 3)):
    assert trace.rows == sum(step.rows for step in steps)
    for layer in layers:
        one = trace.layer(layer)
        assert np.array_equal(one.ids, sb.of_rows(steps, layer))
        assert np.array_equal(one.weights, sb.of_rows(steps, layer, "weights"))
        assert np.array_equal(one.counts(), np.bincount(sb.of_rows(steps, layer).ravel(), minlength=60))
    assert np.array_equal(trace.positions, sb.per_row(steps, "position"))
    assert np.array_equal(trace.tokens, np.concatenate([step.tokens for step in steps]))


def test_a_step_in_pieces_is_whole(tmp_path):
    for closed in (True, False):
        trace = written(tmp_path / str(closed), [before(), *FRAGMENTS, completing(), after(4)], closed=closed)
        same(trace, [BEFORE, BIG, AFTER])
        one = trace.layer(3)
        assert np.array_equal(
            one.request("a").ids, sb.of_rows([BEFORE, BIG, AFTER], 3)[sb.per_row([BEFORE, BIG, AFTER], "request") == 0]
        )
        assert trace.steps(1, 2).rows == 20 and np.array_equal(trace.layer(0).steps(1, 2).ids, BIG.layers[0]["ids"])


def test_all_of_a_step_in_fragments(tmp_path):
    fragments = [*FRAGMENTS, sb.fragment(BIG, REST, 3)]
    rest = sb.completing(BIG, [], 3, 4)
    same(written(tmp_path, [before(), *fragments, rest, after(5)]), [BEFORE, BIG, AFTER])


def test_an_aborted_step_takes_its_fragments_back(tmp_path):
    trace = written(
        tmp_path, [before(), *FRAGMENTS, sb.takes_back(BIG, 2, 3, losses=[(2, 1, 2, 20)]), after(4, [(2, 1, 2, 20)])]
    )
    same(trace, [BEFORE, AFTER])
    assert trace.losses["aborted"].rows == 20


def test_a_layer_with_a_gap_is_no_layer_of_the_step(tmp_path):
    """The recorder leaves it out of the statistics as well, and counts it as incomplete."""
    block = sb.completing(BIG, REST[1:], 2, 3, whole=[0], losses=[(5, 0, 1, 20)])
    trace = written(tmp_path, [before(), *FRAGMENTS, block, after(4, [(5, 0, 1, 20)])])
    assert trace.layer(0).rows == 29 and trace.layer(3).rows == 9
    assert np.array_equal(trace.layer(3).ids, sb.of_rows([BEFORE, AFTER], 3))
    assert np.array_equal(trace.layer(3).counts(), np.bincount(sb.of_rows([BEFORE, AFTER], 3).ravel(), minlength=60))
    assert trace.losses["incomplete"].layers == 1


def test_a_step_cut_off_by_a_crash(tmp_path):
    """Layers that have all rows are kept as nobody's; what has a gap is not."""
    trace = written(tmp_path, [before(), *FRAGMENTS], closed=False)
    assert trace.state == "crashed" and not trace.complete
    assert trace.layer(0).rows == 26 and trace.layer(3).rows == 6
    assert np.array_equal(trace.layer(0).ids, sb.of_rows([BEFORE, BIG], 0))
    assert trace.layer(0).positions.tolist()[6:] == [-1] * 20
    assert set(trace.layer(0).request_ids[6:]) == {None}
    assert trace.layer(0).phase("unknown").rows == 20
    assert np.array_equal(
        trace.layer(0).phase("unknown").counts(), np.bincount(BIG.layers[0]["ids"].ravel(), minlength=60)
    )
    assert trace.layer(0).counts().sum() == 26 * 4
    assert len(trace.problems) == 2 and "died inside step 1" in trace.problems[1]
    assert trace.losses == {"incomplete": moe_trace.Loss(0, 1, 20)}


CAPTURED = 16
RANGES = [(0, 0, 20), (3, 0, 5)]


def crashed(tmp_path, ranges=RANGES):
    """A process that died after these ranges of BIG had left its ring, which has nothing else yet."""
    crash = Crash(tmp_path, arena_bytes=1 << 20)
    first = crash.ring.whole(BEFORE, *request_notes(NOTES))
    for layer, start, rows in ranges:
        last = crash.ring.layer(BIG, layer, start, rows, flags=2)
    blocks = [
        sb.rows_block([BEFORE], 0, notes=NOTES, lanes=[(0, 1, first)]),
        sb.fragment(BIG, ranges, 1, lanes=[(0, first + 1, last)]),
    ]
    crash.segments = [sb.segment(blocks, META, closed=False)]
    return crash


def for_captures(ring):
    ring.rows(BIG)
    ring.layer(BIG, 3, 5, flags=2 | CAPTURED)


@pytest.mark.parametrize("in_ring", [lambda _: None, for_captures], ids=["nothing", "captures"])
@pytest.mark.parametrize("ranges", [RANGES, RANGES[:1]], ids=["a partial layer", "whole layers"])
def test_a_step_cut_off_of_which_the_ring_has_nothing_more(tmp_path, capsys, in_ring, ranges):
    crash = crashed(tmp_path, ranges)
    in_ring(crash.ring)
    crash.ring.lose("bad_input", 1, 0, 7)
    crash.write()
    lost = {"bad_input": moe_trace.Loss(1, 0, 7)}
    if ranges == RANGES:
        lost["incomplete"] = moe_trace.Loss(0, 1, 20)
    said = "died inside step 1"
    for time in range(3):
        trace = moe_trace.open(crash.trace)
        assert not trace.complete and trace.losses == lost
        assert len(trace.problems) == 1 and said in trace.problems[0]
        assert np.array_equal(trace.layer(0).ids, sb.of_rows([BEFORE, BIG], 0)) and trace.layer(3).rows == 6
        assert trace.layer(0).phase("unknown").rows == 20
        files = {path: path.read_bytes() for path in crash.trace.rglob("*") if path.is_file()}
        assert main(["recover", str(crash.trace)]) == LOSSY
        out = capsys.readouterr()
        assert said in (out.out if time == 0 else out.err)
        if time > 0:
            assert files == {path: path.read_bytes() for path in crash.trace.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("flags", [0, CAPTURED])
def test_a_step_that_never_got_its_record_takes_its_fragments_back(tmp_path, rest, flags):
    """A later one shows that the process did not die in it: its end found no room and was counted."""
    crash = crashed(tmp_path)
    if rest:
        crash.ring.layer(BIG, 3, 5, flags=2)
    crash.ring.lose("ring_full", 1, 2, 20)
    crash.ring.whole(AFTER, flags=flags)
    crash.write()
    assert moe_trace.open(crash.trace).losses == {"ring_full": moe_trace.Loss(1, 2, 20)}
    report = both_ways(crash, [BEFORE] if flags else [BEFORE, AFTER])
    assert report.problems == [] and moe_trace.open(crash.trace).losses == {"ring_full": moe_trace.Loss(1, 2, 20)}


def test_an_aborted_step_that_was_the_last_is_not_counted(tmp_path):
    crash = crashed(tmp_path)
    crash.ring.step(BIG, aborted=True)
    crash.write()
    both_ways(crash, [BEFORE])


def test_the_open_step_of_a_live_process_is_not_read_yet(tmp_path):
    trace = written(tmp_path, [before(), *FRAGMENTS], closed=False, owner=rb.owner_of(os.getpid()))
    assert (trace.rows, trace.problems) == (6, [])


def test_a_damaged_fragment_is_told(tmp_path):
    data = bytearray(sb.segment([before(), *FRAGMENTS, completing(), after(4)], META))
    at = data.find(FRAGMENTS[0].pack()[:32])
    data[at + 130] ^= 1  # its directory
    path = tmp_path / "000000.moe"
    path.write_bytes(data)
    trace = moe_trace.open(path)
    try:
        assert trace.layer(0).rows in (9, 29)
        rows = trace.layer(0).ids
        assert np.array_equal(rows, sb.of_rows([BEFORE, AFTER], 0)) and trace.problems
    except moe_trace.DamagedTrace as error:
        assert str(path) in str(error)
