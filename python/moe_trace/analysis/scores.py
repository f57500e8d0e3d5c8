"""How sure routers are, from logits where these are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Self

import numpy as np

from moe_trace import metrics
from moe_trace.analysis.accumulator import Accumulator, add_to
from moe_trace.analysis.part import Part
from moe_trace.metrics.arrays import Floats, Ints
from moe_trace.units import count

FIGURES = ("confidence", "margin", "entropy")


@dataclass
class RouterScores(Accumulator):
    """Distributions of confidence, margin and entropy by layer, all of softmax(logits): of softmax routers only, and
    not of those that select by group, by sigmoid scores or with a bias (`moe_trace.metrics.scores` says why).

    Args:
        bins: of equal width from 0 to 1.

    Attributes:
        histograms: by layer and figure, int64 `[bins]`: `confidence` (top-1 probability), `margin` (the k-th largest
            probability less the next, k being the width of the row) and `entropy` (divided by ln E). What lies on an
            edge is in the bin above it, 1 in the last.
        unknown: by layer and figure, rows that have no value: NaN among the logits, or k = E for a margin.
        without: by layer, rows whose logits are not stored.
    """

    bins: int = 100
    histograms: dict[tuple[int, str], Ints] = field(init=False, default_factory=dict)
    unknown: dict[tuple[int, str], int] = field(init=False, default_factory=dict)
    without: dict[int, int] = field(init=False, default_factory=dict)
    # Floats that are added in another order have another sum; fractions do not.
    _sums: dict[tuple[int, str], Fraction] = field(init=False, default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "logits"))

    def add(self, part: Part) -> None:
        for layer in part.layers:
            logits = part.logits(layer)
            if logits is None:
                self.without[layer] = self.without.get(layer, 0) + part.rows
                continue
            k, experts = part.ids(layer).shape[1], logits.shape[1]
            values = {
                "confidence": metrics.confidence(logits),
                "margin": metrics.margin(metrics.softmax(logits), min(k, experts)),
                "entropy": metrics.router_entropy(logits) / (np.log(experts) if experts > 1 else np.nan),
            }
            for name, of_rows in values.items():
                known = np.clip(of_rows[~np.isnan(of_rows)], 0, 1)  # rounding may lead a little beyond
                at = np.minimum((known * self.bins).astype(np.int64), self.bins - 1)
                unknown = len(of_rows) - len(known)
                self._add((layer, name), np.bincount(at, minlength=self.bins), unknown, Fraction(float(known.sum())))

    def merge(self, later: Self) -> None:
        for layer, rows in later.without.items():
            self.without[layer] = self.without.get(layer, 0) + rows
        for key, histogram in later.histograms.items():
            self._add(key, histogram, later.unknown[key], later._sums[key])

    def _add(self, key: tuple[int, str], histogram: Ints, unknown: int, total: Fraction) -> None:
        add_to(self.histograms, key, histogram)
        self.unknown[key] = self.unknown.get(key, 0) + unknown
        self._sums[key] = self._sums.get(key, Fraction(0)) + total

    @property
    def edges(self) -> Floats:
        """Of the bins, float64 `[bins + 1]`."""
        return np.linspace(0, 1, self.bins + 1)

    def mean(self, layer: int, figure: str) -> float:
        """Mean of `confidence`, `margin` or `entropy` over the rows that have it, not from the histogram; NaN without
        any."""
        rows = int(self.histograms[layer, figure].sum())
        return float(self._sums[layer, figure] / rows) if rows else float("nan")

    def notes(self) -> list[str]:
        """Which layers have rows without logits."""
        return [
            f"{count(rows, 'row')} of layer {layer} have no logits: they are in no figure of its scores"
            for layer, rows in sorted(self.without.items())
        ]
