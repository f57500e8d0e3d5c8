"""Counts over time from the statistics of blocks: only rows of blocks that an edge cuts are read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_trace.joined import groups
from moe_trace.metrics.arrays import Floats, Ints
from moe_trace.select import Selection

WINDOWS = 48
STEPS_EACH = 4  # in a window, on average: with fewer, windows without any would look like a pause


def counts_over_time(
    selection: Selection, most: int = WINDOWS, progress: Callable[[int], Any] | None = None
) -> tuple[Floats, dict[int, Ints], list[str]]:
    """The counts of a selection in equally long windows of time, from its first step to its last: `most` of them, or
    so few that there are `STEPS_EACH` steps to a window. Of everything that was executed, stored or not; of the rows
    that are stored, `UsageOverTime` counts windows of a given length.

    progress: called with a number of rows each time that so many more were counted.

    Returns the edges, float64 `[windows + 1]` in seconds since the first step; for each layer int64 `[windows,
    experts]`; and what has to be said of them: a sentence where rows that are counted and not stored could not be cut
    at an edge, and are in each window that their block reaches into.

    Raises ValueError where there is no step, or all steps began at the same time.
    """
    spans = [times for rank in selection._ranks if len(times := rank.times())]
    first, last = (min(int(t[0]) for t in spans), max(int(t[1]) for t in spans)) if spans else (0, 0)
    asked = selection._asked
    first = first if asked.first_ns is None else max(first, asked.first_ns)
    last = last if asked.end_ns is None else min(last, asked.end_ns - 1)
    if last <= first:
        raise ValueError("there is no time to show: fewer than two steps, or all of them began at once")
    steps = sum(
        block.last_step - block.first_step + 1
        for rank in (group[0][0] for group in groups(selection._ranks))
        for block in rank.blocks()
        if not asked.misses(block.first_time_ns, block.last_time_ns, block.first_step, block.last_step)
    )
    number = min(max(steps // STEPS_EACH, 2), most)
    edges = np.array([first + (last + 1 - first) * i // number for i in range(number + 1)])
    into: dict[int, list[Ints]] = {layer: [] for layer in selection.layers}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            of_window = selection._between(start, end).stats()
            for layer, stats in of_window.items():
                into[layer].append(stats.counts)
            if progress is not None:
                progress(max((stats.rows for stats in of_window.values()), default=0))
    lack = "rows that are counted and not stored are in each window that their block reaches into" if said else ""
    return (edges - first) / 1e9, {layer: _stacked(counts) for layer, counts in into.items()}, [lack] if lack else []


def _stacked(counts: Sequence[Ints]) -> Ints:
    out = np.zeros((len(counts), max(map(len, counts))), np.int64)
    for row, of_one in zip(out, counts, strict=True):
        row[: len(of_one)] = of_one
    return out
