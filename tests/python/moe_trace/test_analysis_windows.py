"""Counts over time against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import segment_bytes as sb
import skewed

import moe_trace
from moe_trace.analysis import counts_over_time, windows


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return moe_trace.open(skewed.write(tmp_path_factory.mktemp("windows") / "t", experts=12, k=3, layers=[2, 5]))


def test_windows_are_the_counts_of_their_times(trace):
    edges, counts, said = counts_over_time(trace)
    steps = 12 + 20
    assert said == [] and len(edges) == 1 + steps // windows.STEPS_EACH and edges[0] == 0
    assert edges[-1] == pytest.approx(steps - 1)  # seconds: a step each
    np.testing.assert_allclose(np.diff(edges), edges[-1] / (len(edges) - 1))
    began = (trace.times - trace.times.min()) / np.timedelta64(1, "s")
    for place, layer in enumerate(trace.layers):
        for number in range(len(edges) - 1):
            inside = (began >= edges[number]) & (began < edges[number + 1])
            expected = np.bincount(trace.ids[inside, place].ravel(), minlength=12)
            np.testing.assert_array_equal(counts[layer][number], expected)
        np.testing.assert_array_equal(counts[layer].sum(axis=0), trace.layer(layer).counts())


def test_windows_keep_to_the_selection(trace):
    start, end = trace.times.min() + np.timedelta64(5, "s"), trace.times.min() + np.timedelta64(21, "s")
    edges, counts, _ = counts_over_time(trace.layer([5]).decode().between(start, end))
    assert list(counts) == [5] and edges[-1] <= 16
    chosen = trace.layer(5).decode().between(start, end)
    assert counts[5].sum() == chosen.counts().sum() > 0


def test_windows_of_rows_that_are_only_counted_say_so(tmp_path):
    steps, _ = sb.make_steps([6] * 12, layers=[0])
    blocks = [sb.sampled_block(steps[:6], set(), 0), sb.sampled_block(steps[6:], set(), 1)]
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment(blocks, {"layers": sb.ledger([0])})])
    _, counts, said = counts_over_time(moe_trace.open(tmp_path))
    assert counts[0].sum() >= 12 * 6 * 4
    (sentence,) = said
    assert "each window that their block reaches into" in sentence


def test_no_time_to_show(tmp_path):
    steps, notes = sb.make_steps([6], layers=[0])
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([sb.rows_block(steps, notes=notes)])])
    with pytest.raises(ValueError, match="there is no time to show"):
        counts_over_time(moe_trace.open(tmp_path))


def test_progress_is_told_of_every_row(trace):
    told = []
    counts_over_time(trace, progress=told.append)
    assert sum(told) == trace.rows and len(told) > 1
