"""What an accumulator is, and arrays that grow."""

from __future__ import annotations

import abc
from collections.abc import Hashable
from dataclasses import fields
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from moe_trace.analysis.part import Part
from moe_trace.metrics.arrays import Ints

_Key = TypeVar("_Key", bound=Hashable)


class Accumulator(abc.ABC):
    """Counts something over the rows of a trace, part by part. A dataclass: its settings are the fields of its
    constructor, the others are what it has counted.

    To write one, say what it reads of a part in `needs`, add a part, and merge what another of the same settings has
    counted of later rows. Whatever is added up must not depend on how the rows are divided: integers, or exact sums.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of a `Part`: some of `ids`, `weights`, `logits`, `requests`, `steps`, `times`, `phases`,
        `tokens`."""
        return frozenset(("ids",))

    @abc.abstractmethod
    def add(self, part: Part) -> None:
        """Count some more rows."""

    @abc.abstractmethod
    def merge(self, later: Self) -> None:
        """Add what another one counted of the rows that come after these."""

    def empty(self) -> Self:
        """One of the same settings that has counted nothing."""
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self) if f.init})  # type: ignore[arg-type]

    def notes(self) -> list[str]:
        """Sentences: what it left out, and why."""
        return []


def add_to(into: dict[_Key, Ints], key: _Key, counts: Ints) -> None:
    """Add counts to those of a key; where their shapes differ, the smaller ones get zeros at their ends."""
    old = into.get(key)
    if old is None:
        into[key] = counts.copy()
        return
    if old.shape != counts.shape:
        shape = tuple(map(max, old.shape, counts.shape))
        old, counts = (np.pad(a, [(0, n - m) for n, m in zip(shape, a.shape, strict=True)]) for a in (old, counts))
        into[key] = old
    old += counts


def with_room(array: npt.NDArray[Any], rows: int, fill: int) -> npt.NDArray[Any]:
    """The array, or a longer copy of it that has this many rows; new ones are filled. Doubled, so that growing costs
    little.
    """
    if rows <= len(array):
        return array
    longer = np.full((max(rows, 2 * len(array)), *array.shape[1:]), fill, array.dtype)
    longer[: len(array)] = array
    return longer
