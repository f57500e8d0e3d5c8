"""What pictures and the report count from rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from moe_trace import Selection
    from moe_trace.analysis import Accumulator

Ints = npt.NDArray[np.int64]


def count(
    selection: Selection, *accumulators: Accumulator, jobs: int = 1, progress: Callable[[int], Any] | None = None
) -> list[str]:
    """`analysis.fill`, without its note that not all rows are stored, which every summary says."""
    from moe_trace.analysis import fill  # for the help of `moe-native plot`, which lists kinds, too much

    notes = fill(selection, *accumulators, jobs=jobs, progress=progress)
    trace = selection._trace
    if trace.executed_rows > trace.stored_rows:
        notes = [note for note in notes if "are stored: what is analysed" not in note]
    return notes


def pairs(selection: Selection, layer: int, experts: int) -> tuple[Ints, list[str]]:
    """How many stored rows of a layer chose both of two experts, int64 `[experts, experts]` with the rows of each on
    the diagonal (`analysis.Coactivation`), and the notes of `count` on rows that had to be left out.
    """
    from moe_trace.analysis import Coactivation

    together = Coactivation()
    notes = count(selection.layer([layer]), together)
    return padded(together.counts.get(layer), experts), notes


def padded(counts: Ints | None, experts: int) -> Ints:
    """Pairs of a layer as `[experts, experts]`, zeros where there are none."""
    found = np.zeros((0, 0), np.int64) if counts is None else counts
    return np.pad(found, (0, experts - len(found)))
