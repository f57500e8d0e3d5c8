"""Ranks of one run that saw the same steps, read as one.

A data-parallel rank of an engine is a group of recording processes: pipeline stages, which record the same rows of
different layers, and sequence-parallel shards, which record different rows of the same steps. All of a group number
their steps alike (csrc/FORMAT.md, section 1). So two stages' rows are the same token iff they are the same row of the
same step, and of the same request and position. A row that one stage lacks, because it lost the step, is left out and
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import NOT_CURRENT, OTHER_ROWS, SUPERSEDED, Batch, Filter, Rows, other_widths, promote
from moe_trace.errors import TraceError
from moe_trace.notes import apart
from moe_trace.rank import Rank
from moe_trace.units import count

Shard = tuple[Rank, ...]  # its pipeline stages, in order
Group = tuple[Shard, ...]
Batches = Callable[[Rank, Filter], Iterator[Batch]]


def groups(ranks: Sequence[Rank]) -> list[Group]:
    """The ranks of one or more runs by group, in the order of their first ranks. Ranks whose metadata do not tell them
    apart are groups of their own.
    """
    found: dict[tuple[Any, ...], dict[int, dict[int, Rank]]] = {}
    for rank in ranks:
        group, shard, stage = _place(rank)
        stages = found.setdefault(group, {}).setdefault(shard, {})
        if stage in stages:
            found[(*group, rank.name)] = {shard: {stage: rank}}
        else:
            stages[stage] = rank
    return [
        tuple(tuple(stages[stage] for stage in sorted(stages)) for _, stages in sorted(shards.items()))
        for shards in found.values()
    ]


def absent(ranks: Sequence[Rank]) -> list[str]:
    """A sentence for each group of which a rank is missing, with its rows or layers; unless segments were deleted, and
    with the last one of a rank the rank.
    """
    if any(rank.deleted_segments for rank in ranks):
        return []
    found = []
    for group in groups(ranks):
        there, (shards, stages) = [rank for shard in group for rank in shard], _sizes(group[0][0])
        if len(there) < shards * stages:
            names = ", ".join(rank.name for rank in there)
            which = f"{count(shards * stages, 'rank')} that recorded the same steps, only {names}"
            found.append(f"{there[0].directory.parent} has, of {which}: what the others recorded is missing")
    return found


def _parallel(rank: Rank) -> dict[str, int]:
    """What its metadata say of the parallel layout, as far as it can be used."""
    said = rank.metadata.get("parallel")
    return {key: value for key, value in said.items() if isinstance(value, int)} if isinstance(said, dict) else {}


def _sizes(rank: Rank) -> tuple[int, int]:
    """How many shards and stages its group has."""
    parallel = _parallel(rank)
    shards = parallel.get("tensor_parallel_size", 1) if parallel.get("sequence_parallel") else 1
    return max(shards, 1), max(parallel.get("pipeline_parallel_size", 1), 1)


def _place(rank: Rank) -> tuple[tuple[Any, ...], int, int]:
    """(what tells its group from others, its shard, its stage)."""
    parallel, (shards, stages) = _parallel(rank), _sizes(rank)
    if shards == stages == 1:
        return (rank.run, rank.name), 0, 0
    stage = parallel.get("pipeline_parallel_rank", 0)
    shard = parallel.get("tensor_parallel_rank", 0) if shards > 1 else 0
    within = {"pipeline_parallel_rank", "tensor_parallel_rank" if shards > 1 else ""}
    others = sorted((key, value) for key, value in parallel.items() if key.endswith("_rank") and key not in within)
    return (rank.run, *others), shard, stage


def parts(ranks: Sequence[Rank], asked: Filter, batches: Batches) -> Iterator[Batch | Joined]:
    """What is selected, in an order in which it can be concatenated: the batches of groups of one rank, and the others
    joined. `batches(rank, asked)` reads those of a rank."""
    for group in groups(ranks):
        shards = [tuple(rank for rank in shard if _has_layers(rank, asked)) for shard in group]
        if len(shards) == 1 and len(shards[0]) <= 1:
            for rank in shards[0]:
                yield from batches(rank, asked)
            continue
        pipelines = [
            _Pipeline(shard, asked, batches, [other[0] for other in group if other is not whole])
            for shard, whole in zip(shards, group, strict=True)
            if shard
        ]
        if any(pipeline.stages for pipeline in pipelines):
            yield Joined(asked, [pipeline for pipeline in pipelines if pipeline.stages])


def _has_layers(rank: Rank, asked: Filter) -> bool:
    return bool(rank.layers if asked.layers is None else rank.layers.intersection(asked.layers))


class _Stage:
    """The selected rows of one rank, of all of its blocks."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        self.layers = tuple(sorted({layer for batch in batches for layer in batch.layers}))
        steps, rows = (self.per_row(name).astype(np.uint64) for name in ("step_numbers", "row_numbers"))
        self.keys = steps << np.uint64(32) | rows

    def per_row(self, name: str) -> npt.NDArray[Any]:
        return _concatenate([getattr(batch, name) for batch in self._batches])

    def column(self, field: int, layer: int) -> npt.NDArray[Any] | None:
        if layer != fmt.NO_LAYER and len({batch.layers for batch in self._batches}) > 1:
            raise TraceError(OTHER_ROWS)
        columns = [column for batch in self._batches if (column := batch.column(field, layer)) is not None]
        if len(columns) < len(self._batches):
            return None
        if len({column.shape[1:] for column in columns}) > 1:
            raise TraceError(other_widths(fmt.FIELD_NAMES[field]))
        return _concatenate(columns)


class _Pipeline:
    """The stages of one shard that have rows of the selection.

    Args:
        beside: a rank of each other shard.

    Attributes:
        places: for each stage, where it has the rows that all of them have.
        left_out: how many others there are.
    """

    def __init__(self, ranks: Shard, asked: Filter, batches: Batches, beside: Sequence[Rank]) -> None:
        self.stages: list[_Stage] = []
        self._first: Rank | None = None  # of the stages
        self._beside = beside
        of_all = replace(asked, current=False)  # what counts is known when all stages have said what they learnt
        for rank in ranks:
            found = list(batches(rank, _in_steps_of(self.stages[0], of_all) if self.stages else of_all))
            if found:
                self._first = self._first or rank
                self.stages.append(_Stage(found))
        if not self.stages:
            return
        keys = [stage.keys for stage in self.stages]
        common = reduce(np.intersect1d, keys)
        if len(self.stages) < len(ranks):
            common = common[:0]
        orders = [np.argsort(of_stage, kind="stable") for of_stage in keys]
        places = [order[np.searchsorted(of, common, sorter=order)] for of, order in zip(keys, orders, strict=True)]
        same = np.ones(len(common), bool)
        for name in ("positions", "request_ids"):
            first, *others = (stage.per_row(name)[at] for stage, at in zip(self.stages, places, strict=True))
            for other in others:
                same &= first == other
        self.left_out = len(reduce(np.union1d, keys)) - int(same.sum())
        self.places = [at[same] for at in places]
        if asked.current:
            counts = (self.flags & NOT_CURRENT) == 0
            self.places = [at[counts] for at in self.places]

    @property
    def flags(self) -> npt.NDArray[np.uint16]:
        """As of a batch; what one stage learnt of a row holds for all. A row may have been executed again in another
        shard."""
        of_stages = (stage.per_row("flags")[at] for stage, at in zip(self.stages, self.places, strict=True))
        flags: npt.NDArray[np.uint16] = reduce(np.bitwise_or, of_stages)
        for other in self._beside:
            flags[self._superseded_by(other)] |= SUPERSEDED
        return flags

    def _superseded_by(self, other: Rank) -> npt.NDArray[np.bool_]:
        assert self._first is not None
        requests, positions, steps = (
            self.stages[0].per_row(name)[self.places[0]] for name in ("request_numbers", "positions", "step_numbers")
        )
        there = {name: index for index, name in apart(other.requests).items()}
        known = {index: there.get(name, fmt.NOBODY) for index, name in apart(self._first.requests).items()}
        indices, inverse = np.unique(requests, return_inverse=True)
        of_other = np.array([known.get(int(index), fmt.NOBODY) for index in indices], np.int64)[inverse]
        return other.repeats.superseded(of_other, positions, steps)


def _concatenate(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(promote(parts)) if len(parts) > 1 else parts[0]


def _in_steps_of(stage: _Stage, asked: Filter) -> Filter:
    """What is asked of further stages. They begin a step later: it is the first one's time that counts."""
    if asked.first_ns is None and asked.end_ns is None:
        return asked
    steps = stage.per_row("step_numbers")
    first, end = int(steps.min()), int(steps.max()) + 1
    return replace(asked, first_ns=None, end_ns=None, first_step=first, end_step=end)


class Joined(Rows):
    """The selected rows of one group, in the order of its steps; of a step, shard by shard.

    Attributes:
        left_out: how many rows are left out because not all stages have them.
    """

    def __init__(self, asked: Filter, pipelines: list[_Pipeline]) -> None:
        self._asked = asked
        self._pipelines = [pipeline for pipeline in pipelines if len(pipeline.places[0])]
        self.layers = tuple(sorted({layer for p in self._pipelines for stage in p.stages for layer in stage.layers}))
        self.left_out = sum(pipeline.left_out for pipeline in pipelines)

    @cached_property
    def _order(self) -> npt.NDArray[np.intp]:
        steps = [self._per_row(pipeline, "step_numbers") for pipeline in self._pipelines]
        return np.argsort(_concatenate(steps), kind="stable")

    @staticmethod
    def _per_row(pipeline: _Pipeline, name: str) -> npt.NDArray[Any]:
        rows: npt.NDArray[Any] = pipeline.stages[0].per_row(name)[pipeline.places[0]]
        return rows

    def _ordered(self, of_shards: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return _concatenate(of_shards)[self._order] if len(of_shards) > 1 else of_shards[0]

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return sum(len(pipeline.places[0]) for pipeline in self._pipelines)

    def column(self, field: int, layer: int) -> npt.NDArray[Any] | None:
        """One column of one layer, `[rows, width]`; None where it is not everywhere."""
        found = []
        for pipeline in self._pipelines:
            for stage, at in zip(pipeline.stages, pipeline.places, strict=True):
                if layer in (*stage.layers, fmt.NO_LAYER) and (column := stage.column(field, layer)) is not None:
                    found.append(column[at])
                    break
            else:
                return None
        return self._ordered(found)

    def by_request(self, of: Callable[[Rank, npt.NDArray[Any]], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """What `of(rank, request numbers)` gives for rows of a rank, for all rows. A rank numbers its requests as it
        pleases: a row has the number of the first stage of its pipeline.
        """
        found = []
        for pipeline in self._pipelines:
            assert pipeline._first is not None
            found.append(of(pipeline._first, self._per_row(pipeline, "request_numbers")))
        return self._ordered(found)

    @cached_property
    def flags(self) -> npt.NDArray[np.uint16]:
        """As of a batch."""
        return self._ordered([pipeline.flags for pipeline in self._pipelines])

    def __getattr__(self, name: str) -> Any:
        """The other attributes of a batch, `[rows]`: the same in all stages."""
        if name not in PER_ROW:
            raise AttributeError(name)
        return self._ordered([self._per_row(pipeline, name) for pipeline in self._pipelines])


PER_ROW = ("positions", "request_ids", "phases", "modalities", "step_numbers", "row_numbers", "times")
