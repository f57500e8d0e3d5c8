"""Prefill and decode within requests, in memory that does not grow with the number of requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Self

import numpy as np

from moe_trace import format as fmt
from moe_trace import metrics
from moe_trace.analysis.accumulator import Accumulator, add_to
from moe_trace.analysis.part import Part, Whose
from moe_trace.metrics.arrays import Ints

_PHASES = ("prefill", "decode")
_COLUMN = np.array([_PHASES.index(phase) if phase in _PHASES else -1 for phase in fmt.PHASES])


@dataclass
class PhaseCounts(Accumulator):
    """How often each expert was chosen in prefill and in decode, by group of requests: what a test needs that holds
    one against the other within requests. Holds 16·E bytes for each layer and group.

    Args:
        most: groups at most. Each request is a group of its own until there are more; then some share one.

    Rows of nobody, and of no known phase, are in no group.
    """

    most: int = 32
    _mask: int = field(init=False, default=(1 << 64) - 1)  # the bits of a request's key that tell its group
    _groups: set[int] = field(init=False, default_factory=set)
    _counts: dict[tuple[int, int], Ints] = field(init=False, default_factory=dict)  # by layer and group: [2, E]

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"requests need at least 1 group, not {self.most}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "requests", "phases"))

    def add(self, part: Part) -> None:
        keys = [_key(whose) for whose in part.requests]
        self._make_room(keys, self._mask)
        groups = sorted({key & self._mask for key in keys})
        places = {group: place for place, group in enumerate(groups)}
        place = np.array([places[key & self._mask] for key in keys] + [-1], np.int64)[part.request]
        column = _COLUMN[part.phases]
        cells = np.where((place >= 0) & (column >= 0), 2 * place + column, -1)
        for layer in part.layers:
            experts = part.experts(layer)
            counts = metrics.counts_by_group(cells, part.ids(layer), experts, 2 * len(groups))
            for group, of_group in zip(groups, counts.reshape(len(groups), 2, experts), strict=True):
                add_to(self._counts, (layer, group), of_group)

    def merge(self, later: Self) -> None:
        self._make_room(later._groups, min(self._mask, later._mask))
        for (layer, group), counts in later._counts.items():
            add_to(self._counts, (layer, group & self._mask), counts)

    def _make_room(self, keys: Iterable[int], mask: int) -> None:
        # The mask is the widest that will do for all requests, in whatever order they come: so the groups are the same
        # however the work is divided.
        groups = {key & mask for key in (*self._groups, *keys)}
        while len(groups) > self.most:
            mask >>= 1
            groups = {group & mask for group in groups}
        self._groups = groups
        if mask != self._mask:
            counts, self._counts, self._mask = self._counts, {}, mask
            for (layer, group), of_group in counts.items():
                add_to(self._counts, (layer, group & mask), of_group)

    def counts(self, layer: int) -> Ints:
        """Counts of one layer, int64 `[groups, 2, E]`: prefill, then decode. The groups of all layers are the same."""
        of_layer = {group: counts for (at, group), counts in self._counts.items() if at == layer}
        table = np.zeros((len(self._groups), 2, max((c.shape[1] for c in of_layer.values()), default=0)), np.int64)
        for place, group in enumerate(sorted(self._groups)):
            if group in of_layer:
                table[place, :, : of_layer[group].shape[1]] = of_layer[group]
        return table


def _key(whose: Whose) -> int:
    """The same in each process, which `hash` is not."""
    return int.from_bytes(blake2b(repr(whose).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
