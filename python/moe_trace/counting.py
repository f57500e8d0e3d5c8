"""What is counted of a selection: from the statistics of whole blocks where these will do, else row by row."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import Batch, Filter
from moe_trace.block import Block
from moe_trace.errors import TraceError
from moe_trace.rank import Rank
from moe_trace.statistics import LayerStats
from moe_trace.units import count

BatchOf = Callable[[Rank, Block, Filter], Batch | None]  # what is selected of a block


def statistics(
    asked: Filter, ranks: Sequence[Rank], layers: Sequence[int], experts: Mapping[int, int], batch_of: BatchOf
) -> dict[int, LayerStats]:
    """`Selection.stats`, which says what is counted where.

    Args:
        experts: the number of experts by layer, where it is known.
    """
    into: dict[int, LayerStats] = {layer: LayerStats() for layer in layers}

    def wanted(layer: int, cls: int) -> bool:
        return layer in layers and asked.takes_class(cls)

    whole: list[Block] = []
    for rank in ranks:
        if asked.by_class and asked.any_time:
            rank.add_statistics(into, wanted)
        else:
            _add_blocks(asked, rank, into, wanted, batch_of, whole)
    if whole:
        first, last = min(block.first_time_ns for block in whole), max(block.last_time_ns for block in whole)
        warnings.warn(
            "what is counted but not stored cannot be cut: the counts include all steps of "
            f"{count(len(whole), 'block')} that the selection cuts, from {_utc(first)} to {_utc(last)} UTC "
            f"(steps {min(b.first_step for b in whole):,} to {max(b.last_step for b in whole):,})",
            stacklevel=3,
        )
    if asked.current and asked.requests is None and any(n < of for n, of in (rank.row_totals for rank in ranks)):
        warnings.warn(
            "of rows that are counted and not stored it is not known which are current: the counts are of stored rows "
            "only",
            stacklevel=3,
        )
    for layer, stats in into.items():
        stats.grow(experts.get(layer, 0))
    return into


def _add_blocks(
    asked: Filter,
    rank: Rank,
    into: dict[int, LayerStats],
    wanted: Callable[[int, int], bool],
    batch_of: BatchOf,
    whole: list[Block],
) -> None:
    """`whole` gets the blocks that the selection cuts, and that are counted whole because they have no rows."""
    for block in rank.blocks():
        spans = block.first_time_ns, block.last_time_ns, block.first_step, block.last_step
        if asked.by_class and asked.covers(*spans):
            block.add_statistics(into, wanted)
        elif asked.by_class and block.executed_rows > block.rows:
            if not asked.misses(*spans):
                block.add_statistics(into, wanted)
                whole.append(block)
        elif (batch := batch_of(rank, block, asked)) is not None:
            for layer in batch.layers:
                ids = batch.column(fmt.IDS, layer)
                if ids is not None:
                    into.setdefault(layer, LayerStats()).add_rows(ids, batch.column(fmt.WEIGHTS, layer))


def first_choices(
    batches: Iterable[Batch], layers: Sequence[int], experts: Mapping[int, int]
) -> dict[int, npt.NDArray[np.int64]]:
    """How often each expert had the largest weight of a row: int64 `[experts]` by layer.

    Raises:
        TraceError: a layer has no weights.
    """
    into = {layer: np.zeros(experts.get(layer, 0), np.int64) for layer in layers}
    for batch in batches:
        for layer in batch.layers:
            ids, weights = batch.column(fmt.IDS, layer), batch.column(fmt.WEIGHTS, layer)
            if ids is None or weights is None:
                raise TraceError(f"layer {layer} has no weights, and the first choice is the largest weight")
            first = np.take_along_axis(ids, weights.argmax(axis=1)[:, None], axis=1)[:, 0]
            counts = np.bincount(first[first != np.iinfo(first.dtype).max])
            old = into.setdefault(layer, np.zeros(0, np.int64))
            grown = np.zeros(max(len(old), len(counts)), np.int64)
            grown[: len(old)] += old
            grown[: len(counts)] += counts
            into[layer] = grown
    return into


def table(of_layers: Mapping[int, npt.NDArray[Any]], one_layer: bool, dtype: Any) -> npt.NDArray[Any]:
    """`[layers, experts]` from `[experts]` of each, zeros where a layer has fewer; of `one_layer` without that axis."""
    rows = [values for _, values in sorted(of_layers.items())]
    if one_layer:
        return rows[0] if rows else np.zeros(0, dtype)
    found = np.zeros((len(rows), max((len(row) for row in rows), default=0)), dtype)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found


def _utc(ns: int) -> str:
    return str(np.datetime64(ns, "ns").astype("datetime64[ms]")).replace("T", " ")
