"""The lines of a log on their way into a trace: on disk, layer by layer, until it is known which are of one token.

A log has a line for each token and layer, in some order: layers within tokens, tokens within layers of a step, or each
layer in a file of its own. A trace has rows, which are tokens with all of their layers. Lines are of one row where they
have the same request and `token_idx`; where such a pair is repeated, the n-th line of one layer goes with the n-th of
the others.

In nearly all logs the layers have the same pairs in the same order, which is compared piece by piece, and then the n-th
line of each is the n-th row. From the first difference on lines are matched in memory, about 100 bytes a line. Where
the layers do not have a repeated pair equally often there, or a line was skipped before, nobody can say which of its
lines go together: they are kept apart, each a row of its layer alone, after the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.exchange.lines import INVALID, Malformed, Route

Records = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

COMPARED = 1 << 16  # lines at a time
_NONE, _IDS, _WEIGHTS = range(3)  # what a row has of a layer


class _Layer:
    """The lines of one layer."""

    def __init__(self, path: Path, k: int, sure: int | None) -> None:
        self.k = k
        self.dtype = np.dtype(
            [("line", "<u8"), ("request", "<u4"), ("at", "<i8"), ("has", "u1"), ("ids", "<u2", (k,)),
             ("weights", "<f4", (k,))]
        )  # fmt: skip
        self.lines = 0
        self.sure = sure  # how many came before a line was skipped; None: no line was
        self.largest = -1  # id
        self._path = path
        self._waiting: list[tuple[Any, ...]] = []
        self._nothing = (np.nan,) * k

    def add(self, line: int, request: int, route: Route) -> None:
        weights = self._nothing if route.weights is None else tuple(route.weights)
        has = _IDS if route.weights is None else _WEIGHTS
        self._waiting.append((line, request, route.at, has, tuple(route.ids), weights))
        self.lines += 1

    def flush(self) -> None:
        if self._waiting:
            with np.errstate(over="ignore"):  # a weight beyond float32 is infinite there
                records = np.array(self._waiting, self.dtype)
            legal = records["ids"][records["ids"] != INVALID]
            self.largest = max(self.largest, int(legal.max(initial=0)) if legal.size else -1)
            with self._path.open("ab") as file:
                file.write(records.tobytes())
            self._waiting.clear()

    @property
    def records(self) -> Records:
        """`[lines]`, from the disk."""
        return np.memmap(self._path, self.dtype, "r") if self.lines else np.zeros(0, self.dtype)


class Spool:
    """The lines of one run. `add` them, then `close`, then read `rows`.

    Attributes:
        requests: names by index.
        partial: once the rows were matched, how many lack a layer that others have.
        apart: how many of them do because there was no sure match.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._layers: dict[int, _Layer] = {}
        self._requests: dict[str, int] = {}
        self._skipped = False
        self.partial = self.apart = 0

    def add(self, number: int, route: Route) -> None:
        """Add a line; `number` ascends. Raises Malformed where it does not fit the others."""
        layer = self._layers.get(route.layer)
        if layer is None:
            layer = self._layers[route.layer] = _Layer(
                self._directory / str(route.layer), len(route.ids), 0 if self._skipped else None
            )
        if layer.k != len(route.ids):
            raise Malformed(
                f"it has {len(route.ids)} experts, and the lines of layer {route.layer} before it have {layer.k}"
            )
        requests = self._requests
        request = fmt.NOBODY if route.request is None else requests.setdefault(route.request, len(requests))
        layer.add(number, request, route)

    def skipped(self) -> None:
        """A line was skipped: of what follows, repeated pairs cannot be matched by their order."""
        self._skipped = True
        for layer in self._layers.values():
            layer.sure = layer.lines if layer.sure is None else layer.sure

    def flush(self) -> None:
        """Move what is in memory to the disk."""
        for layer in self._layers.values():
            layer.flush()

    @property
    def requests(self) -> list[str]:
        return list(self._requests)

    @property
    def layers(self) -> dict[int, tuple[int, int]]:
        """By layer, ascending: k, and the largest id (-1 without one)."""
        return {layer: (of.k, of.largest) for layer, of in sorted(self._layers.items())}

    @property
    def lines(self) -> dict[int, int]:
        """By layer, ascending: how many lines."""
        return {layer: of.lines for layer, of in sorted(self._layers.items())}

    @property
    def has_weights(self) -> bool:
        """Whether any line has."""
        return any(
            (layer.records["has"][at : at + COMPARED] == _WEIGHTS).any()
            for layer in self._layers.values()
            for at in range(0, layer.lines, COMPARED)
        )

    def rows(self, at_once: int, unique: bool) -> Iterator[dict[int, Records]]:
        """The rows, at most `at_once` at a time: of each layer that they all have its records, of the same length, all
        of them with weights or none.

        unique: whether no request has a `token_idx` twice.
        """
        layers = {layer: of.records for layer, of in sorted(self._layers.items())}
        if not layers:
            return
        same = self._same(list(layers.values()))
        for first in range(0, same, at_once):
            yield from _alike({layer: records[first : min(first + at_once, same)] for layer, records in layers.items()})
        rest = {layer: records[same:] for layer, records in layers.items() if len(records) > same}
        if rest:
            places = self._match(rest, unique)
            for first in range(0, len(places), at_once):
                yield from _chosen(rest, places[first : first + at_once])

    def _same(self, layers: list[Records]) -> int:
        """How many lines have the same pairs, in the same order, in all layers."""
        sure = [of.lines if of.sure is None else of.sure for of in self._layers.values()]
        end = min(sure) if len(layers) > 1 else len(layers[0])
        for first in range(0, end if len(layers) > 1 else 0, COMPARED):
            here = slice(first, min(first + COMPARED, end))
            differ = np.zeros(here.stop - first, bool)
            for records in layers[1:]:
                for name in ("request", "at"):
                    differ |= records[name][here] != layers[0][name][here]
            if differ.any():
                return first + int(differ.argmax())
        return end

    def _match(self, layers: dict[int, Records], unique: bool) -> Ints:
        """`[rows, layers]`: which record of each layer a row has, -1 for none. Rows are in the order of their first
        lines."""
        of_layer = np.repeat(np.arange(len(layers)), [len(records) for records in layers.values()])
        record = np.concatenate([np.arange(len(records)) for records in layers.values()])
        request, at, line = (np.concatenate([r[name] for r in layers.values()]) for name in ("request", "at", "line"))
        _, pair = np.unique(request.astype(np.uint64) << 32 | (at + 1).astype(np.uint64), return_inverse=True)
        pairs = int(pair.max()) + 1
        # How often each layer has each pair, and which of them a line is.
        order = np.lexsort((record, of_layer, pair))
        new = np.append(True, (np.diff(pair[order]) != 0) | (np.diff(of_layer[order]) != 0))
        starts = np.flatnonzero(new)
        often = np.diff(np.append(starts, len(order)))
        nth = np.empty(len(order), np.int64)
        nth[order] = np.arange(len(order)) - np.repeat(starts, often)
        most, least = np.zeros(pairs, np.int64), np.full(pairs, len(order))
        np.maximum.at(most, pair[order][starts], often)
        np.minimum.at(least, pair[order][starts], often)
        several = np.bincount(pair[order][starts], minlength=pairs) > 1
        unsure = several & (most != least)
        if self._skipped:
            named = np.zeros(pairs, bool)
            named[pair] = (request != fmt.NOBODY) & (at >= 0)
            unsure |= several & ~(named & unique & (most == 1))
        # A row is what has the same pair and number; a line without a sure match is one by itself.
        alone = unsure[pair]
        key = np.where(alone, pairs + np.arange(len(pair)), pair)
        ranked = np.lexsort((nth, key))
        begins = np.append(True, (np.diff(key[ranked]) != 0) | (np.diff(nth[ranked]) != 0))
        row = np.empty(len(key), np.int64)
        row[ranked] = np.cumsum(begins) - 1
        rows = int(begins.sum())
        places = np.full((rows, len(layers)), -1, np.int64)
        places[row, of_layer] = record
        first_line, last = np.full(rows, np.iinfo(np.int64).max), np.zeros(rows, bool)
        np.minimum.at(first_line, row, line.astype(np.int64))
        last[row] = alone
        self.partial, self.apart = int((places < 0).any(axis=1).sum()), int(last.sum())
        # Those that are kept apart come last, layer by layer, so that they do not make a block each.
        only = np.where(last, places.argmax(axis=1), 0)
        ordered: Ints = places[np.lexsort((first_line, only, last))]
        return ordered


def _alike(layers: dict[int, Records]) -> Iterator[dict[int, Records]]:
    """Rows, cut where one of their layers begins or ends to have weights."""
    yield from _cut(layers, np.stack([records["has"] for records in layers.values()]))


def _chosen(layers: dict[int, Records], places: Ints) -> Iterator[dict[int, Records]]:
    """Rows, cut where the layers that they have change as well."""
    taken = {layer: records[np.maximum(places[:, i], 0)] for i, (layer, records) in enumerate(layers.items())}
    has = np.stack([np.where(places[:, i] < 0, _NONE, records["has"]) for i, records in enumerate(taken.values())])
    yield from _cut(taken, has)


def _cut(layers: dict[int, Records], has: npt.NDArray[Any]) -> Iterator[dict[int, Records]]:
    cuts = [0, *(np.flatnonzero((has[:, 1:] != has[:, :-1]).any(axis=0)) + 1).tolist(), has.shape[1]]
    for first, end in pairwise(cuts):
        yield {layer: records[first:end] for i, (layer, records) in enumerate(layers.items()) if has[i, first] != _NONE}
