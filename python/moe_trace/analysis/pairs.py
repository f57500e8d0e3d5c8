"""Which experts are chosen together in a layer, and which follow which from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from moe_trace import metrics
from moe_trace.analysis.accumulator import Accumulator, add_to
from moe_trace.analysis.part import Part
from moe_trace.errors import TraceError
from moe_trace.metrics.arrays import Floats, Ints


@dataclass
class Coactivation(Accumulator):
    """How often two experts of a layer were chosen for the same token. Holds 8·E² bytes for each layer.

    Args:
        adjacent: only choices of adjacent ranks (`metrics.adjacent_counts`), which needs weights.
        layers: only these; None: each selected layer.

    Attributes:
        counts: by layer, int64 `[E, E]`, with N_i on the diagonal.
        rows: by layer, how many tokens.
    """

    adjacent: bool = False
    layers: tuple[int, ...] | None = None
    counts: dict[int, Ints] = field(init=False, default_factory=dict)
    rows: dict[int, int] = field(init=False, default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "weights") if self.adjacent else ("ids",))

    def add(self, part: Part) -> None:
        for layer in part.layers:
            if self.layers is not None and layer not in self.layers:
                continue
            ids, experts = part.ids(layer), part.experts(layer)
            if self.adjacent:
                weights = part.weights(layer)
                if weights is None:
                    raise TraceError(f"layer {layer} has no weights, and ranks are told by them: use adjacent=False")
                counts = metrics.adjacent_counts(ids, weights, experts)
            else:
                counts = metrics.coactivation_counts(ids, experts)
            add_to(self.counts, layer, counts)
            self.rows[layer] = self.rows.get(layer, 0) + part.rows

    def merge(self, later: Self) -> None:
        for layer, counts in later.counts.items():
            add_to(self.counts, layer, counts)
            self.rows[layer] = self.rows.get(layer, 0) + later.rows[layer]

    def share(self, layer: int) -> Floats:
        """N_ij / N_i, float64 `[E, E]` (`metrics.coactivation`)."""
        return metrics.coactivation(self.counts[layer])


@dataclass
class Transitions(Accumulator):
    """How often expert e of one layer and e' of another were chosen for the same token. Holds 8·E² bytes for each pair
    of layers.

    Args:
        pairs: of layers; None: each selected layer and the next one.
        first: only first choices, which needs weights; a token without one in both layers is left out.

    Attributes:
        counts: by pair of layers, int64 `[E_a, E_b]`.
        rows: by pair of layers, how many tokens have both.
    """

    pairs: tuple[tuple[int, int], ...] | None = None
    first: bool = False
    counts: dict[tuple[int, int], Ints] = field(init=False, default_factory=dict)
    rows: dict[tuple[int, int], int] = field(init=False, default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(("ids", "weights") if self.first else ("ids",))

    def add(self, part: Part) -> None:
        pairs = list(pairwise(part.wanted_layers)) if self.pairs is None else self.pairs
        pairs = [pair for pair in pairs if set(pair) <= set(part.layers)]
        chosen = {layer: self._chosen(part, layer) for pair in pairs for layer in pair}
        for a, b in pairs:
            counts = metrics.transition_counts(chosen[a], chosen[b], part.experts(a), part.experts(b))
            add_to(self.counts, (a, b), counts)
            self.rows[a, b] = self.rows.get((a, b), 0) + part.rows

    def _chosen(self, part: Part, layer: int) -> Ints:
        ids = part.ids(layer)
        if not self.first:
            return ids
        weights = part.weights(layer)
        if weights is None:
            raise TraceError(f"layer {layer} has no weights, and the first choice is the largest: use first=False")
        return metrics.first_choice(ids, weights)[:, None]

    def merge(self, later: Self) -> None:
        for pair, counts in later.counts.items():
            add_to(self.counts, pair, counts)
            self.rows[pair] = self.rows.get(pair, 0) + later.rows[pair]

    def share(self, a: int, b: int) -> Floats:
        """P(e' at layer b | e at layer a), float64 `[E_a, E_b]` (`metrics.transition`)."""
        return metrics.transition(self.counts[a, b])

    def mutual_information(self, a: int, b: int) -> float:
        """In nats (`metrics.mutual_information`)."""
        return float(metrics.mutual_information(self.counts[a, b]))
