"""Selections against numpy on the arrays that the trace was made of."""

from __future__ import annotations

import gc
import tracemalloc
from datetime import UTC, datetime

import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_trace
from moe_trace.file_block import FileBlock

SIZES = [12, 5, 9, 1, 30, 2, 8, 8]
STEPS, NOTES = sb.make_steps(SIZES, tokens=True, logits=True, requests=("a", "b", "c"))
SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("selection") / "t"
    halves = STEPS[:5], STEPS[5:]
    segments = [
        sb.segment(
            [sb.rows_block(half[:2], 2 * i, notes=NOTES), sb.rows_block(half[2:], 2 * i + 1)],
            {"layers": sb.ledger()},
            number=i,
        )
        for i, half in enumerate(halves)
    ]
    sb.write_rank(path / "run-1" / "rank-0", segments, metadata={"layers": sb.ledger()})
    return moe_trace.open(path)


IDS = {layer: sb.of_rows(STEPS, layer) for layer in (0, 3)}
REQUEST, POSITION, CLASS = (sb.per_row(STEPS, what) for what in ("request", "position", "class"))
STEP = np.repeat(np.arange(len(SIZES)), SIZES)
TIME = np.array([STEPS[0].time_ns + int(s) * SECOND for s in STEP])
NAMES = np.array(["a", "b", "c"], object)[REQUEST]


def test_the_whole(trace):
    assert trace.rows == len(STEP)
    assert trace.ids.shape == (len(STEP), 2, 4)
    assert np.array_equal(trace.ids, np.stack([IDS[0], IDS[3]], axis=1))
    assert np.array_equal(trace.request_ids, NAMES)
    assert np.array_equal(trace.positions, POSITION) and trace.positions.dtype == np.int64
    assert np.array_equal(trace.step_numbers, STEP)
    assert np.array_equal(trace.tokens, np.concatenate([s.tokens for s in STEPS]))
    times = trace.times
    assert times.dtype.kind == "M" and np.array_equal(times.astype("datetime64[ns]").astype(np.int64), TIME)


def test_an_int_drops_the_axis_and_a_list_keeps_it(trace):
    assert trace.layer(3).ids.shape == (len(STEP), 4)
    assert trace.layer([3]).ids.shape == (len(STEP), 1, 4)
    assert np.array_equal(trace.layer([3, 0]).ids, np.stack([IDS[0], IDS[3]], axis=1)), "layers ascend, as in counts()"
    assert trace.layer(3).counts().shape == (60,) and trace.layer([3]).counts().shape == (1, 60)
    assert trace.layer(3).logits.shape == (len(STEP), 60) and trace.logits.shape == (len(STEP), 2, 60)


def test_phases_add_up(trace):
    for layer in (0, 3):
        one = trace.layer(layer)
        assert np.array_equal(one.prefill().counts() + one.decode().counts(), one.counts())
    assert trace.phase("unknown").rows == 0
    assert trace.prefill().rows == (CLASS & 3 == 1).sum()


def test_selections_are_immutable_and_chain_in_any_order(trace):
    base = trace.layer(0)
    rows = base.rows
    narrow = base.decode().request("b").steps(2, 6)
    again = trace.steps(2, 6).request("b").layer(0).decode()
    assert base.rows == rows
    assert np.array_equal(narrow.ids, again.ids)
    mine = (CLASS & 3 == 2) & (REQUEST == 1) & (STEP >= 2) & (STEP < 6)
    if not mine.any():
        pytest.fail("the example selects nothing")
    assert np.array_equal(narrow.ids, IDS[0][mine])


def test_several_requests_and_unknown_ones(trace):
    assert np.array_equal(trace.layer(0).request("a", "c").ids, IDS[0][REQUEST != 1])
    assert trace.request("a").request("b").rows == 0
    with pytest.raises(moe_trace.TraceError, match="zz"):
        trace.request("zz")


def test_contradictions_are_empty(trace):
    empty = trace.layer(0).prefill().decode()
    assert empty.rows == 0 and empty.ids.shape == (0, 4) and not empty.counts().any()
    assert trace.request("a").request("b").ids.shape == (0, 2, 4)
    assert empty.positions.shape == (0,) and empty.request_ids.shape == (0,)
    assert list(empty.batches()) == [] or all(batch.rows == 0 for batch in empty.batches())


def test_between_takes_seconds_and_datetimes(trace):
    t0, t1 = STEPS[2].time_ns / SECOND, STEPS[5].time_ns / SECOND
    expected = IDS[3][(STEPS[2].time_ns <= TIME) & (STEPS[5].time_ns > TIME)]
    assert np.array_equal(trace.layer(3).between(t0, t1).ids, expected)
    as_dates = (datetime.fromtimestamp(t, UTC) for t in (t0, t1))
    assert np.array_equal(trace.between(*as_dates).layer(3).ids, expected)
    assert trace.between(t0, None).rows == (STEPS[2].time_ns <= TIME).sum()
    assert trace.between(None, t1).rows == (STEPS[5].time_ns > TIME).sum()
    # Counts of a cut through blocks are exact, too.
    assert np.array_equal(trace.layer(3).between(t0, t1).counts(), np.bincount(expected.ravel(), minlength=60))


def test_between_takes_what_times_gives_and_iso_times(trace):
    when = STEPS[3].time_ns
    expected = (when <= TIME).sum()
    iso = datetime.fromtimestamp(when / SECOND, UTC).isoformat()
    for start in (trace.times[when == TIME][0], np.datetime64(when // SECOND, "s"), iso, iso.replace("+00:00", "Z")):
        assert trace.between(start, None).rows == expected, start
    local = datetime.fromtimestamp(when / SECOND)
    assert trace.between(local, None).rows == trace.between(local.isoformat(), None).rows == expected
    for far in (np.datetime64("9999-12-31"), 1e30, "9999-12-31T00:00Z"):
        assert trace.between(far, None).rows == 0 and trace.between(None, far).rows == trace.rows
    for start in (np.datetime64("NaT"), "soon", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is no time"):
            trace.between(start, None)


def test_since(trace):
    """Ages are counted from now; these steps lie in the future of any clock this test runs by, so all are newer."""
    with pytest.raises(ValueError, match="10m"):
        trace.since("soon")
    for long_ago in ("1000000d", "99999999999999999999d"):
        assert trace.since(long_ago).rows == trace.rows
    iso = datetime.fromtimestamp(STEPS[4].time_ns / SECOND, UTC).isoformat()
    assert trace.since(iso).rows == (STEPS[4].time_ns <= TIME).sum()


def test_weights_and_first_choices(trace):
    ids, weights = IDS[0], sb.of_rows(STEPS, 0, "weights")
    sums = np.bincount(ids.ravel(), weights=weights.ravel().astype(np.float64), minlength=60)
    assert np.allclose(trace.layer(0).weight_sums(), sums)
    first = np.bincount(ids[np.arange(len(ids)), weights.argmax(1)], minlength=60)
    assert np.array_equal(trace.layer(0).first_choice_counts(), first)
    assert np.array_equal(trace.first_choice_counts()[0], first)


def test_batches_are_the_arrays_in_pieces(trace):
    for selection in (trace, trace.layer(3), trace.layer([3, 0]).decode().request("a", "b")):
        batches = list(selection.batches())
        assert sum(batch.rows for batch in batches) == selection.rows
        for name in ("ids", "weights", "logits", "positions", "request_ids", "tokens", "step_numbers", "times"):
            joined = np.concatenate([getattr(batch, name) for batch in batches])
            assert np.array_equal(joined, getattr(selection, name)), name
    assert max(batch.rows for batch in trace.batches()) <= sum(SIZES[2:5]), "a batch is no more than a block"


def test_batches_leave_nothing_behind(tmp_path):
    """The memory that a pass takes does not grow with the number of blocks."""
    blocks = []
    for number in range(60):
        steps, notes = sb.make_steps([1] * 20, layers=tuple(range(12)), first=20 * number, seed=number)
        blocks.append(sb.rows_block(steps, number, notes=notes))
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [sb.segment(blocks)])
    del blocks, steps, notes
    trace = moe_trace.open(tmp_path / "t")
    gc.freeze()  # what other tests have imported need not be looked through each time
    tracemalloc.start()
    try:
        held = []
        for batch in trace.batches():
            _ = batch.ids, batch.weights, batch.positions
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert held[-1] - held[9] < 50 * 400, "50 blocks; what was read of one takes 15 kB"


def test_a_request_is_counted_where_it_is(tmp_path, monkeypatch):
    blocks = []
    for number in range(5):
        steps, notes = sb.make_steps([8, 8], first=2 * number, seed=number)
        for step in steps:
            step.runs[:] = [(int(number > 0), 0, 8, sb.PREFILL, 0)]
        blocks.append(sb.rows_block(steps, number, notes=notes))
    path = tmp_path / "000000.moe"
    path.write_bytes(sb.segment(blocks))
    trace, read, column = moe_trace.open(path), [], FileBlock.column
    monkeypatch.setattr(FileBlock, "column", lambda self, *key: read.append(self.number) or column(self, *key))
    assert trace.request("a").counts().sum() == 16 * 2 * 4
    assert set(read) == {0}


def test_a_damaged_block_can_be_left_out(tmp_path):
    halves = [sb.rows_block(STEPS[:4], notes=NOTES), sb.rows_block(STEPS[4:], 1)]
    data = bytearray(sb.segment(halves, {"layers": sb.ledger()}))
    runs = next(entry.stored for entry in halves[1].entries if entry.head[0] == sb.RUNS)
    data[data.index(runs)] ^= 1
    path = tmp_path / "000000.moe"
    path.write_bytes(data)
    some, left_out = moe_trace.open(path).request("a"), []
    with pytest.raises(moe_trace.DamagedTrace):
        list(some.batches())
    (batch,) = some.batches(left_out)
    assert batch.rows == (REQUEST[STEP < 4] == 0).sum()
    assert left_out[0].startswith("48 rows are left out, their block is damaged: ") and len(left_out) == 1


def test_what_was_not_recorded_says_how_to_record_it(tmp_path):
    steps, _ = sb.make_steps([3], weights=False)
    path = tmp_path / "000000.moe"
    path.write_bytes(sb.segment([sb.rows_block(steps)]))
    for name, fields in (("weights", "ids,weights"), ("logits", "ids,weights,logits")):
        with pytest.raises(
            moe_trace.TraceError, match=f'{name} were .*MOE_NATIVE_FIELDS={fields} or Recorder.fields="{fields}"'
        ):
            getattr(moe_trace.open(path), name)
    with pytest.raises(moe_trace.TraceError, match="hidden was not recorded"):
        _ = moe_trace.open(path).hidden


def test_bad_arguments_say_what_is_there(trace):
    for call, words in (
        (lambda: trace.layer(17), r"layer 17.*0, 3"),
        (lambda: trace.phase("both"), "prefill"),
        (lambda: trace.modality("smell"), "text"),
    ):
        with pytest.raises((ValueError, moe_trace.TraceError), match=words):
            call()


def test_repr_says_what_is_selected(trace):
    assert str(trace.path) in repr(trace) and "90" not in repr(trace.layer(3).decode())
    text = repr(trace.layer(3).decode().request("a"))
    assert "3" in text and "decode" in text and "a" in text


@settings(max_examples=60, deadline=None)
@given(
    layer=st.sampled_from([0, 3]),
    phase=st.sampled_from([None, "prefill", "decode"]),
    requests=st.sets(st.sampled_from("abc")),
    steps=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    times=st.one_of(st.none(), st.tuples(st.integers(-1, 9), st.integers(-1, 9))),
)
def test_any_selection_is_its_mask(trace, layer, phase, requests, steps, times):
    one, mine = trace.layer(layer), np.ones(len(STEP), bool)
    if phase:
        one, mine = one.phase(phase), mine & (("prefill", "decode").index(phase) + 1 == CLASS & 3)
    if requests:
        one, mine = one.request(*requests), mine & np.isin(NAMES.astype(str), sorted(requests))
    one, mine = one.steps(*steps), mine & (steps[0] <= STEP) & (steps[1] > STEP)
    if times:
        t0, t1 = (STEPS[0].time_ns / SECOND + t for t in times)
        one, mine = one.between(t0, t1), mine & (t0 * SECOND <= TIME) & (t1 * SECOND > TIME)
    ids, weights = IDS[layer][mine], sb.of_rows(STEPS, layer, "weights")[mine]
    assert one.rows == mine.sum()
    assert np.array_equal(one.ids, ids) and np.array_equal(one.weights, weights)
    assert np.array_equal(one.counts(), np.bincount(ids.ravel(), minlength=60))
    sums = np.bincount(ids.ravel(), weights=weights.ravel().astype(np.float64), minlength=60)
    assert np.allclose(one.weight_sums(), sums, rtol=1e-12)
    assert np.array_equal(one.positions, POSITION[mine]) and np.array_equal(one.request_ids, NAMES[mine])
    stats = one.stats()
    assert (stats[layer].rows if layer in stats else 0) == mine.sum()
