"""What summaries and histograms say about expert load, as pure functions on counts.

Every function takes `counts`, an array `[..., E]` of how often each of E experts was chosen (assignments, any real
dtype, not negative), and works on the last axis; leading axes (layers, windows, requests) are kept. So c_e below is
`counts[..., e]` and p_e = c_e / sum(c). Nothing is averaged over layers here: whoever does that says how.

Where there is no assignment at all a ratio has no value and is NaN, never 0. Counts that are negative, not finite or
without an expert axis raise ValueError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def shares(counts: npt.ArrayLike) -> Floats:
    """p_e = c_e / sum(c): float64 `[..., E]`, each row of it adding up to 1, or all NaN without assignments."""
    c = _floats(counts)
    return _ratio(c, c.sum(axis=-1, keepdims=True))


def imbalance(counts: npt.ArrayLike) -> Floats:
    """max c / mean c: float64 `[...]`, from 1 (even) to E (one expert has everything).

    MaxVio of DeepSeek's loss-free balancing (arXiv 2408.15664) is this minus 1.
    """
    c = _floats(counts)
    return _ratio(c.max(axis=-1), c.mean(axis=-1))


def entropy(counts: npt.ArrayLike) -> Floats:
    """H = -sum p ln p in nats, with 0 ln 0 = 0: float64 `[...]`, from 0 to ln E (Shannon 1948)."""
    p = shares(counts)
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    return np.asarray(np.where(np.isnan(p).any(axis=-1), np.nan, np.maximum(-(p * logs).sum(axis=-1), 0.0)))


def normalized_entropy(counts: npt.ArrayLike) -> Floats:
    """H / ln E: float64 `[...]`, from 0 (one expert has everything) to 1 (even); NaN for a single expert.

    The same figure as in NeMo Automodel's load report.
    """
    h = entropy(counts)
    experts = np.shape(counts)[-1]
    return np.asarray(h / np.log(experts)) if experts > 1 else np.full_like(h, np.nan)


def effective_experts(counts: npt.ArrayLike) -> Floats:
    """exp(H): float64 `[...]`, from 1 to E: how many experts of equal load have this entropy (Hill number, order 1)."""
    return np.asarray(np.exp(entropy(counts)))


def dead_experts(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """How many experts have c_e = 0: int64 `[...]`; all E where nothing was recorded.

    NeMo Automodel gives this divided by E.
    """
    return np.asarray((_floats(counts) == 0).sum(axis=-1), dtype=np.int64)


def cv(counts: npt.ArrayLike, ddof: int = 0) -> Floats:
    """Coefficient of variation, std(c) / mean(c): float64 `[...]`.

    The population's (`ddof` 0) unless `ddof` says otherwise; NaN where E <= ddof.
    """
    c = _floats(counts)
    if c.shape[-1] <= ddof:
        return np.full(c.shape[:-1], np.nan)
    return _ratio(c.std(axis=-1, ddof=ddof), c.mean(axis=-1))


def gini(counts: npt.ArrayLike) -> Floats:
    """Gini coefficient: float64 `[...]`, from 0 (even) to (n - 1)/n.

    2 sum(i x_(i)) / (n sum(x)) - (n + 1)/n over the counts in ascending order, x_(1) <= … <= x_(n), n = E: half the
    mean absolute difference of two experts, relative to the mean.
    """
    x = np.sort(_floats(counts), axis=-1)
    n = x.shape[-1]
    weighted = (x * np.arange(1, n + 1)).sum(axis=-1)
    return np.asarray(2 * _ratio(weighted, n * x.sum(axis=-1)) - (n + 1) / n)


def top(counts: npt.ArrayLike, n: int = 3) -> npt.NDArray[np.int64]:
    """The n experts with the largest counts: int64 `[..., min(n, E)]`, descending; of equals the lower id comes first.

    An expert that was never chosen can be among them where fewer than n were: look at its count.
    """
    if n < 1:
        raise ValueError(f"top needs a positive n, not {n}")
    c = _checked(counts)
    # Integers are sorted as integers, which stay exact above 2**53; the reversal turns a stable ascending sort into
    # "descending, lower id first".
    ascending = np.argsort(c[..., ::-1], axis=-1, kind="stable")
    return np.asarray((c.shape[-1] - 1 - ascending)[..., ::-1][..., :n], dtype=np.int64)


def _floats(counts: npt.ArrayLike) -> Floats:
    return _checked(counts).astype(np.float64)


def _checked(counts: npt.ArrayLike) -> npt.NDArray[Any]:
    c = np.asarray(counts)
    if c.ndim == 0 or c.shape[-1] == 0:
        raise ValueError(f"counts need an axis of experts, but have the shape {c.shape}")
    if c.dtype.kind not in "uifb":
        raise ValueError(f"counts must be numbers, not {c.dtype}")
    if not np.isfinite(c).all() or (c < 0).any():
        raise ValueError("counts must be finite and not negative")
    return c


def _ratio(numerator: Floats, denominator: Any) -> Floats:
    """numerator / denominator, NaN where the denominator is 0, without a warning."""
    denominator = np.asarray(denominator, dtype=np.float64)
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.asarray(np.divide(numerator, denominator, out=out, where=denominator != 0))
