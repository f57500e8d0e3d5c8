"""How differently two traces use the experts of a layer, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_trace import metrics
from moe_trace.metrics.arrays import Floats, Ints

FEW = 20  # groups, below which percentiles are too narrow
TOP = 3
SHUFFLES = 999


def difference(a: Ints, b: Ints, *, paired: bool, resamples: int = 1000) -> dict[str, Any]:
    """How two loads of a layer differ, b against a: counts `[groups, experts]` of each, to the keys `distance` to `top`
    of a layer (`moe_trace.compare`).

    paired: whether both are of the same requests, which are then drawn together.
    """
    experts = max(a.shape[1], b.shape[1])
    a, b = (np.pad(of, [(0, 0), (0, experts - of.shape[1])]) for of in (a, b))
    both = (a.any(axis=1) & b.any(axis=1)) if paired else None
    sets = (a[both], b[both]) if both is not None else (a[a.any(axis=1)], b[b.any(axis=1)])
    found = metrics.bootstrap(_figures, *sets, paired=paired, resamples=resamples)
    value, low, high = found.value, found.low, found.high
    total = [of.sum(axis=0) for of in sets]
    share = [metrics.shares(of) for of in total]
    return {
        "groups": min(map(len, sets)),
        "distance": _distance(*sets, paired),
        "normalized_entropy": {**_sides(metrics.normalized_entropy, total), **_interval(value, low, high, 0)},
        "imbalance": {**_sides(metrics.imbalance, total), **_interval(value, low, high, 1)},
        "changed_experts": int(((low[2:] > 0) | (high[2:] < 0)).sum()),
        "top": [
            {
                "expert": int(e),
                "a": number(share[0][e]),
                "b": number(share[1][e]),
                **_interval(value, low, high, 2 + int(e)),
            }
            for e in np.argsort(-np.abs(value[2:]), kind="stable")[:TOP]
            if value[2 + e]
        ],
    }


def _figures(a: Floats, b: Floats) -> Floats:
    """What has an interval, counts `[..., E]` of each to `[..., 2 + E]`: the differences of normalised entropy and of
    imbalance, and those of each expert's share."""
    alone = [
        metrics.normalized_entropy(b) - metrics.normalized_entropy(a),
        metrics.imbalance(b) - metrics.imbalance(a),
    ]
    return np.concatenate([np.stack(alone, axis=-1), metrics.shares(b) - metrics.shares(a)], axis=-1)


def _distance(a: Ints, b: Ints, paired: bool) -> dict[str, float | None]:
    """The total variation distance of two loads `[groups, E]`, and what it is by chance.

    A distance is never negative, and of two samples of one distribution it is not 0: an interval would say too much. So
    it is held against what it is where nothing but chance tells the sides apart: the two sides of each group swapped at
    random where they are of the same requests, and else the groups dealt out anew (Fisher's randomisation test).
    """
    value = float(metrics.total_variation(a.sum(axis=0), b.sum(axis=0)))
    if min(len(a), len(b)) < 2 or np.isnan(value):
        return {"difference": number(value), "chance": None, "p": None}
    rng = np.random.default_rng(0)
    if paired:
        here = rng.integers(0, 2, (SHUFFLES, len(a))).astype(np.float64)
        first, both = here @ a + (1 - here) @ b, a.sum(axis=0) + b.sum(axis=0)
    else:
        pool = np.concatenate([a, b])
        here = rng.permuted(np.tile(np.arange(len(pool)) < len(a), (SHUFFLES, 1)), axis=1).astype(np.float64)
        first, both = here @ pool, pool.sum(axis=0)
    null = metrics.total_variation(first, both - first)
    null = null[~np.isnan(null)]
    least = value * (1 - 1e-12)  # sums in another order differ in their last bits
    p = (1 + int((null >= least).sum())) / (1 + len(null))
    return {"difference": value, "chance": number(null.mean()) if len(null) else None, "p": p}


def _sides(metric: Any, total: list[Ints]) -> dict[str, float | None]:
    return {side: number(metric(of)) for side, of in zip("ab", total, strict=True)}


def _interval(value: Floats, low: Floats, high: Floats, at: int) -> dict[str, float | None]:
    return {"difference": number(value[at]), "low": number(low[at]), "high": number(high[at])}


def number(value: Any) -> float | None:
    """As JSON has it: null for what has no value."""
    return float(value) if np.isfinite(value) else None
