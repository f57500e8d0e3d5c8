"""Two traces row by row: of the same request and position, which experts did each choose?

A first pass over both traces says which requests there are and how long they are, so that each position that both have
gets a place (`Extents`, `places`). Where both have token ids, another one says up to where they are the same
(`Tokens`). Then one trace's ids are put in their places, in a file on disk (`Store`), and each row of the other is held
against what is there (`Flips`). In memory is a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace import metrics
from moe_trace.analysis import Accumulator, Part, Whose
from moe_trace.analysis.accumulator import add_to, with_room
from moe_trace.analysis.groups import GROUPS, group_of
from moe_trace.analysis.part import Slots
from moe_trace.metrics.arrays import Ints

PHASES = fmt.PHASES
ROWS, CHANGED, LOST = range(3)  # of a group and phase: rows compared, rows that differ, choices that differ
NEAR, REAL, UNKNOWN = range(3)  # what the logits say of a row that differs


@dataclass
class Extents(Accumulator):
    """Which requests a trace has, in the order of their first rows, and how far they reach.

    Attributes:
        placeless: rows of a request whose position nobody knows.
    """

    placeless: int = field(init=False, default=0)
    _slots: Slots = field(init=False, default_factory=Slots)
    _ends: Ints = field(init=False, default_factory=lambda: np.zeros(0, np.int64))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("requests",))

    def add(self, part: Part) -> None:
        mine = (part.request >= 0) & (part.positions >= 0)
        self.placeless += int(((part.request >= 0) & ~mine).sum())
        ends = np.zeros(len(part.requests), np.int64)
        np.maximum.at(ends, part.request[mine], part.positions[mine] + 1)
        self._add(self._slots.of(part.requests), ends)

    def merge(self, later: Self) -> None:
        self.placeless += later.placeless
        self._add(self._slots.of(later._slots.requests), later._ends[: len(later._slots)])

    def _add(self, slots: Ints, ends: Ints) -> None:
        self._ends = with_room(self._ends, len(self._slots), 0)
        np.maximum.at(self._ends, slots, ends)

    @property
    def requests(self) -> dict[tuple[str, int], tuple[Whose, int]]:
        """By name and which of that name it is, from 0: who it is and its first position without a row."""
        seen: Counter[str] = Counter()
        found: dict[tuple[str, int], tuple[Whose, int]] = {}
        for whose, end in zip(self._slots.requests, self._ends.tolist(), strict=False):
            found[whose[2], seen[whose[2]]] = whose, end
            seen[whose[2]] += 1
        return found


@dataclass(frozen=True)
class Places:
    """Where the rows are that two traces have in common.

    Attributes:
        first: by request of one of the traces: its first place, and how many it has.
        number: of all places.
    """

    first: Mapping[Whose, tuple[int, int]]
    number: int

    def of(self, part: Part) -> tuple[Ints, Ints]:
        """(the rows of a part that count and have a place; their places)."""
        none = (0, 0)
        spans = np.array([self.first.get(whose, none) for whose in part.requests] + [none], np.int64)
        first, length = spans[part.request].T
        rows = np.flatnonzero((part.positions >= 0) & (part.positions < length) & part.current)
        return rows, first[rows] + part.positions[rows]


def places(a: Extents, b: Extents) -> tuple[Places, Places]:
    """The places of the rows of two traces: equal for the same request and position. Requests of one name are paired in
    the order of their first rows."""
    of_a, of_b, at = a.requests, b.requests, 0
    first_a, first_b = {}, {}
    for key in of_a.keys() & of_b.keys():
        (whose_a, end_a), (whose_b, end_b) = of_a[key], of_b[key]
        length = min(end_a, end_b)
        first_a[whose_a] = first_b[whose_b] = at, length
        at += length
    return Places(first_a, at), Places(first_b, at)


@dataclass
class Tokens(Accumulator):
    """Writes the token ids of a trace to their places: uint32 `[places]`, an id plus 1, 0 where it is not known."""

    path: Path
    places: Places

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("requests", "tokens"))

    def add(self, part: Part) -> None:
        rows, at = self.places.of(part)
        if len(rows):
            np.memmap(self.path, np.uint32, "r+", shape=(self.places.number,))[at] = part.tokens[rows] + 1

    def merge(self, later: Self) -> None:
        pass  # they are all in the file

    def known(self) -> npt.NDArray[np.uint32]:
        """What was written."""
        return np.memmap(self.path, np.uint32, "r", shape=(self.places.number,))


def until_they_part(of: Places, a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> tuple[Places, int]:
    """(the places before the first token of each request that is known to differ, how many requests have one): a row
    from there on has another text before it, and differs for that reason."""
    first, parted = {}, 0
    for whose, (at, length) in of.first.items():
        x, y = a[at : at + length], b[at : at + length]
        differ = np.flatnonzero((x != y) & (x != 0) & (y != 0))
        parted += bool(len(differ))
        first[whose] = at, int(differ[0]) if len(differ) else length
    return Places(first, of.number), parted


@dataclass
class Store(Accumulator):
    """Writes the ids of a trace to their places: uint16 `[places, layers, width]`, an id plus 1, 0 where there is none
    or it is invalid.

    Attributes:
        k: by layer, choices of its rows; 0 where that changed.
    """

    path: Path
    places: Places
    layers: Sequence[int]
    width: int
    k: dict[int, int] = field(init=False, default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "requests"))

    def add(self, part: Part) -> None:
        rows, at = self.places.of(part)
        for axis, layer in enumerate(self.layers):
            if layer not in part.layers or not len(rows):
                continue
            ids = part.ids(layer)[rows]
            known = metrics.valid(ids)
            self._learn(layer, ids.shape[1])
            if self.k[layer]:
                self._table[at, axis, : ids.shape[1]] = np.where(known, ids.astype(np.uint16) + 1, 0)

    def merge(self, later: Self) -> None:
        for layer, k in later.k.items():
            self._learn(layer, k)

    def _learn(self, layer: int, k: int) -> None:
        self.k[layer] = k if self.k.get(layer, k) == k else 0

    @property
    def _table(self) -> npt.NDArray[np.uint16]:
        return opened(self.path, self.places.number, self.layers, self.width, "r+")


def opened(path: Path, number: int, layers: Sequence[int], width: int, mode: Any) -> npt.NDArray[np.uint16]:
    """The file of a `Store`."""
    return np.memmap(path, np.uint16, mode, shape=(number, len(layers), width))


@dataclass
class Flips(Accumulator):
    """Holds the rows of a trace against those in a `Store`.

    Args:
        k: by layer, of the store; layers that it lacks are not compared.
        near: a row that differs is a near-tie where, by its logits, the experts that it has and the other has not are
            ahead of those that the other has instead by no more than this.

    Attributes:
        sums: by layer, int64 `[GROUPS, phases, 3]`: rows compared, rows that differ, and choices that differ.
        ties: by layer, int64 `[phases, 3]` of the rows that differ: near-ties, others, and those of which the logits
            do not say (not stored, NaN, or not what this router selects by).
        tokens: int64 `[GROUPS, phases, 2]`: tokens of which all layers were compared or one differs, and those of which
            one differs.
        other_k: layers whose number of choices is another one.
    """

    path: Path
    places: Places
    layers: Sequence[int]
    width: int
    k: Mapping[int, int]
    near: float
    sums: dict[int, Ints] = field(init=False, default_factory=dict)
    ties: dict[int, Ints] = field(init=False, default_factory=dict)
    tokens: Ints = field(init=False, default_factory=lambda: np.zeros((GROUPS, len(PHASES), 2), np.int64))
    other_k: set[int] = field(init=False, default_factory=set)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "logits", "phases", "requests"))

    def add(self, part: Part) -> None:
        rows, at = self.places.of(part)
        if not len(rows):
            return
        theirs = opened(self.path, self.places.number, self.layers, self.width, "r")[at]
        groups = np.array([group_of(name) for _, _, name, _ in part.requests], np.int64)[part.request[rows]]
        cell = groups * len(PHASES) + part.phases[rows]
        differs, unknown = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        for axis, layer in enumerate(self.layers):
            k = self.k.get(layer, 0)
            if layer not in part.layers or not k:
                unknown |= bool(k)
                continue
            ids = part.ids(layer)[rows]
            if ids.shape[1] != k:
                self.other_k.add(layer)
                continue
            a = theirs[:, axis, :k].astype(np.int32) - 1
            rate = metrics.flip_rate(a, ids)
            known, flipped = ~np.isnan(rate), rate > 0
            differs |= flipped
            unknown |= ~known
            of_rows = np.stack([known, flipped, np.round(np.where(known, rate, 0) * k)], axis=1).astype(np.int64)
            add_to(self.sums, layer, self._by_cell(cell, of_rows))
            of_flips = np.zeros((len(PHASES), 3), np.int64)
            at_flips = np.flatnonzero(flipped)
            logits = part.logits(layer)
            said = _ties(a[at_flips], ids[at_flips], None if logits is None else logits[rows[at_flips]], self.near)
            np.add.at(of_flips, (part.phases[rows[at_flips]], said), 1)
            add_to(self.ties, layer, of_flips)
        if any(self.k.values()):
            self.tokens += self._by_cell(cell, np.stack([differs | ~unknown, differs], axis=1).astype(np.int64))

    @staticmethod
    def _by_cell(cell: Ints, of_rows: Ints) -> Ints:
        sums = np.zeros((GROUPS * len(PHASES), of_rows.shape[1]), np.int64)
        np.add.at(sums, cell, of_rows)
        return sums.reshape(GROUPS, len(PHASES), -1)

    def merge(self, later: Self) -> None:
        for layer, sums in later.sums.items():
            add_to(self.sums, layer, sums)
        for layer, ties in later.ties.items():
            add_to(self.ties, layer, ties)
        self.tokens = self.tokens + later.tokens
        self.other_k |= later.other_k


def _ties(a: npt.NDArray[Any], b: npt.NDArray[Any], logits: npt.NDArray[Any] | None, near: float) -> Ints:
    """What the logits `[rows, experts]` of rows b say of their experts that differ from a, `[rows, k]` of each:
    NEAR, REAL or UNKNOWN."""
    if logits is None:
        return np.full(len(a), UNKNOWN)
    values = logits.astype(np.float64)
    ours, others = (
        np.take_along_axis(values, np.clip(ids.astype(np.int64), 0, values.shape[1] - 1), axis=1) for ids in (b, a)
    )
    new, gone = (~(x[:, :, None] == y[:, None, :]).any(axis=2) for x, y in ((b, a), (a, b)))
    infinity = np.inf
    ahead = ours.max(axis=1, where=new, initial=-infinity) - others.min(axis=1, where=gone, initial=infinity)
    least = ours.min(axis=1, where=new, initial=infinity) - others.max(axis=1, where=gone, initial=-infinity)
    # Behind in its own logits and chosen all the same: a bias, a group or something else decides here.
    return np.where(np.isfinite(ahead) & (least >= 0), np.where(ahead <= near, NEAR, REAL), UNKNOWN)
