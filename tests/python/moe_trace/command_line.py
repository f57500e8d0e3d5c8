"""The command in a process of its own, as a user runs it, and the trace that most of its tests give it."""

from __future__ import annotations

import os
import subprocess
import sys

import segment_bytes as sb

LAYERS = (0, 1, 5)
META = {
    "model": "tiny-moe",
    "device": "cpu",
    "seed": 1234,
    "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
    "fields": ["ids", "weights"],
    "layers": sb.ledger(LAYERS),
}
MISSED = {"layer": 7, "name": "layers.7", "experts": 60, "top_k": 4, "status": "missed", "detail": "a fused kernel"}
STEPS, NOTES = sb.make_steps([40, 5, 9, 1, 30, 2, 8, 8], layers=LAYERS, requests=("a", "b", "ü\n"))
ENV = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8", "NO_COLOR": ""}
ENV.pop("NO_COLOR")


def blocks(losses=()):
    return [sb.rows_block(STEPS[:4], 0, notes=NOTES), sb.rows_block(STEPS[4:], 1, losses=losses)]


def write(path, *, metadata=META, losses=(), segments=None, **rank):
    segments = segments or [sb.segment(blocks(losses), metadata)]
    sb.write_rank(path / "run-20270115T080000Z-1" / "rank-0", segments, metadata=metadata, **rank)
    return path


def write_lossy(path):
    metadata = {**META, "layers": [*META["layers"], MISSED]}
    return write(path, metadata=metadata, losses=[(0, 3, 9, 70)])


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "moe_trace", *map(str, arguments)], capture_output=True, text=True, env=ENV, **options
    )


def ok(*arguments, code=0, **options):
    done = run(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""
    return done.stdout


def failed(*arguments, code):
    """One line on stderr, no traceback, nothing on stdout; argparse adds its usage before the line."""
    done = run(*arguments)
    assert done.returncode == code
    assert done.stdout == "" and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 or (code == 2 and lines[0].startswith("usage:"))
    return lines[-1]
