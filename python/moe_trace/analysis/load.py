"""How experts are used over time, by request, and by how many at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moe_trace import metrics
from moe_trace.analysis.accumulator import Accumulator, add_to, with_room
from moe_trace.analysis.part import Part, Slots
from moe_trace.metrics.arrays import Floats, Ints
from moe_trace.metrics.uncertainty import Interval

SECOND = 1_000_000_000


@dataclass
class UsageOverTime(Accumulator):
    """How often each expert was chosen in each window of time. Holds 8·E bytes for each layer and window.

    Args:
        seconds: length of a window, counted from 1970 in UTC. Where more than `most` windows have rows, it is doubled
            until they have not; `width_ns` says what it became.
        most: windows that are kept at most.

    Attributes:
        width_ns: length of a window in nanoseconds.
        rows: by window (its start divided by its width), how many tokens.
        counts: by layer and window, int64 `[E]`; invalid ids are not in them.
    """

    seconds: float = 1.0
    most: int = 256
    width_ns: int = field(init=False)
    rows: dict[int, int] = field(init=False, default_factory=dict)
    counts: dict[tuple[int, int], Ints] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.width_ns = round(self.seconds * SECOND)
        if self.width_ns < 1 or self.most < 1:
            raise ValueError(f"windows have to be longer than 0 and more than 0, not {self.seconds} s and {self.most}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "times"))

    def add(self, part: Part) -> None:
        windows, of, rows = np.unique(part.times // self.width_ns, return_inverse=True, return_counts=True)
        numbers = windows.tolist()
        for window, n in zip(numbers, rows.tolist(), strict=True):
            self.rows[window] = self.rows.get(window, 0) + n
        for layer in part.layers:
            counts = metrics.counts_by_group(of, part.ids(layer), part.experts(layer), len(windows))
            for window, of_window in zip(numbers, counts, strict=True):
                add_to(self.counts, (layer, window), of_window)
        self._fit()

    def merge(self, later: Self) -> None:
        other = later.empty()  # a copy: `later` stays as it is
        other.width_ns, other.rows, other.counts = later.width_ns, dict(later.rows), dict(later.counts)
        for one, width in ((self, other.width_ns), (other, self.width_ns)):
            while one.width_ns < width:
                one._widen()
        for window, n in other.rows.items():
            self.rows[window] = self.rows.get(window, 0) + n
        for key, counts in other.counts.items():
            add_to(self.counts, key, counts)
        self._fit()

    def _fit(self) -> None:
        # The width is the least that will do for all rows, in whatever order they come: more rows never have fewer
        # windows.
        while len(self.rows) > self.most:
            self._widen()

    def _widen(self) -> None:
        rows, counts = self.rows, self.counts
        self.width_ns, self.rows, self.counts = 2 * self.width_ns, {}, {}
        for window, n in rows.items():
            self.rows[window // 2] = self.rows.get(window // 2, 0) + n
        for (layer, window), of_window in counts.items():
            add_to(self.counts, (layer, window // 2), of_window)

    @property
    def starts(self) -> npt.NDArray[np.datetime64]:
        """Start of each window that has rows, ascending, UTC, datetime64[ns] `[windows]`."""
        return np.array([window * self.width_ns for window in sorted(self.rows)], "datetime64[ns]")

    def table(self, layer: int) -> Ints:
        """Counts of one layer, int64 `[windows, E]`, in the order of `starts`."""
        of_layer = {window: counts for (at, window), counts in self.counts.items() if at == layer}
        table = np.zeros((len(self.rows), max(map(len, of_layer.values()), default=0)), np.int64)
        for row, window in zip(table, sorted(self.rows), strict=True):
            counts = of_layer.get(window, np.zeros(0, np.int64))
            row[: len(counts)] = counts
        return table

    def drift(self, layer: int) -> Floats:
        """Divergence of each window from the one before it in `starts`: float64 `[windows - 1]`, in nats
        (`metrics.js_divergence`); NaN where one has no counts."""
        table = self.table(layer)
        return metrics.js_divergence(table[1:], table[:-1])


@dataclass
class RequestCounts(Accumulator):
    """How often each expert was chosen for each request: what intervals and tests over requests are made of. Holds 8·E
    bytes for each layer and request: select layers where there are many requests.

    Attributes:
        rows: tokens of each request, int64 `[R]`, in the order of `requests`.
        nobodys: tokens that belong to no request, and are not counted.
    """

    nobodys: int = field(init=False, default=0)
    _slots: Slots = field(init=False, default_factory=Slots)
    _rows: Ints = field(init=False, default_factory=lambda: np.zeros(0, np.int64))
    _counts: dict[int, Ints] = field(init=False, default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "requests"))

    def add(self, part: Part) -> None:
        slots, n = self._slots.of(part.requests), len(part.requests)
        mine = part.request >= 0
        self.nobodys += int(len(mine) - mine.sum())
        of_layers = {
            layer: metrics.counts_by_group(part.request, part.ids(layer), part.experts(layer), n)
            for layer in part.layers
        }
        self._add(slots, np.bincount(part.request[mine], minlength=n), of_layers)

    def merge(self, later: Self) -> None:
        self.nobodys += later.nobodys
        slots = self._slots.of(later._slots.requests)
        of_layers = {layer: later.counts(layer) for layer in later._counts}
        self._add(slots, later.rows, of_layers)

    def _add(self, slots: Ints, rows: Ints, of_layers: dict[int, Ints]) -> None:
        self._rows = with_room(self._rows, len(self._slots), 0)
        self._rows[slots] += rows
        for layer, counts in of_layers.items():
            old = self._counts.get(layer, np.zeros((0, 0), np.int64))
            if counts.shape[1] > old.shape[1]:
                old = np.pad(old, [(0, 0), (0, counts.shape[1] - old.shape[1])])
            self._counts[layer] = old = with_room(old, len(self._slots), 0)
            old[slots, : counts.shape[1]] += counts

    @property
    def requests(self) -> list[tuple[str, str, str, str | int]]:
        """Of each: run, first rank of its engine, name, and what tells it from others of that name."""
        return self._slots.requests

    @property
    def rows(self) -> Ints:
        return self._rows[: len(self._slots)]

    def counts(self, layer: int) -> Ints:
        """Counts of one layer, int64 `[R, E]`."""
        return with_room(self._counts[layer], len(self._slots), 0)[: len(self._slots)]

    def shares(self, layer: int, **options: Any) -> Interval:
        """The share of each expert and its interval over requests, `[E]` (`metrics.bootstrap_ratio`, with its
        options)."""
        counts = self.counts(layer)
        return metrics.bootstrap_ratio(counts, counts.sum(axis=1), **options)


@dataclass
class DistinctExperts(Accumulator):
    """How many experts of a layer a step needs, by the step's number of rows. A step's rows are those selected: of a
    phase, or of some requests, it is what these alone would need; where requests were sampled, the stored ones. A step
    is that of one engine: data-parallel ranks each have their own.

    Attributes:
        totals: by layer and number of rows B: (steps, sum of their distinct experts).
        experts: by layer, number of experts.
        k: by layer, choices of a row; 0 where it changed.
    """

    totals: dict[int, dict[int, tuple[int, int]]] = field(init=False, default_factory=dict)
    experts: dict[int, int] = field(init=False, default_factory=dict)
    k: dict[int, int] = field(init=False, default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "steps"))

    def add(self, part: Part) -> None:
        for layer in part.layers:
            ids = part.ids(layer)
            _, rows, distinct = metrics.distinct_experts(ids, part.steps, part.experts(layer))
            sizes, of, steps = np.unique(rows, return_inverse=True, return_counts=True)
            sums = np.zeros(len(sizes), np.int64)
            np.add.at(sums, of, distinct)
            found = zip(steps.tolist(), sums.tolist(), strict=True)
            self._add(layer, dict(zip(sizes.tolist(), found, strict=True)), part.experts(layer), ids.shape[1])

    def merge(self, later: Self) -> None:
        for layer, totals in later.totals.items():
            self._add(layer, totals, later.experts[layer], later.k[layer])

    def _add(self, layer: int, totals: dict[int, tuple[int, int]], experts: int, k: int) -> None:
        into = self.totals.setdefault(layer, {})
        for rows, (steps, distinct) in totals.items():
            old = into.get(rows, (0, 0))
            into[rows] = old[0] + steps, old[1] + distinct
        self.experts[layer] = max(self.experts.get(layer, 0), experts)
        self.k[layer] = k if self.k.get(layer, k) == k else 0

    def table(self, layer: int) -> tuple[Ints, Ints, Floats, Floats]:
        """By number of rows, ascending: the number B, steps of that many (int64), the mean of their distinct experts,
        and what it would be by chance (float64; `metrics.distinct_by_chance`, NaN where k changed).
        """
        totals = sorted(self.totals[layer].items())
        rows = np.array([n for n, _ in totals], np.int64)
        steps, sums = (np.array([of[i] for _, of in totals], np.int64) for i in (0, 1))
        k = self.k[layer]
        chance = metrics.distinct_by_chance(self.experts[layer], k, rows) if k else np.full(len(rows), np.nan)
        return rows, steps, sums / steps, chance
