"""Ranks whose process died, and how reading them and recovering them must agree."""

from __future__ import annotations

import json

import numpy as np
import ring_bytes as rb
import segment_bytes as sb

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
