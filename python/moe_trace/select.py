"""Selections: which rows of a trace, said as one would ask for them. Nothing is read before a result is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import counting, joined
from moe_trace import format as fmt
from moe_trace.batch import OTHER_ROWS, Batch, Filter, other_widths, promote, request_names, these
from moe_trace.block import Block
from moe_trace.errors import DamagedTrace, TraceError
from moe_trace.joined import Joined
from moe_trace.rank import Rank
from moe_trace.sequence import TokenSequence, assemble
from moe_trace.statistics import LayerStats
from moe_trace.units import count, since, unix_ns

if TYPE_CHECKING:
    from moe_trace.trace import Trace

_FIELDS = {name: field for field, name in fmt.FIELD_NAMES.items()}
_INT64 = np.iinfo(np.int64)

Moment = datetime | np.datetime64 | str | float  # how a time may be given; see `Selection.between`


class Selection:
    """Some rows of a trace; a trace is the selection of all of its rows.

    Methods narrow it and return a new selection: `trace.layer(12).decode().request("chat-17")`. Results are numpy
    arrays in the order of execution,
    with `rows` the number of tokens selected. `.layer(3)` gives arrays without a layer axis, `.layer([3, 4])` and no
    `.layer` at all give
    `[rows, layers, …]`, layers ascending.
    """

    def __init__(self, trace: Trace, asked: Filter) -> None:
        self._of = trace
        self._asked = asked

    @property
    def _trace(self) -> Trace:
        return self._of

    def _narrow(self, **what: Any) -> Selection:
        return Selection(self._trace, replace(self._asked, **what))

    # Narrowing.

    def layer(self, layers: int | Iterable[int]) -> Selection:
        """One layer (its axis is dropped), or several. The model's own indices. Raises TraceError for a layer that
        was not recorded.
        """
        one = isinstance(layers, (int, np.integer))
        wanted = (int(layers),) if one else tuple(sorted({int(layer) for layer in layers}))  # type: ignore[arg-type,union-attr]
        recorded = self._recorded_layers()
        for layer in wanted:
            if layer not in recorded:
                entry = next((entry for entry in self._trace.coverage if entry.layer == layer), None)
                if entry is None or entry.recorded:
                    raise TraceError(f"layer {layer} is not in {self._trace.path}, which has {these(recorded)}")
                raise TraceError(f"layer {layer} was {entry.status}: {entry.detail or 'no reason is given'}")
        if self._asked.layers is not None:
            wanted = tuple(layer for layer in wanted if layer in self._asked.layers)
        return self._narrow(layers=wanted, one_layer=one)

    def phase(self, *phases: str) -> Selection:
        """Rows of some of the phases `prefill`, `decode`, `unknown`."""
        return self._narrow(phases=_codes(phases, fmt.PHASES, "phase", self._asked.phases))

    def prefill(self) -> Selection:
        """Rows of prompts: their position is below the prompt's length."""
        return self.phase("prefill")

    def decode(self) -> Selection:
        """Rows of generated tokens."""
        return self.phase("decode")

    def modality(self, *modalities: str) -> Selection:
        """Rows of some of the modalities `text`, `image`, `video`, `audio`, `unknown`."""
        return self._narrow(modalities=_codes(modalities, fmt.MODALITIES, "modality", self._asked.modalities))

    def current(self) -> Selection:
        """Only the rows that count: of several rows of one position the last, and no draft token that was rejected or
        whose fate is not known.

        Without it, everything that was executed is selected: what a preempted request executed before it started
        over, and rejected drafts; `flags` tells them apart.
        """
        return self._narrow(current=True)

    def request(self, *ids: str) -> Selection:
        """Rows of these requests, by the names that their users know.

        A name that several of the selected runs have stands for all of their requests, and a UserWarning says so:
        select a run before (`trace.run(-1).request("0")`), or tell them apart by `Batch.run`. Raises TraceError for a
        name that is not in the trace.
        """
        for id in ids:
            request = self._trace.requests.get(id)
            if request is None:
                known = list(self._trace.requests)
                some = ", ".join(map(repr, known[:5])) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
                kept = (
                    " (not every request is stored: it was sampled)"
                    if self._trace.executed_rows > self._trace.stored_rows
                    else ""
                )
                raise TraceError(f"there is no request {id!r} in this trace; it has {some or 'none'}{kept}")
            runs = [run for run in request.runs if self._asked.runs is None or run in self._asked.runs]
            if len(runs) > 1:
                which = f"{len(runs)} runs, {runs[0]} to {runs[-1]}"
                warnings.warn(f"request {id!r} is in {which}: the rows of all of them are selected", stacklevel=2)
        wanted = frozenset(ids)
        return self._narrow(requests=wanted if self._asked.requests is None else wanted & self._asked.requests)

    def sequence(self, id: str, *, resolve_cached: bool = True, which: int | None = None) -> TokenSequence:
        """The routing of one request, position by position, as `[positions, layers, …]`.

        Args:
            id: the name that its user knows.
            resolve_cached: give positions that the engine had in its prefix cache, and so did not execute, the rows of
                the request that computed them (and say so in `TokenSequence.state`); else they stay without.
            which: where several requests have this name, the one that is meant, 0 the first.

        Only the layers and the run of this selection matter; its phases, times and so on do not.

        Raises:
            TraceError: there is no such request, or there are several and `which` was not given.
        """
        return assemble(self, self._ranks, id, resolve_cached, which)

    def run(self, which: str | int) -> Selection:
        """Rows of one run: by its name, or by its index in `trace.runs` (0 the oldest, -1 the newest). Raises
        TraceError for a run that is not in the trace.
        """
        names = [run.name for run in self._trace.runs]
        if which not in names and (isinstance(which, str) or not -len(names) <= which < len(names)):
            raise TraceError(f"there is no run {which!r} in {self._trace.path}; it has {', '.join(names)}")
        wanted = frozenset((which if isinstance(which, str) else names[which],))
        return self._narrow(runs=wanted if self._asked.runs is None else wanted & self._asked.runs)

    def between(self, start: Moment | None, end: Moment | None) -> Selection:
        """Rows of steps that began at or after `start` and before `end`; None for no bound. Datetimes and ISO times
        (local where they name no zone), numpy datetimes as in `times` (UTC), or Unix seconds. Raises ValueError for
        what is no time.
        """
        first, last = (None if t is None else _unix_ns(t) for t in (start, end))
        return self._between(first, last)

    def _between(self, first: int | None, last: int | None) -> Selection:
        first, last = (None if ns is None else min(max(ns, _INT64.min), _INT64.max) for ns in (first, last))
        firsts = [t for t in (first, self._asked.first_ns) if t is not None]
        ends = [t for t in (last, self._asked.end_ns) if t is not None]
        return self._narrow(first_ns=max(firsts, default=None), end_ns=min(ends, default=None))

    def since(self, when: str) -> Selection:
        """Rows of the last `30s`, `10m`, `2h`, `1d`, counted from now, or since an ISO time (local where it names no
        zone). Raises ValueError for anything else.
        """
        return self._between(since(when), None)

    def steps(self, first: int, end: int | None = None) -> Selection:
        """Rows of the steps `first` up to, not including, `end`; None for no end. Each run counts its steps from 0."""
        old = self._asked
        ends = [e for e in (end, old.end_step) if e is not None]
        return self._narrow(first_step=max(first, old.first_step or 0), end_step=min(ends, default=None))

    # Reading.

    def batches(self, left_out: list[str] | None = None) -> Iterator[Batch]:
        """The selection block by block, rank by rank. In memory there is one block, whatever the size of the trace;
        where requests are selected or asked for, the table of their names too. A batch has the layers of its rank: the
        stages of a pipeline are joined in the results of a selection, and not here.

        left_out: a list that gets a sentence for each damaged block of which it cannot be told what is selected; the
        block is then left out. Without the list, DamagedTrace is raised.
        """
        for rank in self._ranks:
            yield from self._batches_of(rank, self._asked, left_out)

    def _batches_of(self, rank: Rank, asked: Filter, left_out: list[str] | None = None) -> Iterator[Batch]:
        for block in rank.blocks():
            try:
                batch = self._batch(rank, block, asked)
            except DamagedTrace as error:
                if left_out is None:
                    raise
                left_out.append(f"{block.rows:,} rows are left out, their block is damaged: {error}")
                continue
            if batch is not None:
                yield batch

    def _parts(self) -> Iterator[Batch | Joined]:
        """What the results consist of, in their order: batches, and ranks that were joined."""
        for part in joined.parts(self._ranks, self._asked, self._batches_of):
            if isinstance(part, Joined) and part.left_out:
                lack = f"{count(part.left_out, 'row')} of {self._trace.path}"
                warnings.warn(f"{lack} are left out: not all stages of the pipeline have them", stacklevel=4)
            if part.rows:
                yield part

    def _batch(self, rank: Rank, block: Block, asked: Filter) -> Batch | None:
        """What is selected of a block; None for nothing."""
        spans = block.first_time_ns, block.last_time_ns, block.first_step, block.last_step
        if not block.rows or asked.misses(*spans):
            return None
        layers = block.layers if asked.layers is None else tuple(x for x in asked.layers if x in block.layers)
        keep = self._kept_runs(rank, block, asked) if layers else None
        if not layers or (keep is not None and not keep.any()):
            return None
        return Batch(rank, block, asked, layers, None if keep is None or keep.all() else keep)

    @property
    def _ranks(self) -> list[Rank]:
        runs = self._asked.runs
        return [rank for rank in self._trace.ranks if runs is None or rank.run in runs]

    def _recorded_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for rank in self._ranks for layer in rank.layers}))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers on the axis of `ids`, `counts()` and so on, ascending: those that were recorded, of those asked
        for.
        """
        recorded = self._recorded_layers()
        return recorded if self._asked.layers is None else tuple(x for x in self._asked.layers if x in recorded)

    @property
    def one_layer(self) -> bool:
        """Whether results have no layer axis."""
        return self._asked.one_layer

    def _kept_runs(self, rank: Rank, block: Block, asked: Filter) -> npt.NDArray[np.bool_] | None:
        keep: npt.NDArray[np.bool_] | None = None

        def also(mask: npt.NDArray[np.bool_]) -> None:
            nonlocal keep
            keep = mask if keep is None else keep & mask

        if asked.phases is not None or asked.modalities is not None:
            classes, inverse = np.unique(block.runs["cls"], return_inverse=True)
            also(np.array([asked.takes_class(int(cls)) for cls in classes], bool)[inverse])
        if asked.requests is not None:
            names = request_names(rank, block)
            also(np.fromiter((name in asked.requests for name in names), bool, len(names)))
        if not asked.covers(block.first_time_ns, block.last_time_ns, block.first_step, block.last_step):
            steps = block.steps
            wanted = np.ones(len(steps), bool)
            if asked.first_ns is not None:
                wanted &= steps["time_ns"] >= asked.first_ns
            if asked.end_ns is not None:
                wanted &= steps["time_ns"] < asked.end_ns
            if asked.first_step is not None:
                wanted &= steps["step"] >= asked.first_step
            if asked.end_step is not None:
                wanted &= steps["step"] < asked.end_step
            also(np.repeat(wanted, steps["runs"]))
        return keep

    def _joined(self, name: str, empty: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        found = list(self._parts())
        self._check_layers(found, name)
        parts = [getattr(part, name) for part in found]
        if not parts:
            return self._no_rows(_FIELDS[name]) if empty is None else empty
        if len({part.shape[1:] for part in parts}) > 1:
            raise TraceError(other_widths(name))
        return np.concatenate(promote(parts)) if len(parts) > 1 else parts[0]

    def _no_rows(self, field: int) -> npt.NDArray[Any]:
        """An array without rows, of the shape and the dtype that rows would have."""
        layers = self.layers
        shapes = (
            block.shape(field, layers[0])
            for rank in self._ranks
            for block in rank.blocks()
            if layers and block.has(field, layers[0])
        )
        dtype, width = next(shapes, (1, 0))
        axis = () if self._asked.one_layer else (len(layers),)
        return np.zeros((0, *axis, width), fmt.numpy_dtype(dtype))

    def _check_layers(self, batches: Sequence[Batch | Joined], name: str) -> None:
        if name in ("ids", "weights", "logits", "hidden") and len({batch.layers for batch in batches}) > 1:
            raise TraceError(OTHER_ROWS)

    @property
    def ids(self) -> npt.NDArray[Any]:
        """Expert ids, uint8 or uint16, `[rows, k]` or `[rows, layers, k]`; the dtype's largest value marks an id that
        was out of range.
        """
        return self._joined("ids")

    @property
    def weights(self) -> npt.NDArray[Any]:
        """Weights, of the shape of `ids`: float16, or what the router gave if it was recorded exactly (bfloat16 as
        float32).
        """
        return self._joined("weights")

    @property
    def logits(self) -> npt.NDArray[Any]:
        """Router logits, `[rows, experts]` or `[rows, layers, experts]`, in the router's dtype (bfloat16 as
        float32).
        """
        return self._joined("logits")

    @property
    def hidden(self) -> npt.NDArray[Any]:
        """The routers' inputs, `[rows, width]` or `[rows, layers, width]`."""
        return self._joined("hidden")

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token ids, int64 `[rows]`, -1 where unknown."""
        return self._joined("tokens", np.zeros(0, np.int64))

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Absolute positions in the requests, int64 `[rows]`, -1 where unknown."""
        return self._joined("positions", np.zeros(0, np.int64))

    @property
    def request_ids(self) -> npt.NDArray[np.object_]:
        """Names of the requests, object `[rows]`; None for a row that is nobody's."""
        return self._joined("request_ids", np.zeros(0, object))

    @property
    def step_numbers(self) -> npt.NDArray[np.int64]:
        """Number of each row's step in its run, int64 `[rows]`."""
        return self._joined("step_numbers", np.zeros(0, np.int64))

    @property
    def times(self) -> npt.NDArray[np.datetime64]:
        """Start of each row's step, UTC, datetime64[ns] `[rows]`."""
        return self._joined("times", np.zeros(0, "datetime64[ns]"))

    @property
    def flags(self) -> npt.NDArray[np.uint16]:
        """What became of the rows, added up; `[rows]`: 1 recomputed (the position had been executed before), 2 rejected
        draft, 4 superseded (a later row of the position counts), 8 discarded, 16 draft of unknown fate.
        """
        return self._joined("flags", np.zeros(0, np.uint16))

    @property
    def rows(self) -> int:
        """Number of rows: tokens, not tokens times layers. Where the layers are in several stages of a pipeline, the
        rows that all of these have; a UserWarning counts the others.
        """
        return sum(part.rows for part in self._parts())

    def __len__(self) -> int:
        return self.rows

    # Counting.

    def stats(self) -> dict[int, LayerStats]:
        """Rows, counts, sums of weights and invalid ids of each layer, by layer. Planes are read only where a
        selection cuts through a block.

        All executed rows are counted, also where only some are stored (`sample`, `fields="counts"`). A time or a range
        of steps that cuts through a block of such rows counts the whole block, and a UserWarning says from when to when
        the counts reach. Of requests, and of `current` rows, the stored ones are counted; a UserWarning says so of the
        latter.
        """
        return counting.statistics(self._asked, self._ranks, self.layers, self._trace.experts, self._batch)

    def counts(self) -> npt.NDArray[np.int64]:
        """How often each expert was chosen: int64 `[experts]` or `[layers, experts]` (zeros where a layer has fewer
        experts).
        """
        return self._per_expert({layer: stats.counts for layer, stats in self.stats().items()}, np.int64)

    def weight_sums(self) -> npt.NDArray[np.float64]:
        """Sum of the weights with which each expert was chosen: float64, of the shape of `counts()`."""
        return self._per_expert({layer: stats.weight_sums for layer, stats in self.stats().items()}, np.float64)

    def first_choice_counts(self) -> npt.NDArray[np.int64]:
        """How often each expert had the largest weight of a row: int64, of the shape of `counts()`. Reads planes, so it
        is of the rows that are stored. Raises TraceError where all rows are only counted.
        """
        if self._trace.executed_rows and not self._trace.stored_rows:
            raise TraceError(
                f"{self._trace.path} has counts only and no rows, and first choices are counted from rows. "
                "To store some, record with other fields than counts, and sample above 0"
            )
        return self._per_expert(counting.first_choices(self.batches(), self.layers, self._trace.experts), np.int64)

    def _per_expert(self, of_layers: dict[int, npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
        return counting.table(of_layers, self._asked.one_layer, dtype)

    def __repr__(self) -> str:
        asked = self._asked
        parts = [] if asked.layers is None else [these(asked.layers)]
        if asked.phases is not None:
            parts.append("/".join(fmt.PHASES[p] for p in sorted(asked.phases)))
        if asked.modalities is not None:
            parts.append("/".join(fmt.MODALITIES[m] for m in sorted(asked.modalities)))
        if asked.requests is not None:
            parts.append(f"{len(asked.requests)} requests")
        if asked.runs is not None:
            parts.append(", ".join(sorted(asked.runs)))
        if asked.current:
            parts.append("current rows")
        if not asked.any_time:
            parts.append("part of the time")
        return f"<moe_trace selection of {self._trace.path}: {', '.join(parts) or 'everything'}>"


def _codes(words: Sequence[str], known: Sequence[str], what: str, old: frozenset[int] | None) -> frozenset[int]:
    for word in words:
        if word not in known:
            raise ValueError(f"{word!r} is no {what}: use {', '.join(known)}")
    codes = frozenset(known.index(word) for word in words)
    return codes if old is None else codes & old


def _unix_ns(when: Moment) -> int:
    if not isinstance(when, np.datetime64):
        return unix_ns(when)
    if np.isnat(when):
        raise ValueError("NaT is no time")
    us = int(when.astype("datetime64[us]").astype(np.int64))
    # Nanoseconds reach from 1678 to 2262; beyond that they would wrap around.
    return int(when.astype("datetime64[ns]").astype(np.int64)) if abs(us) < 9 * 10**15 else us * 1000
