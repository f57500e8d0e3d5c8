"""The routing of one request, position by position, wherever the rows come from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import Batch, Filter, promote
from moe_trace.errors import DamagedTrace, TraceError
from moe_trace.notes import apart
from moe_trace.rank import Rank
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_trace.select import Selection

Ints = npt.NDArray[np.int64]

MISSING, UNRESOLVED, CACHED, EXECUTED = range(4)
STATES = ("missing", "unresolved", "cached", "executed")

_MOST_POSITIONS = 1 << 24  # a damaged file must not make us allocate for more


class TokenSequence:
    """One request from its first position to its last: what `Selection.sequence` returns.

    A position's row is the one that counts (`Selection.current`). Where several ranks have layers of the request, as
    pipeline stages do, or some of its rows, as sequence-parallel shards do, they are joined by position.

    Attributes:
        request: its name.
        layers: the layers on the axis of `ids` and so on, ascending.
        state: uint8 `[positions]`, index into `STATES`: `executed` by the request itself; `cached` (the engine had it
            in its prefix cache, and the row is that of the request which computed it); `unresolved` (cached, and whose
            row it shares is not known or not in the trace, or was not asked for); `missing` (no row is in the trace).
            Where the layers differ, the least of them.
        sources: object `[positions]`: names of the requests whose rows these are; None where there is none.
    """

    def __init__(self, request: str, layers: tuple[int, ...], one_layer: bool, found: list[_Shards]) -> None:
        self.request = request
        self.layers = layers
        self._one_layer = one_layer
        self._found = found
        self._length = max((part.length for part in found), default=0)
        states = [np.pad(part.state, (0, self._length - part.length)) for part in found]
        self.state: npt.NDArray[np.uint8] = np.minimum.reduce(states) if states else np.zeros(0, np.uint8)
        self.sources: npt.NDArray[np.object_] = np.full(self._length, None, object)
        for part in found[:1]:
            self.sources[: part.length] = part.sources

    def __len__(self) -> int:
        return self._length

    @property
    def complete(self) -> bool:
        """Whether each position has its row."""
        return bool((self.state >= CACHED).all())

    @cached_property
    def ids(self) -> npt.NDArray[Any]:
        """Expert ids `[positions, k]` or `[positions, layers, k]`; the dtype's largest value where there is no row."""
        return self._scattered(fmt.IDS)

    @cached_property
    def weights(self) -> npt.NDArray[Any]:
        """Weights, of the shape of `ids`; NaN where there is no row."""
        return self._scattered(fmt.WEIGHTS)

    @cached_property
    def logits(self) -> npt.NDArray[Any]:
        """Router logits `[positions, experts]` or `[positions, layers, experts]`; NaN where there is no row."""
        return self._scattered(fmt.LOGITS)

    def _scattered(self, field: int) -> npt.NDArray[Any]:
        columns = [self._column(field, layer) for layer in self.layers]
        if len({column.shape[1] for column in columns}) > 1:
            raise TraceError("these layers have rows of different widths: select one layer, as in trace.layer(0)")
        return columns[0] if self._one_layer else np.stack(promote(columns), axis=1)

    def _column(self, field: int, layer: int) -> npt.NDArray[Any]:
        parts = [
            (positions, column[rows])
            for part in self._found
            for batch, rows, positions in part.rows()
            if (column := batch.column(field, layer)) is not None
        ]
        if not parts:
            raise TraceError(f"{self.request!r} has no {fmt.FIELD_NAMES[field]} of layer {layer} in this trace")
        values = promote([column for _, column in parts])
        dtype = values[0].dtype
        nothing = np.nan if dtype.kind == "f" else np.iinfo(dtype).max
        out = np.full((self._length, values[0].shape[1]), nothing, dtype)
        for (positions, _), column in zip(parts, values, strict=True):
            out[positions] = column
        return out

    def __repr__(self) -> str:
        states = [count(int(n), STATES[s]) for s in (3, 2, 1, 0) if (n := (self.state == s).sum())]
        return f"<moe_trace.TokenSequence {self.request!r}: {', '.join(states) or 'no rows'}>"


class _Shards:
    """Where the shards of one pipeline stage have the rows of a request: each position in one of them, or, where it was
    executed again, in several, of which the latest counts."""

    def __init__(self, shards: list[_InRank]) -> None:
        self._shards = shards
        self.length = max(shard.length for shard in shards)
        self.state = np.zeros(self.length, np.uint8)
        self.sources = np.full(self.length, None, object)
        self._shard = np.zeros(self.length, np.int64)  # which of them has the position's row,
        steps = np.full(self.length, -1, np.int64)  # and of which step it is
        for number, shard in enumerate(shards):
            here = slice(0, shard.length)
            better = (shard.state > self.state[here]) | (
                (shard.state == self.state[here]) & (shard.steps > steps[here])
            )
            for whole, own in (
                (self.state, shard.state),
                (self.sources, shard.sources),
                (self._shard, number),
                (steps, shard.steps),
            ):
                whole[here] = np.where(better, own, whole[here])

    def rows(self) -> Iterator[tuple[Batch, Ints, Ints]]:
        """(a batch, numbers of rows in it, their positions), in the order of execution."""
        for number, shard in enumerate(self._shards):
            for batch, rows, positions in shard.rows:
                mine = self._shard[positions] == number
                yield batch, rows[mine], positions[mine]


class _InRank:
    """Where one rank has the rows of a request.

    Attributes:
        rows: (a batch, numbers of rows in it, their positions), in the order of execution.
    """

    def __init__(self, rank: Rank, index: int, layers: tuple[int, ...], resolve: bool) -> None:
        self._rank = rank
        self._layers = layers
        self.rows: list[tuple[Batch, Ints, Ints]] = []
        self.length = 0
        self.state = np.zeros(0, np.uint8)
        self.sources = np.full(0, None, object)
        self.steps: Ints = np.zeros(0, np.int64)  # in which the rows were executed
        self._place(index, EXECUTED, None)
        shared = self._unresolved(index, 0, 1 << 32)
        tried: set[int] = {index}
        while resolve and shared:
            source = min(shared)
            wanted = shared.pop(source)
            wanted = wanted[self.state[wanted] == UNRESOLVED]
            self._place(source, CACHED, wanted)
            wanted = wanted[self.state[wanted] == UNRESOLVED]
            if len(wanted) and source not in tried:  # it had them cached as well
                tried.add(source)
                for further, positions in self._unresolved(source, int(wanted[0]), int(wanted[-1]) + 1).items():
                    positions = np.intersect1d(positions, wanted)
                    shared[further] = np.union1d(shared.get(further, positions), positions)

    def _place(self, index: int, state: int, wanted: Ints | None) -> None:
        """Take the rows of request `index`; of all positions, or of those wanted."""
        request = self._rank.requests.get(index)
        name = request.id if request is not None else None
        for batch in _batches(self._rank, index, self._layers):
            positions = batch.positions
            rows = np.flatnonzero(positions >= 0 if wanted is None else np.isin(positions, wanted))
            if len(rows):
                positions = positions[rows]
                self._grow(int(positions.max()) + 1)
                self.state[positions] = state
                self.sources[positions] = name
                self.steps[positions] = batch.step_numbers[rows]
                self.rows.append((batch, rows, positions))

    def _unresolved(self, index: int, first: int, end: int) -> dict[int, Ints]:
        """Mark the cached positions of request `index` in a range that have no row; return them by source."""
        request = self._rank.requests.get(index)
        shared: dict[int, Ints] = {}
        for start, number, source in request.cached if request is not None else ():
            start, stop = max(start, first), min(start + number, end)
            if start >= stop:
                continue
            self._grow(stop)
            positions = np.arange(start, stop)
            positions = positions[self.state[positions] < CACHED]
            self.state[positions] = UNRESOLVED
            if source is not None and len(positions):
                shared[source] = np.union1d(shared.get(source, positions), positions)
        return shared

    def _grow(self, length: int) -> None:
        if length > _MOST_POSITIONS:
            raise DamagedTrace(f"a request with a position {length - 1:,} is not credible")
        if length > self.length:
            more = length - self.length
            self.state = np.append(self.state, np.zeros(more, np.uint8))
            self.sources = np.append(self.sources, np.full(more, None, object))
            self.steps = np.append(self.steps, np.full(more, -1, np.int64))
            self.length = length


def _batches(rank: Rank, index: int, layers: tuple[int, ...]) -> Iterator[Batch]:
    """The current rows of one request in one rank."""
    for block in rank.blocks():
        keep = block.runs["request"] == index if block.rows else np.zeros(0, bool)
        here = tuple(layer for layer in layers if layer in block.layers)
        if here and keep.any():
            yield Batch(rank, block, Filter(current=True), here, keep)


def assemble(selection: Selection, ranks: list[Rank], id: str, resolve: bool, which: int | None) -> TokenSequence:
    """`Selection.sequence`."""
    # Requests of one name are told apart by run, data-parallel replica, and the engine's own name or else order in it.
    found: dict[tuple[str, int, str | int], list[tuple[Rank, int]]] = {}
    for rank in ranks:
        parallel = rank.metadata.get("parallel")
        said = parallel.get("data_parallel_rank") if isinstance(parallel, dict) else 0
        replica = said if isinstance(said, int) else 0
        for index, (name, which_one) in apart(rank.requests).items():
            if name == id:
                found.setdefault((rank.run, replica, which_one), []).append((rank, index))
    keys = sorted(found, key=lambda key: (*key[:2], min(index for _, index in found[key])))
    if not keys:
        raise TraceError(f"there is no request {id!r} in this selection")
    if which is None and len(keys) > 1:
        raise TraceError(
            f"{id!r} is the name of {len(keys)} requests, in the runs {', '.join(dict.fromkeys(k[0] for k in keys))}: "
            f"select a run, or say which of them with which=0 (the first) to which={len(keys) - 1}"
        )
    try:
        chosen = found[keys[0 if which is None else which]]
    except IndexError:
        raise TraceError(f"there are only {len(keys)} requests {id!r}: which={which} is none of them") from None
    layers = selection.layers
    stages: dict[tuple[int, ...], list[_InRank]] = {}  # by their layers; ranks that have the same are its shards
    for rank, index in chosen:
        of_rank = tuple(layer for layer in layers if layer in rank.layers)
        if of_rank:
            stages.setdefault(of_rank, []).append(_InRank(rank, index, of_rank, resolve))
    return TokenSequence(id, layers, selection.one_layer, [_Shards(shards) for _, shards in sorted(stages.items())])
