"""A block of rows: whole steps, each layer with the same rows. In a segment file, or made from a ring."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.errors import DamagedTrace
from moe_trace.statistics import LayerStats

_FLOATS = frozenset((4, 5, 6))
#: The dtypes that a field may have.
DTYPES = {fmt.IDS: {1, 2}, fmt.WEIGHTS: _FLOATS, fmt.LOGITS: _FLOATS, fmt.HIDDEN: _FLOATS, fmt.TOKENS: {3}}


@dataclass(frozen=True)
class Piece:
    """Rows [first_row, first_row + rows) of one column of a step, and how to get them."""

    field: int
    layer: int
    dtype: int
    width: int
    first_row: int
    rows: int
    load: Callable[[], npt.NDArray[Any]]


class Block(abc.ABC):
    """What every block offers, wherever it lies. Tables are read when they are first asked for.

    Attributes:
        first_step, last_step: numbers of its steps (with gaps where steps were lost).
        first_time_ns, last_time_ns: Unix times at which they started.
        rows: tokens that are stored.
        executed_rows: tokens that its statistics count: all that its steps executed.
        complete: False for the step in which the process died, whose rows are nobody's.
        steps, runs: the tables *steps* and *runs*.
        notes: the lines of JSON that travel with the steps.
    """

    first_step: int
    last_step: int
    first_time_ns: int
    last_time_ns: int
    rows: int
    executed_rows: int
    complete: bool = True
    steps: Any
    runs: Any
    notes: Any

    @property
    @abc.abstractmethod
    def columns(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(field, layer) of every column, with its (dtype code, width)."""

    def has(self, field: int, layer: int) -> bool:
        """Whether the block has a column."""
        return (field, layer) in self.columns

    def shape(self, field: int, layer: int) -> tuple[int, int]:
        """dtype code and width of a column. Raises KeyError when the block has no such column."""
        return self.columns[field, layer]

    @abc.abstractmethod
    def column(self, field: int, layer: int) -> npt.NDArray[Any]:
        """One column `[rows, width]`. Raises KeyError when the block has no such column, DamagedTrace when it is
        damaged.
        """

    @abc.abstractmethod
    def add_statistics(self, into: dict[int, LayerStats], wanted: Callable[[int, int], bool]) -> None:
        """Add the totals of each layer and class for which `wanted(layer, class)` holds."""

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have rows here, ascending."""
        return tuple(sorted(layer for field, layer in self.columns if field == fmt.IDS))

    @property
    def counted_layers(self) -> frozenset[int]:
        """The layers that its statistics count rows of."""
        return frozenset(self.layers)


def check_runs(steps: npt.NDArray[Any], runs: npt.NDArray[Any]) -> None:
    """Raises DamagedTrace unless the runs of each step add up to its rows."""
    run_ends = np.cumsum(runs["count"].astype(np.uint64))
    step_ends = np.cumsum(steps["runs"].astype(np.uint64))
    if int(step_ends[-1] if len(steps) else 0) != len(runs):
        raise DamagedTrace("the runs of a block are not those of its steps")
    rows = np.concatenate((np.zeros(1, np.uint64), run_ends))[step_ends]
    if not np.array_equal(rows, np.cumsum(steps["rows"].astype(np.uint64))):
        raise DamagedTrace("the runs of a step do not add up to its rows")
