"""Rings of dead processes, built by the tables of csrc/RING.md, read in memory and folded into segments by `recover`."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import ring_bytes as rb
import segment_bytes as sb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trace import myself

import moe_trace

META = {"model": "tiny", "layers": sb.ledger(), "weights_dtype": "float16", "fields": ["ids", "weights"]}


def request_notes(notes):
    data = b"".join(rb.note(rb.REQUEST, line["index"], line) for line in notes)
    return data, len(notes)


class Crash:
    """A rank whose process died: steps in a segment, steps in the ring."""

    def __init__(self, tmp_path, segments=(), owner=None, **ring):
        self.directory = tmp_path / "t" / "run-1" / "rank-0"
        self.trace = tmp_path / "t"
        self.ring = rb.RingFile(owner=owner or rb.dead_owner(), directory=self.directory, **ring)
        self.segments = list(segments)
        self.path = tmp_path / "moe-native-0.ring"

    def write(self, closed=False):
        entry = self.ring.write(self.path)
        sb.write_rank(self.directory, self.segments, metadata=META, owner=self.ring.owner, ring=entry, closed=closed)
        return self.trace


def check(trace, steps, layers=(0, 3)):
    assert trace.rows == sum(step.rows for step in steps)
    for layer in layers:
        one = trace.layer(layer)
        ids = sb.of_rows(steps, layer)
        assert np.array_equal(one.ids, ids)
        assert np.array_equal(one.counts(), np.bincount(ids.ravel(), minlength=60))
        assert np.array_equal(one.weights, sb.of_rows(steps, layer, "weights"))
        assert np.array_equal(one.prefill().ids, ids[sb.per_row(steps, "class") & 3 == 1])
    assert np.array_equal(trace.positions, sb.per_row(steps, "position"))
    assert np.array_equal(trace.step_numbers, np.repeat([s.number for s in steps], [s.rows for s in steps]))
    names = {0: "a", 1: "b", sb.NOBODY: None}
    assert trace.request_ids.tolist() == [names[i] for i in sb.per_row(steps, "request").tolist()]


def both_ways(crash, steps, **kw):
    """Reading the ring in memory and recovering it give the same; recovery can be repeated."""
    before = {p: p.read_bytes() for p in crash.trace.rglob("*") if p.is_file()} | {crash.path: crash.path.read_bytes()}
    trace = moe_trace.open(crash.trace)
    assert trace.state == "crashed"
    check(trace, steps, **kw)
    assert all(p.read_bytes() == content for p, content in before.items()), "opening writes nothing"
    report = moe_trace.recover(crash.trace)
    assert not crash.path.exists(), str(report)
    files = {p: p.read_bytes() for p in crash.trace.rglob("*") if p.is_file()}
    assert not [p for p in files if p.name.endswith(".open")]
    rank = json.loads((crash.directory / "rank.json").read_text())
    assert rank["closed"] is True and rank["ring"] is None and rank["metadata"] == META
    moe_trace.recover(crash.trace)
    assert files == {p: p.read_bytes() for p in crash.trace.rglob("*") if p.is_file()}, "recovery is idempotent"
    trace = moe_trace.open(crash.trace)
    assert trace.state == "closed"
    check(trace, steps, **kw)
    # The segments alone say the same, without rank.json.
    (crash.directory / "rank.json").unlink()
    check(moe_trace.open(crash.trace), steps, **kw)
    return report


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
    crash.segments = [segment] + ([sb.segment([], META, closed=False, number=1, ring_id=rb.RING_ID)] if closed_segments else [])
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
    """Records are freed without a block when the disk fails (counted as io_error). What a later record overwrote is no data."""
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
    assert sorted(set(trace.step_numbers.tolist())) == [0, 1, *range(35, 40)], "15 of the 16 records are five whole steps"
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
    blocks = [sb.rows_block(steps[:1], 0, notes=notes, lanes=[(0, 1, first)]), sb.fragment(big, [(0, 0, 20)], 1, lanes=[(0, first + 1, cut)])]
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


# Whose ring is it?


def test_the_ring_of_a_living_owner_is_left_alone(tmp_path):
    steps, notes = sb.make_steps([5])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ticks = int(open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[19])
        owner = {**myself(), "pid": child.pid, "start_ticks": ticks}
        crash = Crash(tmp_path, owner=owner)
        crash.ring.whole(steps[0], *request_notes(notes))
        crash.write()
        assert moe_trace.open(crash.trace).state == "live" and moe_trace.open(crash.trace).rows == 0
        moe_trace.recover(crash.trace)
        assert crash.path.exists()
        child.stdin.close()
        child.wait()
    assert moe_trace.open(crash.trace).rows == 5
    both_ways(crash, steps)


@pytest.mark.parametrize("owner", ["another boot", "finished", "reused pid"])
def test_signs_of_death(tmp_path, owner):
    steps, notes = sb.make_steps([5])
    dead = {"another boot": rb.dead_owner, "finished": rb.finished_process, "reused pid": lambda: {**myself(), "start_ticks": 1}}
    crash = Crash(tmp_path, owner=dead[owner]())
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    both_ways(crash, steps)


def test_a_lock_is_a_sign_of_life_where_process_ids_mean_nothing(tmp_path):
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, crash.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"locked\n"
        trace = moe_trace.open(crash.trace)
        assert trace.state == "live" and trace.rows == 0
        moe_trace.recover(crash.trace)
        assert crash.path.exists()
        child.stdin.close()
    both_ways(crash, steps)


def test_reading_ones_own_trace_keeps_the_lock(tmp_path):
    """Closing any descriptor of a file drops a process's locks on it, so the reader must not even open its own ring."""
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path, owner=myself())
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    probe = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b')\n"
        "try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except OSError: sys.exit(7)"
    )
    with open(crash.path, "r+b") as ring:
        fcntl.lockf(ring, fcntl.LOCK_EX)
        trace = moe_trace.open(crash.trace)
        assert trace.state == "live" and trace.rows == 0
        moe_trace.recover(crash.trace)
        assert subprocess.run([sys.executable, "-c", probe, crash.path]).returncode == 7, "still locked"


def test_a_ring_that_is_gone_is_told(tmp_path):
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path, [sb.segment([sb.rows_block(steps, notes=notes)], META, closed=False)])
    crash.write()
    crash.path.unlink()
    trace = moe_trace.open(crash.trace)
    check(trace, steps)
    assert not trace.complete and any("ring" in problem for problem in trace.problems)
    moe_trace.recover(crash.trace)
    trace = moe_trace.open(crash.trace)
    check(trace, steps)
    assert trace.state == "closed" and not trace.complete, "what is missing stays said"


def test_a_ring_of_another_is_left_alone(tmp_path):
    """A name may have been used again: rank.json names the ring's id as well."""
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    rank = json.loads((crash.directory / "rank.json").read_text())
    rank["ring"]["id"] = "0" * 15 + "1"
    (crash.directory / "rank.json").write_text(json.dumps(rank))
    assert moe_trace.open(crash.trace).rows == 0 and not moe_trace.open(crash.trace).complete
    moe_trace.recover(crash.trace)
    assert crash.path.exists(), "it is somebody else's"


def test_recovery_is_exactly_once_when_it_is_killed_on_its_way(tmp_path, monkeypatch):
    """Whatever system call a recoverer dies at, the next one finishes, and every row is there once."""
    steps, notes = sb.make_steps([5, 6, 7, 2, 9])
    calls = ("pwrite", "write", "rename", "replace", "unlink", "fdatasync", "fsync", "ftruncate", "mkstemp")
    for n in range(200):
        crash = Crash(tmp_path / str(n))
        (tmp_path / str(n)).mkdir()
        ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
        block = sb.rows_block(steps[:2], notes=notes, lanes=[(0, 1, ends[1])])
        crash.segments = [sb.segment([block], META, closed=False)]
        crash.write()
        count = 0

        class Killed(BaseException):
            pass

        def counting(call):
            def wrapped(*args, **kw):
                nonlocal count
                count += 1
                if count > n:
                    raise Killed
                return call(*args, **kw)

            return wrapped

        with monkeypatch.context() as patch:
            for name in calls:
                if hasattr(os, name):
                    patch.setattr(os, name, counting(getattr(os, name)))
            try:
                moe_trace.recover(crash.trace)
                finished = True
            except Killed:
                finished = False
        check(moe_trace.open(crash.trace), steps)
        moe_trace.recover(crash.trace)
        check(moe_trace.open(crash.trace), steps)
        assert not crash.path.exists() and moe_trace.open(crash.trace).state == "closed"
        if finished:
            assert n >= 3, "the calls of recovery were not counted"
            return
    pytest.fail("recovery never finished")


def _recover(path, start, errors):
    start.wait()
    try:
        moe_trace.recover(path)
    except BaseException as error:
        errors.put(repr(error))


def test_two_recoverers_do_not_race(tmp_path):
    steps, notes = sb.make_steps([5] * 12)
    crash = Crash(tmp_path, descriptors=64)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    crash.write()
    context = multiprocessing.get_context("fork")
    start, errors = context.Event(), context.Queue()
    workers = [context.Process(target=_recover, args=(crash.trace, start, errors)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert errors.empty()
    check(moe_trace.open(crash.trace), steps)
    assert sorted(p.name for p in crash.directory.iterdir()) == ["000000.moe", "rank.json"]


# Damage. A ring is a stranger's memory: whatever is in it, the reader says one error or whole steps.


def damaged(crash, data):
    crash.path.write_bytes(data)
    trace = moe_trace.open(crash.trace)
    found = {}
    try:
        numbers = trace.layer(0).step_numbers
        ids, problems = trace.layer(0).ids, trace.problems
        for number in set(numbers.tolist()):
            found[number] = ids[numbers == number]
        assert trace.layer(0).counts().sum() + trace.stats()[0].invalid == ids.size
        repr(trace), problems, trace.losses, trace.request_ids, trace.positions, trace.requests
    except moe_trace.TraceError as error:
        return {}, str(error)
    return found, None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_of_a_descriptor(tmp_path_factory, data):
    steps, notes = sb.make_steps([5, 6, 7])
    crash = Crash(tmp_path_factory.mktemp("d"), descriptors=16, arena_bytes=4096)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    crash.write()
    content = bytearray(crash.ring.bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = 8192 + data.draw(st.integers(0, 9 * 128 - 9))
        value = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 63)])))
        content[at : at + len(value)] = value
    damaged(crash, bytes(content))


def test_every_cut_of_a_ring_file(tmp_path):
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path, descriptors=16, arena_bytes=4096)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    crash.write()
    whole = crash.ring.bytes()
    for cut in [0, 1, 7, 8, 255, 256, 4095, 4096, 8191, 8192, 8192 + 128, len(whole) - 1]:
        crash.path.write_bytes(whole[:cut])
        trace = moe_trace.open(crash.trace)
        assert trace.rows == 0 and not trace.complete
    for at in range(256):
        content = bytearray(whole)
        content[at] ^= 0x55
        crash.path.write_bytes(content)
        trace = moe_trace.open(crash.trace)
        assert trace.rows == 0 and not trace.complete, at


def test_a_hostile_header(tmp_path):
    """Valid checksums, absurd sizes."""
    crash = Crash(tmp_path)
    crash.write()
    whole = crash.ring.bytes()
    for at, form, value in (
        (32, "<I", 0), (32, "<I", 0xFFFFFFFF), (36, "<I", 0), (36, "<I", 3), (36, "<I", 0x80000000), (40, "<Q", 1 << 63), (40, "<Q", 0),
        (48, "<Q", 1), (56, "<Q", 1 << 63), (64, "<Q", 1 << 63), (12, "<H", 2),
    ):  # fmt: skip
        content = bytearray(whole)
        struct.pack_into(form, content, at, value)
        struct.pack_into("<I", content, 252, zlib.crc32(content[:252]))
        crash.path.write_bytes(content)
        trace = moe_trace.open(crash.trace)
        assert trace.rows == 0 and not trace.complete, (at, value)
