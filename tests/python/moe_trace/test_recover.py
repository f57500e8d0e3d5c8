"""Recovery is exactly-once: killed anywhere on its way, or raced by others."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import ring_bytes as rb
import segment_bytes as sb
from crashes import META, Crash, both_ways, check, request_notes

import moe_trace


class Killed(BaseException):
    pass


def _dies(call, left):
    """A system call that ends the process once `left` is used up."""

    def wrapped(*args, **kwargs):
        if next(left, None) is None:
            raise Killed
        return call(*args, **kwargs)

    return wrapped


def _recovers(path, monkeypatch, calls):
    """Recovery by a process that dies at a system call, after so many. Returns whether it finished before."""
    left = iter(range(calls))
    with monkeypatch.context() as patch:
        for name in ("pwrite", "rename", "replace", "unlink", "fdatasync"):
            patch.setattr(os, name, _dies(getattr(os, name), left))
        try:
            moe_trace.recover(path)
        except Killed:
            return False
    return True


def _in_a_segment(steps, notes, ends):
    return [sb.rows_block(steps[:2], notes=notes, lanes=[(0, 1, ends[1])])]


def _with_a_fragment(steps, notes, ends):
    """Of the third step, layer 0 has left the ring already."""
    fragment = sb.fragment(steps[2], [(0, 0, steps[2].rows)], 1, lanes=[(0, ends[1] + 1, ends[1] + 1)])
    return [*_in_a_segment(steps, notes, ends), fragment]


@pytest.mark.parametrize("written", [_in_a_segment, _with_a_fragment])
def test_recovery_is_exactly_once_when_it_is_killed_on_its_way(tmp_path, monkeypatch, written):
    """Whatever system call a recoverer dies at, the next one finishes, and every row is there once: for whoever opens
    the trace then, and for whoever had it open.
    """
    steps, notes = sb.make_steps([5, 6, 7, 2, 9])
    for n in range(200):
        crash = Crash(tmp_path / str(n))
        (tmp_path / str(n)).mkdir()
        ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps)]
        crash.segments = [sb.segment(written(steps, notes, ends), META, closed=False)]
        crash.write()
        readers = [moe_trace.open(crash.trace) for _ in range(3)]
        assert readers[0].state == "crashed" and len(readers[1].ranks[0].segments) == 1
        check(readers[2], steps)
        finished = _recovers(crash.trace, monkeypatch, n)
        check(moe_trace.open(crash.trace), steps)
        check(readers[n % 2], steps)
        moe_trace.recover(crash.trace)
        for trace in (moe_trace.open(crash.trace), *readers):
            check(trace, steps)
        assert not crash.path.exists() and moe_trace.open(crash.trace).state == "closed"
        if finished:
            assert n >= 3, "the calls of recovery were not counted"
            return
    pytest.fail("recovery never finished")


def _last_in_the_ring(ring, steps):
    """Layer 0 is whole, layer 3 is not."""
    ring.layer(steps[2], 0)
    ring.layer(steps[2], 3, 0, 4)


def _last_in_a_fragment(ring, steps):
    _last_in_the_ring(ring, steps)
    last = ring.sequence[0]
    return [sb.fragment(steps[2], [(0, 0, 7), (3, 0, 4)], 1, lanes=[(0, last - 1, last)])]


@pytest.mark.parametrize("cut", [_last_in_the_ring, _last_in_a_fragment])
def test_a_recovery_that_is_killed_on_its_way_keeps_what_was_said(tmp_path, monkeypatch, cut):
    """Of the step in which the process died, and of the layer of which it lacks rows."""
    steps, notes = sb.make_steps([5, 6, 7])
    for n in range(200):
        crash = Crash(tmp_path / str(n))
        (tmp_path / str(n)).mkdir()
        ends = [crash.ring.whole(step, *request_notes(notes if i == 0 else [])) for i, step in enumerate(steps[:2])]
        blocks = [*_in_a_segment(steps, notes, ends), *(cut(crash.ring, steps) or ())]
        crash.segments = [sb.segment(blocks, META, closed=False)]
        crash.ring.lose("ring_full", 1, 2, 9)
        crash.write()
        finished = _recovers(crash.trace, monkeypatch, n)
        for _ in range(2):
            trace = moe_trace.open(crash.trace)
            assert len(trace.problems) == 1 and "died inside step 2" in trace.problems[0]
            lost = {"ring_full": moe_trace.Loss(1, 2, 9), "incomplete": moe_trace.Loss(0, 1, 7)}
            assert trace.losses == lost and trace.layer(0).rows == 18 and trace.layer(3).rows == 11
            moe_trace.recover(crash.trace)
        if finished:
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


def test_a_reader_that_has_the_trace_open_does_not_mind(tmp_path):
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    crash.write()
    trace = moe_trace.open(crash.trace)
    assert trace.state == "crashed"
    moe_trace.recover(crash.trace)
    check(trace, steps)
    assert trace.complete and moe_trace.open(crash.trace).state == "closed"


@pytest.mark.parametrize("torn", [40, 96, 1000, (1 << 20) + 7])
def test_a_segment_that_a_reader_has_mapped_never_gets_shorter(tmp_path, torn):
    """Whoever touches a mapped page that was cut off gets SIGBUS. What was torn becomes padding."""
    steps, notes = sb.make_steps([5, 6, 7])
    crash = Crash(tmp_path, [sb.segment([sb.rows_block(steps[:2], notes=notes)], META, closed=False)])
    crash.segments[0] += bytes(128) + os.urandom(torn)  # the body of a block; its header was still to come
    crash.ring.whole(steps[2])
    crash.write()
    path = crash.directory / "000000.moe.open"
    trace = moe_trace.open(path)
    assert trace.rows == 11 and trace.problems
    moe_trace.recover(crash.trace)
    closed = path.with_suffix("")
    assert closed.stat().st_size >= len(crash.segments[0])
    assert trace.rows == 11 and trace.problems
    again = moe_trace.open(closed)
    check(again, steps)
    assert again.complete and again.ranks[0].segments[0].closed
    (closed.parent / "rank.json").unlink()
    check(moe_trace.open(crash.trace), steps)


def test_a_report_says_what_was_done():
    directory = Path("t/run-1/rank-0")
    assert str(moe_trace.Recovery()) == "nothing to recover: no process of this trace died"
    one = moe_trace.Recovery([directory], 1, 1)
    assert str(one) == "recovered 1 step (1 row) of a process that died"
    two = moe_trace.Recovery([directory] * 2, 1000, 2000, ["it is torn"])
    assert str(two) == "recovered 1,000 steps (2,000 rows) of 2 processes that died\nit is torn"
    assert str(moe_trace.Recovery(problems=["no lock"])) == "nothing was recovered\nno lock"


@pytest.mark.parametrize("padded", [False, True])
def test_a_segment_that_was_killed_before_its_first_block(tmp_path, padded):
    """Its metadata end anywhere; blocks start at multiples of 64."""
    steps, notes = sb.make_steps([5, 4])
    crash = Crash(tmp_path)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    data = sb.segment([], META, closed=False, ring_id=rb.RING_ID)
    end = 128 + int.from_bytes(data[80:84], "little")
    assert end % 64 != 0 and data[end:].strip(b"\0") == b""
    crash.segments = [data if padded else data[:end]]
    crash.write()
    both_ways(crash, steps)
