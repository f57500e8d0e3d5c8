"""Rows that are still in a ring are counted with those of the segments, of a crashed trace and of a live one."""

from __future__ import annotations

import time
from unittest import mock

import numpy as np
import pytest
import ring_bytes as rb
import segment_bytes as sb
from analysis_traces import in_turn
from crashes import META, Crash, request_notes

import moe_trace
from moe_trace import analysis
from moe_trace.analysis import one_pass


def crashed(tmp_path):
    """Two blocks in a segment and three steps in the ring: (the trace, all steps)."""
    steps, notes = sb.make_steps([5, 3, 1, 4, 2, 6, 1])
    crash = Crash(tmp_path)
    ends = [crash.ring.whole(step, *request_notes(notes if step.number == 0 else [])) for step in steps]
    blocks = [
        sb.rows_block(steps[:2], 0, notes=notes, lanes=[(0, 1, ends[1])]),
        sb.rows_block(steps[2:4], 1, lanes=[(0, 1, ends[3])]),
    ]
    crash.segments = [sb.segment(blocks, META, closed=False, ring_id=rb.RING_ID)]
    return crash.write(), steps


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_ring_of_a_dead_process_is_counted(tmp_path, jobs):
    path, steps = crashed(tmp_path)
    trace = moe_trace.open(path)
    assert trace.state == "crashed" and trace.rows == sum(step.rows for step in steps)
    distinct, requests = analysis.DistinctExperts(), analysis.RequestCounts()
    with mock.patch.object(one_pass, "_in_processes", in_turn):
        assert analysis.fill(trace, distinct, requests, jobs=jobs) == []
    for layer in (0, 3):
        assert requests.counts(layer).sum() == 4 * trace.rows
        np.testing.assert_array_equal(
            requests.counts(layer).sum(axis=0), np.bincount(sb.of_rows(steps, layer).ravel(), minlength=60)
        )
        rows, number, _, _ = distinct.table(layer)
        sizes, often = np.unique([step.rows for step in steps], return_counts=True)
        assert rows.tolist() == sizes.tolist() and number.tolist() == often.tolist()


def test_a_live_trace_is_counted_as_far_as_it_was_when_it_was_opened(tmp_path):
    moe_native = pytest.importorskip("moe_native", reason="only the recorder makes a live trace")
    ids = np.arange(8, dtype=np.int32).reshape(4, 2)
    with moe_native.Recorder(tmp_path / "t", flush_seconds=0.05) as recorder:
        binding = recorder.bind(layer=0, experts=8, top_k=2)
        import torch

        def step():
            with recorder.step(requests=["a"], positions=[range(4)], prompt_lens={"a": 4}):
                recorder.record(binding, torch.from_numpy(ids), torch.ones(4, 2) / 2)

        step()
        deadline = time.monotonic() + 30
        while not (tmp_path / "t").exists() or not moe_trace.open(tmp_path / "t").stored_rows:
            assert time.monotonic() < deadline, "nothing was flushed"
            time.sleep(0.05)
        trace = moe_trace.open(tmp_path / "t")
        assert trace.state == "live"
        step()
        recorder.flush()
        found = analysis.RequestCounts()
        assert analysis.fill(trace, found) == [] and found.counts(0).sum() == 8
        again = analysis.RequestCounts()
        analysis.fill(moe_trace.open(tmp_path / "t"), again)
        assert again.counts(0).sum() == 16
