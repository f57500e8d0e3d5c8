"""Counts by layer and class: what blocks and footers hold, and what is made from rows where a selection cuts through
a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.errors import DamagedTrace

_EXACT = 1 << 53  # float64, in which numpy adds by cell, is exact up to here


@dataclass
class LayerStats:
    """Totals of one layer.

    Attributes:
        rows: tokens.
        counts: int64 `[experts]`: how often each expert was chosen.
        weight_sums: float64 `[experts]`: sum of the weights it was chosen with; zeros where weights were not recorded.
        invalid: ids that were no expert's. `counts.sum() + invalid == k * rows`.
    """

    rows: int = 0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    weight_sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    invalid: int = 0

    def add(self, experts: Any, counts: Any, weights: Any) -> None:
        """Add counts and sums of weights of some experts (an index or a slice for the arrays)."""
        self.counts[experts] += counts
        self.weight_sums[experts] += weights

    def grow(self, experts: int) -> None:
        """Have room for `experts` experts."""
        missing = experts - len(self.counts)
        if missing > 0:
            self.counts = np.concatenate((self.counts, np.zeros(missing, np.int64)))
            self.weight_sums = np.concatenate((self.weight_sums, np.zeros(missing)))

    def add_rows(self, ids: npt.NDArray[Any], weights: npt.NDArray[Any] | None) -> None:
        """Add rows: ids `[rows, k]` uint8 or uint16 (the largest value marks an invalid one), weights of the same
        shape or None.
        """
        self.rows += len(ids)
        flat = ids.reshape(-1)
        legal = flat != np.iinfo(ids.dtype).max
        invalid = int(flat.size - np.count_nonzero(legal))
        if invalid:
            self.invalid += invalid
            flat = flat[legal]
        if flat.size == 0:
            return
        counts = np.bincount(flat)
        self.grow(len(counts))
        self.counts[: len(counts)] += counts
        if weights is not None:
            values = weights.reshape(-1) if not invalid else weights.reshape(-1)[legal]
            self.weight_sums[: len(counts)] += np.bincount(flat, weights=values.astype(np.float64))


def add_groups(
    into: dict[int, LayerStats],
    groups: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    wanted: Callable[[int, int], bool],
) -> None:
    """Add the tables *stat_groups* and *stat_counts* of a block or footer, the groups for which `wanted(layer,
    class)` holds.

    Raises DamagedTrace where the tables contradict each other; then nothing has been added.
    """
    items = groups["items"].astype(np.int64)
    if int(items.sum()) != len(counts):
        raise DamagedTrace("the statistics of a block do not fit together")
    starts = np.zeros(len(counts) + 1, bool)
    starts[np.cumsum(items) - items] = True  # the last may lie behind the counts, where a group has none
    ascends = counts["expert"][1:] > counts["expert"][:-1]
    if not np.all(ascends | starts[1 : len(counts)]):
        raise DamagedTrace("the statistics of a block do not ascend")
    if any(np.any(table[name] > _EXACT) for table, name in ((counts, "count"), (groups, "rows"), (groups, "invalid"))):
        raise DamagedTrace("the statistics of a block count more than can be")
    take = np.fromiter(
        (wanted(layer, cls) for layer, cls in zip(groups["layer"].tolist(), groups["cls"].tolist(), strict=True)),
        bool,
        len(groups),
    )
    layers, place = np.unique(groups["layer"][take], return_inverse=True)
    taken = counts[np.repeat(take, items)]
    # All layers at once: a cell for each layer and expert.
    width = int(taken["expert"].max()) + 1 if len(taken) else 0
    cells = np.repeat(place, items[take]) * width + taken["expert"]
    shape = len(layers), width
    sums = (np.bincount(cells, taken[name], len(layers) * width).reshape(shape) for name in ("count", "weight"))
    rows, invalid = (np.bincount(place, groups[name][take], len(layers)) for name in ("rows", "invalid"))
    ends = np.zeros(len(layers), np.int64)
    last = np.cumsum(items)[take] - 1  # of each group, its last count, and so its largest expert
    some = items[take] > 0
    np.maximum.at(ends, place[some], counts["expert"][last[some]].astype(np.int64) + 1)
    for i, (layer, of_counts, of_weights) in enumerate(zip(layers.tolist(), *sums, strict=True)):
        stats = into.get(layer)
        if stats is None:
            stats = into[layer] = LayerStats()
        end = int(ends[i])
        stats.grow(end)
        stats.add(slice(end), of_counts[:end].astype(np.int64), of_weights[:end])
        stats.rows += int(rows[i])
        stats.invalid += int(invalid[i])


class Sums:
    """Totals by layer and class, to be written: the tables *stat_groups* and *stat_counts* of a block, or their sum
    for a footer.
    """

    def __init__(self) -> None:
        self._totals: dict[int, dict[int, LayerStats]] = {}  # by class, then layer
        self._k: dict[tuple[int, int], int] = {}

    def add_tables(self, groups: npt.NDArray[Any], counts: npt.NDArray[Any]) -> None:
        """Add the tables of a block."""
        for cls in np.unique(groups["cls"]).tolist():
            add_groups(self._totals.setdefault(cls, {}), groups, counts, lambda _, of, cls=cls: of == cls)  # type: ignore[misc]
        for group in groups:
            self._k[int(group["layer"]), int(group["cls"])] = int(group["k"])

    def add_rows(
        self, layer: int, classes: npt.NDArray[Any], ids: npt.NDArray[Any], weights: npt.NDArray[Any] | None
    ) -> None:
        """Add rows: classes `[rows]`, ids `[rows, k]`, weights of the same shape or None."""
        for cls in np.unique(classes).tolist():
            mine = classes == cls
            stats = self._totals.setdefault(cls, {}).setdefault(layer, LayerStats())
            stats.add_rows(ids[mine], None if weights is None else weights[mine])
            self._k[layer, cls] = ids.shape[1]

    def add_stats(self, cls: int, k: int, of_layers: Mapping[int, LayerStats]) -> None:
        """Add totals of one class, of rows with `k` ids, by layer."""
        for layer, new in of_layers.items():
            stats = self._totals.setdefault(cls, {}).setdefault(layer, LayerStats())
            stats.grow(len(new.counts))
            stats.add(slice(len(new.counts)), new.counts, new.weight_sums)
            stats.rows += new.rows
            stats.invalid += new.invalid
            self._k[layer, cls] = k

    def tables(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The two tables."""
        groups, items = [], []
        for layer, cls in sorted(self._k):
            stats = self._totals[cls][layer]
            experts = np.flatnonzero(stats.counts)
            groups.append((layer, cls, self._k[layer, cls], len(experts), stats.rows, stats.invalid))
            part = np.zeros(len(experts), fmt.TABLES[fmt.STAT_COUNTS])
            part["expert"], part["count"], part["weight"] = experts, stats.counts[experts], stats.weight_sums[experts]
            items.append(part)
        counts = np.concatenate(items) if items else np.zeros(0, fmt.TABLES[fmt.STAT_COUNTS])
        return np.array(groups, fmt.TABLES[fmt.STAT_GROUPS]), counts
