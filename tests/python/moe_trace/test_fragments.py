"""Steps that left the ring in pieces: fragment blocks and the block that completes them."""

from __future__ import annotations

import os

import numpy as np
import ring_bytes as rb
import segment_bytes as sb

import moe_trace

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
