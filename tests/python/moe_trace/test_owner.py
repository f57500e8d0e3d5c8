"""Whose ring is it? A living owner's ring is left alone, by every sign of life."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys

import pytest
import ring_bytes as rb
import segment_bytes as sb
from crashes import META, Crash, both_ways, check, request_notes

import moe_trace


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
