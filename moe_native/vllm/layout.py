"""Which worker of an engine records which rows: the rules of vLLM's parallel layouts, as pure functions.

- Tensor-parallel ranks route alike: the first one records for all. Under sequence-parallel MoE each has a shard of the
  step's rows, and records it.
- A pipeline stage records its own layers.
- A data-parallel rank records its own rows. A router may see them alone, or among those of all ranks.
- Under dual-batch overlap a step runs as several microbatches, each in a thread of its own.

The row layouts are those that vLLM's `RoutedExpertsCapturer.capture` tells apart, by the number of rows that a router's
tensor has. Where two of them have the same number, a rank's rows lie at the same place in both. A tensor of any other
number of rows is not recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Span = tuple[int, int]  # (first, count)


def records(parallel: Mapping[str, Any]) -> bool:
    """Whether a worker at this place of the parallel layout (`metadata.parallel_layout`) records."""
    return parallel["tensor_parallel_rank"] == 0 or bool(parallel["sequence_parallel"])


def needs_places(parallel: Mapping[str, Any]) -> bool:
    """Whether a step's rows may lie elsewhere than at the start of a router's tensors."""
    return parallel["data_parallel_size"] > 1 or bool(parallel["sequence_parallel"]) or parallel["microbatches"] > 1


def obstacle(parallel: Mapping[str, Any]) -> str:
    """Why no layer can be recorded in this layout; empty when they can."""
    if parallel["prefill_context_parallel_size"] > 1:
        return "prefill context parallelism: which rank has which rows of a prompt is not known here"
    return ""


@dataclass(frozen=True)
class Shard:
    """The rows `[first, first + count)` of a batch that a rank records, and where a router's tensor has them: `starts`
    maps the number of its rows to the row at which they begin."""

    first: int
    count: int
    starts: Mapping[int, int]


def shard(
    rows: int, tokens: Sequence[int], *, dp_rank: int, tp_rank: int, tp_size: int, sequence_parallel: bool
) -> Shard:
    """The rule for one batch.

    Args:
        rows: the batch's real rows on this data-parallel rank.
        tokens: of each data-parallel rank, the number of its rows with padding.

    Raises:
        ValueError: a rank has more real rows than rows.
    """
    own, before = tokens[dp_rank], tokens[:dp_rank]
    if rows > own:
        raise ValueError(f"{rows} rows in a batch of {own}")
    shards = tp_size if sequence_parallel else 1
    size = -(-own // shards)  # each is padded to this size
    first = min((tp_rank * size) if sequence_parallel else 0, rows)
    count = min(first + size, rows) - first
    starts = {
        # The later ones do not replace the earlier: it is the order in which vLLM asks.
        size: 0,  # this rank's shard
        sum(-(-n // shards) * shards for n in tokens): sum(-(-n // shards) * shards for n in before) + first,
        own: first,  # this data-parallel rank's rows
        sum(tokens): sum(before) + first,  # those of all data-parallel ranks
    }
    return Shard(first, count, starts)


@dataclass(frozen=True)
class Plan:
    """A step as a rank records it.

    Attributes:
        kept: the spans of the step's rows that it records, ascending.
        places: for each microbatch what `Recorder.place` takes; the step's rows are counted among the kept ones.
    """

    kept: tuple[Span, ...]
    places: tuple[tuple[tuple[int, int, int, int], ...], ...]

    @property
    def rows(self) -> int:
        """How many rows it records."""
        return sum(count for _, count in self.kept)


def plan(
    rows: int, batches: Sequence[Sequence[int]], *, dp_rank: int, tp_rank: int, tp_size: int, sequence_parallel: bool
) -> Plan:
    """The rule for a step of `rows` real rows, which runs as one batch or as several microbatches one after the other.

    Args:
        batches: of each of them, the rows that each data-parallel rank has in it, with padding. Padding is at the end.

    Raises:
        ValueError: the batches have fewer rows than the step.
    """
    start = recorded = 0
    kept, places = [], []
    for tokens in batches:
        real = min(rows - start, tokens[dp_rank])
        own = shard(
            real, tokens, dp_rank=dp_rank, tp_rank=tp_rank, tp_size=tp_size, sequence_parallel=sequence_parallel
        )
        kept.append((start + own.first, own.count))
        places.append(tuple((n, first, recorded, own.count) for n, first in own.starts.items()))
        recorded += own.count
        start += real
    if start < rows:
        raise ValueError(f"a step of {rows} rows runs in batches that have {start} of them")
    return Plan(tuple(span for span in kept if span[1]), tuple(places))


# What was found out for all rows of a step, cut down to those that a rank records.


def cut_runs(runs: npt.NDArray[np.void], kept: Sequence[Span]) -> npt.NDArray[np.void]:
    """The runs of the kept rows: `[runs]` of `RUN_DTYPE`, in the order of the rows."""
    ends = np.cumsum(runs["count"].astype(np.int64))
    starts = ends - runs["count"]
    parts = [runs[:0]]
    for first, count in kept:
        low, high = np.maximum(starts, first), np.minimum(ends, first + count)
        inside = low < high
        part = runs[inside].copy()
        known = part["position"] != np.uint32(0xFFFFFFFF)
        part["position"][known] += (low - starts)[inside][known].astype(np.uint32)
        part["count"] = (high - low)[inside]
        parts.append(part)
    return np.concatenate(parts)


def cut_rows(per_row: npt.NDArray[Any], kept: Sequence[Span]) -> npt.NDArray[Any]:
    """The kept rows of an array `[rows, …]`."""
    return np.concatenate([per_row[:0], *(per_row[first : first + count] for first, count in kept)])


def cut_span(first: int, count: int, kept: Sequence[Span]) -> list[Span]:
    """Where the rows `[first, first + count)` of the step lie among the kept ones."""
    found, before = [], 0
    for start, size in kept:
        low, high = max(first, start), min(first + count, start + size)
        if low < high:
            found.append((before + low - start, high - low))
        before += size
    return found
