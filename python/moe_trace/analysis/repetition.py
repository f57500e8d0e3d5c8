"""How often a token's experts are those of the token before it, across blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from moe_trace import metrics
from moe_trace.analysis.accumulator import Accumulator, with_room
from moe_trace.analysis.part import Part, Slots
from moe_trace.errors import TraceError
from moe_trace.metrics.arrays import Ints, valid
from moe_trace.metrics.uncertainty import Interval
from moe_trace.units import count

Choice = Literal["first", "any"]

_INVALID = 65535
_SUMS = {"any": (1, 0), "first": (3, 2)}  # columns of repeats and of pairs
_NONE = -2  # a position that nothing follows, and that follows nothing


@dataclass
class _Rows:
    """A row of each of some requests.

    Attributes:
        positions: int64 `[R]`, `_NONE` for no row.
        ids: uint16 `[R, k]`, 65535 for an invalid one.
        first: int64 `[R]`, the first choice, -1 for none.
    """

    positions: Ints
    ids: npt.NDArray[np.uint16]
    first: Ints

    @classmethod
    def none(cls, k: int) -> _Rows:
        return cls(np.zeros(0, np.int64), np.zeros((0, k), np.uint16), np.zeros(0, np.int64))

    def at(self, rows: npt.NDArray[Any]) -> _Rows:
        return _Rows(self.positions[rows], self.ids[rows], self.first[rows])

    def put(self, rows: npt.NDArray[Any], new: _Rows) -> None:
        self.positions[rows], self.ids[rows], self.first[rows] = new.positions, new.ids, new.first

    def grow(self, rows: int) -> None:
        self.positions = with_room(self.positions, rows, _NONE)
        self.ids, self.first = with_room(self.ids, rows, _INVALID), with_room(self.first, rows, -1)

    def repeats(self, before: _Rows) -> Ints:
        """Of each row and the one before it, four 0 or 1, `[rows, 4]`: whether both sets of ids are known, and share
        one; whether both first choices are known, and the same. All 0 where the one before is not the position before.
        """
        shared = metrics.overlap(self.ids, before.ids)
        first = (self.first >= 0) & (before.first >= 0)
        found = np.stack((~np.isnan(shared), shared > 0, first, first & (self.first == before.first)), axis=1)
        follows = (self.positions == before.positions + 1) & (before.positions >= 0)
        return np.asarray(found & follows[:, None], np.int64)


class _Ends:
    """What one layer's rows of width k have shown: sums by request, and the first and the last row of each."""

    def __init__(self, k: int) -> None:
        self.sums: Ints = np.zeros((0, 4), np.int64)
        self.head, self.tail = _Rows.none(k), _Rows.none(k)

    def grow(self, requests: int) -> None:
        self.sums = with_room(self.sums, requests, 0)
        self.head.grow(requests)
        self.tail.grow(requests)

    def add(self, slots: Ints, sums: Ints, head: _Rows, tail: _Rows) -> None:
        """Add what comes later: sums within it, and where each of these requests (slots, each once) begins and ends."""
        self.sums[slots] += sums + head.repeats(self.tail.at(slots))
        new = self.head.positions[slots] == _NONE
        self.head.put(slots[new], head.at(new))
        self.tail.put(slots, tail)


@dataclass
class Repetition(Accumulator):
    """How often the experts of a token repeat from the token before it in its request (`metrics.repetition`).

    Of the rows that count (`Selection.current`): superseded rows, rejected drafts and those whose fate is not known are
    left out, whatever was selected. So are rows of nobody and of unknown position. Two rows are compared where one
    comes after the other in their request and they have consecutive positions, in whatever blocks they are; not across
    positions that were cached, lost, or not selected. Holds 64 + 4k bytes for each layer and request, or up to twice
    that.

    Attributes:
        left_out: rows that were left out, by reason.
        experts: by layer, number of experts.
    """

    left_out: dict[str, int] = field(init=False, default_factory=dict)
    experts: dict[int, int] = field(init=False, default_factory=dict)
    _slots: Slots = field(init=False, default_factory=Slots)
    _ends: dict[tuple[int, int], _Ends] = field(init=False, default_factory=dict)  # by layer and k, as runs may differ

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "weights", "requests"))

    def add(self, part: Part) -> None:
        mine, placed = part.request >= 0, part.positions >= 0
        self._leave_out("do not count", ~part.current)
        self._leave_out("are nobody's", part.current & ~mine)
        self._leave_out("have no known position", part.current & mine & ~placed)
        rows = np.flatnonzero(part.current & mine & placed)
        slots = self._slots.of(part.requests)
        if not len(rows):
            return
        rows = rows[np.argsort(part.request[rows], kind="stable")]  # by request, each in the order of execution
        request, positions = part.request[rows], part.positions[rows]
        changes = np.flatnonzero(request[1:] != request[:-1])
        starts, ends = np.append(0, changes + 1), np.append(changes, len(rows) - 1)
        inner = np.flatnonzero(request[1:] == request[:-1]) + 1
        for layer in part.layers:
            ids, weights = part.ids(layer), part.weights(layer)
            first = np.full(len(ids), -1, np.int64) if weights is None else metrics.first_choice(ids, weights)
            wide = ids[rows].astype(np.uint16)
            wide[~valid(ids[rows])] = _INVALID
            here = _Rows(positions, wide, first[rows])
            sums = np.zeros((len(part.requests), 4), np.int64)
            np.add.at(sums, request[inner], here.at(inner).repeats(here.at(inner - 1)))
            at = request[starts]
            self._of(layer, ids.shape[1]).add(slots[at], sums[at], here.at(starts), here.at(ends))
            self.experts[layer] = max(self.experts.get(layer, 0), part.experts(layer))

    def merge(self, later: Self) -> None:
        for why, n in later.left_out.items():
            self.left_out[why] = self.left_out.get(why, 0) + n
        slots = self._slots.of(later._slots.requests)
        for (layer, k), ends in later._ends.items():
            ends.grow(len(slots))
            there = np.flatnonzero(ends.head.positions[: len(slots)] != _NONE)
            self._of(layer, k).add(slots[there], ends.sums[there], ends.head.at(there), ends.tail.at(there))
            self.experts[layer] = max(self.experts.get(layer, 0), later.experts[layer])

    def _of(self, layer: int, k: int) -> _Ends:
        ends = self._ends.setdefault((layer, k), _Ends(k))
        ends.grow(len(self._slots))
        return ends

    def _leave_out(self, why: str, rows: npt.NDArray[np.bool_]) -> None:
        if n := int(rows.sum()):
            self.left_out[why] = self.left_out.get(why, 0) + n

    @property
    def requests(self) -> list[tuple[str, str, str, str | int]]:
        """Of each: run, first rank of its engine, name, and what tells it from others of that name."""
        return self._slots.requests

    def sums(self, layer: int, choice: Choice) -> tuple[Ints, Ints]:
        """(repeats, pairs of tokens that were compared) of each request, int64 `[R]`, in the order of `requests`."""
        repeats, pairs = _SUMS[choice]
        found = np.zeros((len(self._slots), 4), np.int64)
        for (at, _), ends in self._ends.items():
            if at == layer:
                n = min(len(ends.sums), len(found))
                found[:n] += ends.sums[:n]
        return found[:, repeats], found[:, pairs]

    def share(self, layer: int, choice: Choice = "any", **options: Any) -> Interval:
        """The share of tokens that repeat, with its interval over requests (`metrics.bootstrap_ratio`, with its
        options). NaN for the first choice where weights were not recorded."""
        return metrics.bootstrap_ratio(*self.sums(layer, choice), **options)

    def by_chance(self, layer: int, choice: Choice = "any") -> float:
        """What a uniform router would have (`metrics.repetition_by_chance`). Raises TraceError where k changed."""
        widths = [k for at, k in self._ends if at == layer]
        if len(widths) != 1:
            raise TraceError(f"layer {layer} has rows of {len(widths)} widths: select one run, as in trace.run(-1)")
        return metrics.repetition_by_chance(self.experts[layer], widths[0], choice)

    def notes(self) -> list[str]:
        """How many rows were left out."""
        return [f"{count(n, 'row')} {why}: repetition leaves them out" for why, n in sorted(self.left_out.items())]
