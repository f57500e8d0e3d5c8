"""Scores: how sure a router is, from its logits `[..., E]` (any float dtype; everything is computed in float64).

Softmax routers only: `confidence` and `router_entropy` are of softmax(logits), which is a router's distribution where
it selects by softmax or by the logits themselves. Routers with sigmoid scores, with a bias that only selection sees
(DeepSeek-V3) or that select groups first have no such distribution. `margin` takes the scores that select, and so holds
for all but the grouped ones, where the (k+1)-th score may not have been eligible.

A logit of -inf is an expert that cannot be chosen. NaN or +inf anywhere in a row make its figure NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.metrics.arrays import Floats


def softmax(logits: npt.ArrayLike) -> Floats:
    """exp(x) / sum exp(x): float64 `[..., E]`, each row adding up to 1, or all NaN."""
    x = _scores(logits)
    with np.errstate(invalid="ignore"):
        weights = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def confidence(logits: npt.ArrayLike) -> Floats:
    """The probability of the first choice, max softmax(logits): float64 `[...]`, from 1/E to 1."""
    return np.asarray(softmax(logits).max(axis=-1))


def router_entropy(logits: npt.ArrayLike) -> Floats:
    """H(softmax(logits)) = -sum p ln p in nats: float64 `[...]`, from 0 (sure) to ln E (knows nothing)."""
    p = softmax(logits)
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    known = ~np.isnan(p).any(axis=-1)
    return np.asarray(np.where(known, np.maximum(-(p * logs).sum(axis=-1), 0.0), np.nan))


def margin(scores: npt.ArrayLike, k: int) -> Floats:
    """s_(k) - s_(k+1), how far the last expert that was chosen is from the first that was not: scores `[..., E]` to
    float64 `[...]`, not negative; 0 is a tie.

    `scores` are those that select: `softmax(logits)` for a figure from 0 to 1, the logits for one that does not depend
    on the other experts, sigmoid scores plus the bias where a router selects by these. NaN where k = E, so that nothing
    was left out, and where s_(k+1) and s_(k) are both -inf. Raises ValueError for k below 1 or above E.
    """
    s = _scores(scores)
    experts = s.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"{k} of {experts} experts cannot be chosen")
    if k == experts:
        return np.full(s.shape[:-1], np.nan)
    # NaN would be sorted as the largest.
    known = ~np.isnan(s).any(axis=-1) & ~np.isposinf(s).any(axis=-1)
    ordered = np.partition(s, (experts - k - 1, experts - k), axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, ordered[..., experts - k] - ordered[..., experts - k - 1], np.nan))


def _scores(scores: npt.ArrayLike) -> Floats:
    s: npt.NDArray[Any] = np.asarray(scores)
    if s.ndim == 0 or s.shape[-1] == 0 or s.dtype.kind not in "fui":
        raise ValueError(f"scores need an axis of experts and to be numbers, but are {s.dtype} {s.shape}")
    return s.astype(np.float64)
