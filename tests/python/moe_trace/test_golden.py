"""What the C++ recorder once wrote is read as it was written, by every later reader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import moe_trace

GOLDEN = Path(__file__).parents[2] / "golden"


def test_the_golden_trace_is_read_as_it_was_written():
    command = [sys.executable, GOLDEN / "check.py", GOLDEN / "trace"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_its_losses_and_its_hole_are_told():
    trace = moe_trace.open(GOLDEN / "trace")
    assert trace.losses["aborted"].steps == 1 and trace.losses["aborted"].rows == 3
    assert [layer.detail for layer in trace.coverage if layer.status == "missed"] == ["its kernel hides the routing"]
    assert (trace.layer(0).flags & 2).astype(bool).tolist() == [False] * 8 + [True] + [False] * 4
    assert trace.state == "closed" and trace.problems == [] and not trace.complete
