"""How experts are used by groups of requests, in memory that does not grow with their number."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from moe_trace import metrics
from moe_trace.analysis.accumulator import Accumulator, add_to
from moe_trace.analysis.part import Part
from moe_trace.metrics.arrays import Ints
from moe_trace.metrics.uncertainty import Interval
from moe_trace.units import count

GROUPS = 256


def group_of(name: str) -> int:
    """The group of a request, from 0 to `GROUPS` - 1: by its name alone, so that it is the same in each trace and in
    each process."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % GROUPS


@dataclass
class GroupCounts(Accumulator):
    """How often each expert was chosen, by group of requests: what intervals over requests are made of where there are
    too many for `RequestCounts`. Requests of one name are in one group. Holds 2 KB for each expert of each layer.

    Args:
        layers: those that are counted; None for all.

    Attributes:
        counts: by layer, int64 `[GROUPS, E]`.
        rows: by layer, how many tokens.
        width: the most choices of any row.
        nobodys: tokens that belong to no request: in `rows`, and in no count.
    """

    layers: tuple[int, ...] | None = None
    counts: dict[int, Ints] = field(init=False, default_factory=dict)
    rows: dict[int, int] = field(init=False, default_factory=dict)
    width: int = field(init=False, default=0)
    nobodys: int = field(init=False, default=0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "requests"))

    def add(self, part: Part) -> None:
        groups = np.array([group_of(name) for _, _, name, _ in part.requests] + [-1], np.int64)[part.request]
        self.nobodys += int((groups < 0).sum())
        for layer in part.layers if self.layers is None else set(self.layers).intersection(part.layers):
            ids = part.ids(layer)
            self.width = max(self.width, ids.shape[1])
            self.rows[layer] = self.rows.get(layer, 0) + part.rows
            add_to(self.counts, layer, metrics.counts_by_group(groups, ids, part.experts(layer), GROUPS))

    def merge(self, later: Self) -> None:
        self.nobodys += later.nobodys
        self.width = max(self.width, later.width)
        for layer, counts in later.counts.items():
            self.rows[layer] = self.rows.get(layer, 0) + later.rows[layer]
            add_to(self.counts, layer, counts)

    def notes(self) -> list[str]:
        """How many rows are in no count."""
        if not self.nobodys:
            return []
        return [f"{count(self.nobodys, 'row')} belong to no request: they are in no count by group of requests"]

    def groups(self, layer: int) -> Ints:
        """Counts of a layer by group, of those that have any: int64 `[groups, E]`."""
        of_layer = self.counts.get(layer)
        return np.zeros((0, 0), np.int64) if of_layer is None else of_layer[of_layer.any(axis=1)]

    def shares(self, layer: int, **options: Any) -> Interval:
        """The share of each expert and its interval over groups of requests, `[E]` (`metrics.bootstrap_ratio`, with its
        options)."""
        counts = self.groups(layer)
        return metrics.bootstrap_ratio(counts, counts.sum(axis=1), **options)
