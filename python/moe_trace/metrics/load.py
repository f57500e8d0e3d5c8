"""Load: how evenly experts are used, from counts.

Every function takes `counts`, an array `[..., E]` of how often each of E experts was chosen (assignments, any real
dtype, not negative), and works on the last axis; leading axes (layers, windows, requests) are kept. So c_e below is
`counts[..., e]` and p_e = c_e / sum(c). Nothing but `balancedness` averages over layers: whoever does that says how.

Where there is no assignment at all a ratio has no value and is NaN, never 0. Counts that are negative, not finite or
without an expert axis raise ValueError.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.metrics.arrays import Floats, checked, floats, ratio


def shares(counts: npt.ArrayLike) -> Floats:
    """p_e = c_e / sum(c): float64 `[..., E]`, each row of it adding up to 1, or all NaN without assignments."""
    c = floats(counts)
    return ratio(c, c.sum(axis=-1, keepdims=True))


def imbalance(counts: npt.ArrayLike) -> Floats:
    """max c / mean c: float64 `[...]`, from 1 (even) to E (one expert has everything).

    `max_violation` is this minus 1.
    """
    c = floats(counts)
    return ratio(c.max(axis=-1), c.mean(axis=-1))


def max_violation(counts: npt.ArrayLike) -> Floats:
    """MaxVio, (max c - mean c) / mean c: float64 `[...]`, from 0 (even) to E - 1; `imbalance` minus 1.

    Of one batch, or global: as the counts are (DeepSeek's loss-free balancing, arXiv 2408.15664).
    """
    return np.asarray(imbalance(counts) - 1)


def balancedness(load: npt.ArrayLike, aggregation: Literal["sglang", "vllm"]) -> Floats:
    """How near to even the load of several layers is: load `[..., L, U]` to float64 `[...]`, from 1/U to 1 (even).

    U are the units that share a layer's work: experts, or GPUs with the loads of their experts added up, which is what
    both engines take. The two aggregate the L layers differently:

    - `sglang`: the mean over layers of mean c / max c (`compute_utilization_rate` of its expert distribution recorder,
      but for the 1e-5 that is added there to both). A layer without load has no ratio and is left out of the mean.
    - `vllm`: sum over layers of mean c, divided by the sum over layers of max c (as the comments of its EPLB state
      define it; the code of some of its versions takes mean and max along the other axis).

    NaN without any load. Raises ValueError for another aggregation.
    """
    c = floats(load)
    if c.ndim < 2:
        raise ValueError(f"balancedness is of several layers, [..., layers, units], but the shape is {c.shape}")
    mean, most = c.mean(axis=-1), c.max(axis=-1)
    if aggregation == "vllm":
        return ratio(mean.sum(axis=-1), most.sum(axis=-1))
    if aggregation == "sglang":
        return ratio(np.nan_to_num(ratio(mean, most)).sum(axis=-1), (most > 0).sum(axis=-1))
    raise ValueError(f"there is no aggregation {aggregation!r}: use 'sglang' or 'vllm'")


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
    return np.asarray((floats(counts) == 0).sum(axis=-1), dtype=np.int64)


def cv(counts: npt.ArrayLike, ddof: int = 0) -> Floats:
    """Coefficient of variation, std(c) / mean(c): float64 `[...]`.

    The population's (`ddof` 0) unless `ddof` says otherwise; NaN where E <= ddof.
    """
    c = floats(counts)
    if c.shape[-1] <= ddof:
        return np.full(c.shape[:-1], np.nan)
    return ratio(c.std(axis=-1, ddof=ddof), c.mean(axis=-1))


def gini(counts: npt.ArrayLike) -> Floats:
    """Gini coefficient: float64 `[...]`, from 0 (even) to (n - 1)/n.

    2 sum(i x_(i)) / (n sum(x)) - (n + 1)/n over the counts in ascending order, x_(1) <= … <= x_(n), n = E: half the
    mean absolute difference of two experts, relative to the mean.
    """
    x = np.sort(floats(counts), axis=-1)
    n = x.shape[-1]
    weighted = (x * np.arange(1, n + 1)).sum(axis=-1)
    return np.asarray(2 * ratio(weighted, n * x.sum(axis=-1)) - (n + 1) / n)


def top(counts: npt.ArrayLike, n: int = 3) -> npt.NDArray[np.int64]:
    """The n experts with the largest counts: int64 `[..., min(n, E)]`, descending; of equals the lower id comes first.

    An expert that was never chosen can be among them where fewer than n were: look at its count.
    """
    if n < 1:
        raise ValueError(f"top needs a positive n, not {n}")
    c = checked(counts)
    # Integers are sorted as integers, which stay exact above 2**53; the reversal turns a stable ascending sort into
    # "descending, lower id first".
    ascending = np.argsort(c[..., ::-1], axis=-1, kind="stable")
    return np.asarray((c.shape[-1] - 1 - ascending)[..., ::-1][..., :n], dtype=np.int64)
