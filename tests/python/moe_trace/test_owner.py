"""Whose ring is it? A living owner's ring is left alone, by every sign of life."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import ring_bytes as rb
import segment_bytes as sb
from crashes import META, Crash, both_ways, check, request_notes

import moe_trace
from moe_trace import owner


def files(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@contextmanager
def held_by_another(directory):
    """Another process that holds the directory as a recorder does."""
    code = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
        "print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"held\n"
        yield
        child.stdin.close()


def test_an_owner_of_whom_only_the_directory_is_seen_is_left_alone(tmp_path):
    """As from another container: its process id means nothing here, its ring lies in a /dev/shm of its own."""
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path, [sb.segment([sb.rows_block(steps[:1], notes=notes)], META, closed=False)])
    crash.ring.whole(steps[1])
    crash.write()
    hidden = crash.path.rename(tmp_path / "not seen")
    with held_by_another(crash.directory):
        before = files(crash.trace)
        trace = moe_trace.open(crash.trace)
        assert (trace.state, trace.rows, trace.problems) == ("live", 5, [])
        report = moe_trace.recover(crash.trace)
        assert (report.ranks, report.problems) == ([], []) and files(crash.trace) == before
        hidden.rename(crash.path)
    both_ways(crash, steps)


def test_whether_an_owner_lives_is_asked_without_keeping_its_lock(tmp_path):
    crash = Crash(tmp_path)
    crash.write()
    assert moe_trace.open(crash.trace).state == "crashed"
    with owner.hold(crash.directory) as mine:
        assert mine and owner.held(crash.directory)
        with owner.hold(crash.directory) as second:
            assert not second
        assert moe_trace.open(crash.trace).state == "live", "of whoever recovers it"
    assert not owner.held(crash.directory)


def test_a_reader_that_looks_does_not_keep_a_recovery_away(tmp_path, monkeypatch):
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    reader = os.open(crash.directory, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    pauses = []

    def reader_is_done(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            fcntl.flock(reader, fcntl.LOCK_UN)

    monkeypatch.setattr(owner.time, "sleep", reader_is_done)
    assert moe_trace.recover(crash.trace).ranks == [crash.directory] and 0 < sum(pauses) < 0.1
    os.close(reader)
    check(moe_trace.open(crash.trace), steps)


def test_where_nobody_can_lock_nothing_is_touched(tmp_path, monkeypatch):
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(owner.fcntl, "flock", unsupported)
    before = files(tmp_path)
    check(moe_trace.open(crash.trace), steps)  # readers go by the other signs
    (problem,) = moe_trace.recover(crash.trace).problems
    assert str(crash.directory) in problem and "cannot be locked (Operation not supported)" in problem
    assert files(tmp_path) == before


def test_the_ring_of_a_living_owner_is_left_alone(tmp_path):
    steps, notes = sb.make_steps([5])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        crash = Crash(tmp_path, owner=rb.owner_of(child.pid))
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
    dead = {
        "another boot": rb.dead_owner,
        "finished": rb.finished_process,
        "reused pid": lambda: {**rb.owner_of(os.getpid()), "start_ticks": 1},
    }
    crash = Crash(tmp_path, owner=dead[owner]())
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    both_ways(crash, steps)


def test_a_lock_is_a_sign_of_life_where_process_ids_mean_nothing(tmp_path):
    steps, notes = sb.make_steps([5])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.write()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('locked', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, crash.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
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
    crash = Crash(tmp_path, owner=rb.owner_of(os.getpid()))
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
