"""Traces as directories: runs, ranks and segments, who wrote them, what was lost, and what cannot be read."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import ring_bytes as rb
import segment_bytes as sb

import moe_trace
from moe_trace import summary

META = {"model": "tiny", "layers": sb.ledger()}


def simple(first=0, sizes=(4, 2), requests=("a", "b"), number=0, closed=True, losses=(), blocks=None, seed=0, **kw):
    steps, notes = sb.make_steps(sizes, first=first, requests=requests, seed=seed)
    data = sb.segment(
        [sb.rows_block(steps, blocks or number, notes=notes, losses=losses)], META, number=number, closed=closed, **kw
    )
    return steps, data


def test_runs_ranks_and_segments_are_joined(tmp_path):
    expected = []
    for run, seed in (("run-20260101T000000Z-1", 1), ("run-20260102T000000Z-1", 2)):
        for rank in ("rank-0", "rank-1"):
            run_id = os.urandom(16)
            parts = [simple(3 * n, number=n, seed=10 * seed + n, run_id=run_id) for n in range(2)]
            sb.write_rank(tmp_path / "t" / run / rank, [data for _, data in parts], metadata=META, run_id=run_id)
            expected += [step for steps, _ in parts for step in steps]
    trace = moe_trace.open(tmp_path / "t")
    assert [len(run.ranks) for run in trace.runs] == [2, 2]
    assert trace.rows == 4 * 2 * 6 and trace.complete and trace.state == "closed"
    assert np.array_equal(trace.layer(3).ids, sb.of_rows(expected, 3))
    assert np.array_equal(trace.layer(3).counts(), np.bincount(sb.of_rows(expected, 3).ravel(), minlength=60))
    # A run and a rank can be opened alone.
    assert moe_trace.open(tmp_path / "t" / run).rows == 24
    assert moe_trace.open(tmp_path / "t" / run / "rank-1").rows == 12
    assert moe_trace.open(tmp_path / "t" / run / "rank-1" / "000001.moe").rows == 6
    assert moe_trace.open(str(tmp_path / "t" / run / "rank-1" / "000001.moe")).rows == 6


def test_request_indices_belong_to_their_rank(tmp_path):
    """The same index is another request elsewhere, and one name may have several indices."""
    a, one = simple(requests=("x", "y"), sizes=(4, 3, 5), seed=1)
    b, two = simple(requests=("y", "z"), sizes=(4, 3, 5), seed=2)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [one])
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-1", [two])
    steps, notes = sb.make_steps((4, 3, 5), requests=("z", "z"), seed=3)
    sb.write_rank(tmp_path / "t" / "run-2" / "rank-0", [sb.segment([sb.rows_block(steps, notes=notes)], META)])
    trace = moe_trace.open(tmp_path / "t")
    assert set(trace.requests) == {"x", "y", "z"}

    def rows(steps, index):
        return sb.of_rows(steps, 0)[sb.per_row(steps, "request") == index]

    assert np.array_equal(trace.layer(0).request("x").ids, rows(a, 0))
    assert np.array_equal(trace.layer(0).request("y").ids, np.concatenate([rows(a, 1), rows(b, 0)]))
    with pytest.warns(UserWarning, match="2 runs, run-1 to run-2"):
        both = trace.layer(0).request("z")
    assert np.array_equal(both.ids, np.concatenate([rows(b, 1), sb.of_rows(steps, 0)]))


def test_requests_of_one_name_in_two_runs_can_be_told_apart(tmp_path, monkeypatch):
    a, one = simple(requests=("0", "1"), sizes=(4, 3, 5), seed=1)
    b, two = simple(requests=("0", "2"), sizes=(6, 2), seed=2)
    for run, data in (("run-1", one), ("run-2", two)):
        sb.write_rank(tmp_path / "t" / run / "rank-0", [data], metadata=META)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.requests["0"].runs == ("run-1", "run-2") and trace.requests["1"].runs == ("run-1",)
    mine = [sb.of_rows(steps, 3)[sb.per_row(steps, "request") == 0] for steps in (a, b)]
    with pytest.warns(UserWarning, match="request '0' is in 2 runs") as said:
        both = trace.request("0").layer(3)
    assert said[0].filename == __file__
    assert np.array_equal(both.ids, np.concatenate(mine)), "no row is lost"
    assert [(batch.run, batch.rank, batch.rows) for batch in both.batches()] == [
        ("run-1", "rank-0", len(mine[0])),
        ("run-2", "rank-0", len(mine[1])),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for which, expected in (("run-1", mine[0]), (0, mine[0]), (-1, mine[1]), ("run-2", mine[1])):
            assert np.array_equal(trace.run(which).request("0").layer(3).ids, expected)
        trace.request("1", "2")
    assert trace.run(1).counts().sum() == trace.run(1).rows * 8 == 64 and "run-2" in repr(trace.run(1))
    assert trace.run(0).run(1).rows == 0
    for place in ("", "run-1", "run-1/rank-0"):
        monkeypatch.chdir(tmp_path / "t" / place)
        here = moe_trace.open(".")
        assert here.run(0).rows == here.run("run-1").rows == 12 and here.runs[0].name == "run-1"
        assert here.ranks[0].run == "run-1" and next(here.batches()).rank == "rank-0"
    for which in ("run-3", 2, -3):
        with pytest.raises(moe_trace.TraceError, match="run-1, run-2"):
            trace.run(which)


def test_a_live_trace(tmp_path):
    _, first = simple(0)
    steps, second = simple(2, number=1, closed=False)
    third = sb.rows_block(sb.make_steps([9], first=4)[0], 9).pack()
    torn = second + third[:-5]  # being written just now: the body comes before the header
    torn = second + bytes(128) + third[128:-5]
    rank = sb.write_rank(
        tmp_path / "t" / "run-1" / "rank-0", [first, torn], owner=rb.owner_of(os.getpid()), closed=False, metadata=META
    )
    trace = moe_trace.open(tmp_path / "t")
    assert (trace.state, trace.problems, trace.rows) == ("live", [], 12)
    assert np.array_equal(trace.layer(0).ids[6:], sb.of_rows(steps, 0))
    (rank / "000001.moe.open").write_bytes(second + third)
    assert moe_trace.open(tmp_path / "t").rows == 21
    assert trace.rows == 12, "a trace is what it was when it was opened"


def test_a_crashed_trace(tmp_path):
    steps, data = simple(closed=False)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], closed=False, metadata=META)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.state == "crashed" and trace.rows == 6
    assert np.array_equal(trace.layer(0).ids, sb.of_rows(steps, 0))


def test_torn_end_of_a_crashed_trace_is_told(tmp_path):
    _, data = simple(closed=False)
    more = sb.rows_block(sb.make_steps([9], first=2)[0], 1).pack()
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data + bytes(128) + more[128:999]], closed=False, metadata=META)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 6 and not trace.complete
    assert any("torn" in problem for problem in trace.problems)


def test_losses_are_counted_once_a_run_and_summed_over_ranks(tmp_path):
    """A block's losses are totals since the start of its run: the newest of a rank counts, not their sum."""
    parts = [simple(3 * n, number=n, losses=[(0, 2 + n, 48, 100), (2, 1, 24, 7)]) for n in range(3)]
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data for _, data in parts])
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-1", [simple(losses=[(0, 1, 24, 5)])[1]])
    trace = moe_trace.open(tmp_path / "t")
    found = {cause: (loss.steps, loss.layers, loss.rows) for cause, loss in trace.losses.items()}
    assert found == {"ring_full": (5, 72, 105), "aborted": (1, 24, 7)}
    assert not trace.complete and trace.problems == []


def test_the_coverage_ledger(tmp_path):
    layers = [
        *sb.ledger(),
        {"layer": 5, "name": "layers.5", "experts": 60, "top_k": 4, "status": "missed", "detail": "a fused kernel"},
        {"layer": 6, "name": "layers.6", "experts": 60, "top_k": 4, "status": "skipped", "detail": "not asked for"},
    ]
    _, data = simple()
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata={"layers": layers})
    trace = moe_trace.open(tmp_path / "t")
    assert [(e.layer, e.name, e.experts, e.top_k, e.status, e.detail) for e in trace.coverage] == [
        tuple(x.values()) for x in layers
    ]
    assert not trace.complete, "a missed layer makes a trace incomplete"
    assert trace.layers == (0, 3) == trace.layer([0, 3]).layers and len(trace.counts()) == 2
    for layer, why in ((5, "missed: a fused kernel"), (6, "skipped: not asked for"), (7, "not in")):
        for wanted in (layer, [0, layer]):
            with pytest.raises(moe_trace.TraceError, match=f"layer {layer} (was|is) {why}"):
                trace.layer(wanted)


def test_a_layer_that_one_run_missed_is_read_from_the_other(tmp_path):
    a, notes = sb.make_steps([4, 4], layers=(0,))
    b, _ = sb.make_steps([5, 5], layers=(0, 3), seed=1)
    missed = {**sb.ledger((3,))[0], "status": "missed", "detail": "it routes by itself"}
    for run, steps, ledger in (("run-1", a, [*sb.ledger((0,)), missed]), ("run-2", b, sb.ledger())):
        data = sb.segment([sb.rows_block(steps, notes=notes)], {"layers": ledger})
        sb.write_rank(tmp_path / "t" / run / "rank-0", [data], metadata={"layers": ledger})
    trace = moe_trace.open(tmp_path / "t")
    assert trace.layers == (0, 3) == tuple(trace.stats()) and len(trace.counts()) == 2
    assert np.array_equal(trace.layer(3).ids, sb.of_rows(b, 3))
    assert trace.run(0).layers == (0,) and trace.run(0).ids.shape == (8, 1, 4)
    with pytest.raises(moe_trace.TraceError, match="it routes by itself"):
        trace.run(0).layer(3)
    assert [(entry.layer, entry.status) for entry in trace.coverage] == [(0, "exact"), (3, "missed")]
    assert not trace.complete


def ledger_with(status, **more):
    return [*sb.ledger(), {**sb.ledger((9,))[0], "status": status, **more}]


@pytest.mark.parametrize("status", ["exact", "derived"])
def test_a_layer_without_a_row_is_missed_whatever_the_ledger_says(tmp_path, status):
    for name, more, steps in (("silent", {}, 2), ("some steps", {"every_step": False}, 2), ("no steps", {}, 0)):
        metadata = {"layers": ledger_with(status, **more)}
        data = sb.segment([sb.rows_block(simple()[0])] if steps else [], metadata)
        sb.write_rank(tmp_path / name / "run-1" / "rank-0", [data], metadata=metadata)
        trace = moe_trace.open(tmp_path / name)
        if name != "silent":
            assert trace.complete and trace.coverage[-1].status == status
            assert trace.layers == (0, 3, 9) and trace.layer(9).counts().tolist() == [0] * 60
            continue
        (entry,) = (entry for entry in trace.coverage if entry.status == "missed")
        assert entry.layer == 9 and entry.detail == "not one row in the 2 steps of run-1/rank-0"
        assert not trace.complete and trace.layers == (0, 3)
        with pytest.raises(moe_trace.TraceError, match="not one row"):
            trace.layer(9)


def test_what_is_damaged_may_have_had_the_rows(tmp_path):
    steps = simple()[0]
    data = bytearray(sb.segment([sb.rows_block(steps[:1]), sb.rows_block(steps[1:], 1)], META, closed=False))
    data[data.rfind(b"MOEB") + 130] ^= 1  # a directory
    metadata = {"layers": ledger_with("exact")}
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [bytes(data)], metadata=metadata, closed=False)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.coverage[-1].status == "exact" and "checksum" in " ".join(trace.problems)


def test_a_segment_of_another_recording_is_told(tmp_path):
    _, data = simple(run_id=bytes(16))
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata=META)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 6 and ["000000.moe is of another recording" in problem for problem in trace.problems] == [True]


def test_a_segment_that_its_process_gave_up_is_not_one_whose_process_died(tmp_path):
    """After an error of the disk the recorder leaves the segment as it is and begins another."""
    _, given_up = simple(closed=False)
    _, last = simple(3, number=1)
    for closed in (True, False):
        rank = sb.write_rank(tmp_path / f"{closed}" / "run-1" / "rank-0", [given_up, last], metadata=META)
        (rank / "000000.moe").rename(rank / "000000.moe.open")
        if not closed:
            (rank / "000001.moe").rename(rank / "000001.moe.open")
            (rank / "000001.moe.open").write_bytes(last[: len(last) - 300])
            rank_file = json.loads((rank / "rank.json").read_text())
            (rank / "rank.json").write_text(json.dumps({**rank_file, "closed": False}))
        trace = moe_trace.open(tmp_path / f"{closed}")
        said = ["gave it up after an error" if "gave it up" in problem else "died" for problem in trace.problems]
        assert said == ["gave it up after an error"] + ["died"] * (not closed)


def test_amendments_reach_rows_of_earlier_blocks_and_segments(tmp_path):
    steps, notes = sb.make_steps([4, 6])
    late, more = sb.make_steps([2], first=2)
    amend = [
        {"type": "amend", "step": 0, "row": 1, "count": 2, "set": ["rejected"]},
        {"type": "amend", "step": 1, "row": 5, "count": 100, "set": ["superseded", "discarded"]},
        {"type": "amend", "step": 77, "row": 0, "count": 1, "set": ["rejected"]},
        {"type": "amend", "step": 0, "row": -5, "count": 2, "set": ["discarded"]},
        {"type": "amend", "step": 1, "row": -5, "count": 6, "set": ["discarded"]},
        {"type": "amend", "step": 1, "row": 1, "count": -9, "set": ["discarded"]},
        {"type": "amend", "step": 1, "row": 10**40, "count": 10**50, "set": ["discarded"]},
    ]
    first = sb.segment([sb.rows_block(steps, notes=notes)], META)
    second = sb.segment([sb.rows_block(late, 1, notes=more + amend)], META, number=1)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [first, second])
    trace = moe_trace.open(tmp_path / "t")
    assert trace.flags.tolist() == [0, 2, 2, 0, 8, *[0] * 4, 12, 0, 0]


def test_times(tmp_path):
    steps, data = simple()
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data])
    trace = moe_trace.open(tmp_path / "t")
    assert (trace.first_time.timestamp(), trace.last_time.timestamp()) == (
        steps[0].time_ns / 1e9,
        steps[-1].time_ns / 1e9,
    )
    assert trace.first_time.tzinfo is not None


def test_a_segment_that_retention_deletes_after_the_listing_is_skipped(tmp_path, monkeypatch):
    parts = [simple(3 * n, number=n) for n in range(3)]
    rank = sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data for _, data in parts])
    listed = os.listdir
    # The listing still has the segment; the file is gone.
    os.remove(rank / "000000.moe")
    monkeypatch.setattr(
        os, "listdir", lambda path: sorted({*listed(path), "000000.moe"}) if str(path) == str(rank) else listed(path)
    )
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 12 and trace.problems == []


def test_a_mapping_outlives_its_file(tmp_path):
    steps, data = simple()
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data])
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 6
    shutil.rmtree(tmp_path / "t")
    assert np.array_equal(trace.layer(0).ids, sb.of_rows(steps, 0))


def test_a_trace_gives_its_mappings_back_at_once(tmp_path):
    _, data = simple()
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data])
    gc.disable()
    try:
        trace = moe_trace.open(tmp_path / "t")
        assert trace.rows == 6 and trace.layer(0).counts().sum() == 24
        gone = weakref.ref(trace)
        del trace
        assert gone() is None
    finally:
        gc.enable()


def test_the_oldest_segments_may_be_missing_but_not_one_between(tmp_path):
    parts = [simple(3 * n, number=n) for n in range(4)]
    rank = sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data for _, data in parts])
    os.remove(rank / "000000.moe")
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 18 and trace.problems == []
    os.remove(rank / "000002.moe")
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 12 and len(trace.problems) == 1


def test_layers_that_change_over_time(tmp_path):
    """A layer that a block lacks has no rows there: one layer is readable, several at once are refused."""
    one, notes = sb.make_steps([5], layers=(0, 3))
    two, _ = sb.make_steps([4], layers=(0,), first=1)
    data = sb.segment([sb.rows_block(one, 0, notes=notes), sb.rows_block(two, 1)], META)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data])
    trace = moe_trace.open(tmp_path / "t")
    assert trace.layer(0).rows == 9 and trace.layer(3).rows == 5 and trace.rows == 9
    assert np.array_equal(trace.layer(3).ids, sb.of_rows(one, 3))
    with pytest.raises(moe_trace.TraceError, match="one layer"):
        _ = trace.ids
    assert trace.counts().shape == (2, 60) and trace.counts().sum(1).tolist() == [36, 20]


# What cannot be read.


def test_nothing_there(tmp_path):
    with pytest.raises(moe_trace.TraceNotFound, match="nowhere"):
        moe_trace.open(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"x", b"\x89PNG\r\n\x1a\n" + bytes(500), b"MOERING1" + bytes(5000)])
def test_not_ours(tmp_path, content):
    path = tmp_path / "picture.moe"
    path.write_bytes(content)
    with pytest.raises(moe_trace.NotATrace, match="picture"):
        moe_trace.open(path)


def test_a_directory_of_other_things(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("hello")
    with pytest.raises(moe_trace.NotATrace, match="x"):
        moe_trace.open(tmp_path / "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(moe_trace.NotATrace, match="empty"):
        moe_trace.open(tmp_path / "empty")


@pytest.mark.parametrize("version", [{"major": 2}, {"incompatible": 4}])
def test_a_newer_version_is_refused_by_name(tmp_path, version):
    _, data = simple(**version)
    path = tmp_path / "000000.moe"
    path.write_bytes(data)
    with pytest.raises(moe_trace.UnsupportedVersion, match=r"(?s)version.*1.*[Uu]p(date|grade)"):
        moe_trace.open(path)
    # In a directory as well: rows that cannot be understood are never left out silently.
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data])
    with pytest.raises(moe_trace.UnsupportedVersion):
        moe_trace.open(tmp_path / "t").counts()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"format": "other"}',
        '{"format": "moe-native rank", "version": 1, "owner": 7, "ring": []}',
        "\0" * 50,
        "[" * 100_000,
    ],
)
def test_a_broken_rank_file_costs_no_rows(tmp_path, content):
    steps, data = simple()
    rank = sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data])
    (rank / "rank.json").write_text(content)
    trace = moe_trace.open(tmp_path / "t")
    assert np.array_equal(trace.layer(0).ids, sb.of_rows(steps, 0))
    assert trace.metadata["model"] == "tiny", "of the segment"


def test_a_damaged_segment_between_whole_ones(tmp_path):
    parts = [simple(3 * n, number=n) for n in range(3)]
    data = [data for _, data in parts]
    data[1] = b"MOETRACE" + bytes(len(data[1]) - 8)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", data)
    trace = moe_trace.open(tmp_path / "t")
    assert trace.rows == 12 and not trace.complete
    assert "000001.moe" in " ".join(trace.problems)


def test_hostile_metadata(tmp_path):
    for metadata in (
        b"[1, 2]",
        b"[" * 200_000,
        b"\xff\xfe",
        b'{"layers": 7}',
        b'{"layers": [7, {"layer": "x"}, {"layer": -1}, {}]}',
        b"{",
    ):
        steps, notes = sb.make_steps([4])
        path = tmp_path / "000000.moe"
        path.write_bytes(sb.segment([sb.rows_block(steps, notes=notes)], metadata))
        trace = moe_trace.open(path)
        assert np.array_equal(trace.layer(0).ids, sb.of_rows(steps, 0))
        repr(trace), trace.problems, trace.layers, trace.coverage, trace.complete


def test_reading_needs_neither_torch_nor_the_recorder(tmp_path):
    _, data = simple()
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data])
    code = (
        "import sys, moe_trace; t = moe_trace.open(sys.argv[1]); t.layer(0).ids; t.counts(); "
        "assert not {'torch', 'moe_native', 'vllm', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], check=True)


def test_nothing_is_written(tmp_path):
    _, data = simple(closed=False)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], closed=False)

    def state():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}

    before = state()
    trace = moe_trace.open(tmp_path / "t")
    trace.layer(0).ids, trace.counts(), trace.problems
    assert state() == before


def test_repr(tmp_path):
    _, data = simple()
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata=META)
    text = repr(moe_trace.open(tmp_path / "t"))
    assert "6" in text and "tiny" in text and "closed" in text
    assert json.loads((tmp_path / "t" / "run-1" / "rank-0" / "rank.json").read_text())["metadata"]["model"] == "tiny"


def test_segments_that_retention_deleted_are_counted(tmp_path):
    _, data = simple(number=8)
    directory = sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata=META)
    assert moe_trace.open(tmp_path / "t").deleted_segments == 0
    assert moe_trace.open(tmp_path / "t").whole_since is None
    (directory / "000000.moe").rename(directory / "000008.moe")
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.deleted_segments == 8 and trace.whole_since == trace.first_time
    assert repr(trace).endswith("6 rows x 2 layers, 1 run, closed, complete but for deleted segments>")
    assert moe_trace.open(directory / "000008.moe").deleted_segments == 0, "one file was asked for"
    of = summary.standing(trace)
    assert of["deleted_segments"] == 8 and of["whole_since"] == of["first_time"] and of["complete"]


def test_a_segment_without_its_end_says_how_much_is_there(tmp_path):
    _, data = simple()
    (tmp_path / "000000.moe").write_bytes(data[:-8])
    assert "1 block readable, up to byte " in moe_trace.open(tmp_path / "000000.moe").problems[0]
    (tmp_path / "000000.moe").write_bytes(data[: len(data) // 3])
    assert "0 blocks readable, up to byte " in moe_trace.open(tmp_path / "000000.moe").problems[0]


def test_what_is_no_file(tmp_path):
    with pytest.raises(moe_trace.NotATrace, match="/dev/null is no trace: it is neither"):
        moe_trace.open("/dev/null")
