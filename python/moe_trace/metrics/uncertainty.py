"""Uncertainty: how far a share or a mean may be off, and whether a difference is more than chance.

Tokens of one request are alike, so it is requests that are drawn and shuffled, never tokens: an interval or a test over
tokens would be far too sure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.metrics.arrays import Floats, checked, ratio
from moe_trace.metrics.pairs import mutual_information

_CELLS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence interval, float64 arrays of one shape.

    Attributes:
        value: of all requests.
        low, high: the ends of the interval; NaN where it has none.
    """

    value: Floats
    low: Floats
    high: Floats


def bootstrap_ratio(
    sums: npt.ArrayLike, totals: npt.ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The interval of a share or mean, sum(sums) / sum(totals), over requests: sums and totals of each of R requests,
    `[R, ...]`, to an Interval `[...]`. Totals may lack the last axes of sums: `[R]` beside `[R, E]`.

    For the share of an expert: `sums` its counts by request and `totals` all of the request's; for a mean: sums of
    values and numbers of rows.

    The percentile bootstrap (Efron 1979): R requests are drawn with replacement, `resamples` times, and the interval is
    from the (1 - level)/2 to the (1 + level)/2 quantile. Draws in which the totals are 0 are left out. The same seed
    gives the same interval. With fewer than two requests there is nothing to draw from, and the ends are NaN; with few
    (below 20 or so) percentile intervals are too narrow.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level has to be between 0 and 1 and resamples positive, not {level} and {resamples}")
    top, bottom = np.asarray(sums, np.float64), np.asarray(totals, np.float64)
    bottom = bottom.reshape(bottom.shape + (1,) * (top.ndim - bottom.ndim))
    if top.ndim == 0 or bottom.shape[:1] != top.shape[:1]:
        raise ValueError(f"sums and totals are of the same requests, but the shapes are {top.shape} and {bottom.shape}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("sums and totals must be finite")
    requests, value = len(top), ratio(top.sum(axis=0), bottom.sum(axis=0))
    ends = np.full((2, value.size), np.nan)
    if requests > 1:
        flat = [np.broadcast_to(of, (requests, *value.shape)).reshape(requests, -1) for of in (top, bottom)]
        at_once = max(1, _CELLS_AT_ONCE // resamples)
        for start in range(0, value.size, at_once):
            part = slice(start, start + at_once)
            found = _resampled(flat[0][:, part], flat[1][:, part], resamples, seed)
            ends[:, part] = _quantiles(found, (1 - level) / 2)
    return Interval(value, ends[0].reshape(value.shape), ends[1].reshape(value.shape))


def bootstrap(
    statistic: Callable[..., npt.ArrayLike],
    *counts: npt.ArrayLike,
    paired: bool = False,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The interval of a statistic of counts over requests: counts of each of R requests, `[R, ...]`, of one set or of
    several, to an Interval of the shape that `statistic` gives.

    `statistic` takes of each set the sums over requests of some draws, float64 `[draws, ...]`, and returns `[draws,
    *shape]`. For the imbalance of one set: `metrics.imbalance`; for how two sets differ: `metrics.total_variation`, or
    `lambda a, b: metrics.gini(b) - metrics.gini(a)`.

    The basic bootstrap: requests are drawn with replacement, and the quantiles of the draws are mirrored at the value,
    2 v - q (Davison and Hinkley 1997, 5.2.1). So an interval is not led astray, as that of percentiles would be, by
    what such figures have in common: the fewer counts, the larger they are, without any cause, and a draw has fewer
    different requests than there are. A value that is all chance may lie above its own interval. Where a figure
    has bounds, the ends may lie beyond them: clip them.

    paired: whether a row of one set is the same request as that row of the others (so both are drawn together). Draws
    in which the statistic is NaN are left out. The same seed gives the same interval. With fewer than two requests in
    any of the sets the ends are NaN.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level has to be between 0 and 1 and resamples positive, not {level} and {resamples}")
    sets = [np.asarray(of, np.float64) for of in counts]
    if not sets or any(of.ndim == 0 for of in sets) or (paired and len({len(of) for of in sets}) > 1):
        raise ValueError(f"each set has counts of each request, [R, ...], but the shapes are {[o.shape for o in sets]}")
    value = np.asarray(statistic(*(of.sum(axis=0)[None] for of in sets)), np.float64)[0]
    if min(map(len, sets)) < 2:
        nothing = np.full(value.shape, np.nan)
        return Interval(value, nothing, nothing)
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS_AT_ONCE // max(max(of[0].size, len(of)) for of in sets))
    found = []
    for start in range(0, resamples, at_once):
        draws = min(at_once, resamples - start)
        times: list[Floats] = []
        for of in sets:
            times.append(times[0] if paired and times else _times(rng, len(of), draws))
        sums = (t @ of.reshape(len(of), -1) for t, of in zip(times, sets, strict=True))
        of_draws = (s.reshape(draws, *of.shape[1:]) for s, of in zip(sums, sets, strict=True))
        found.append(np.asarray(statistic(*of_draws), np.float64).reshape(draws, -1))
    low, high = _quantiles(np.concatenate(found), (1 - level) / 2).reshape(2, *value.shape)
    return Interval(value, np.asarray(2 * value - high), np.asarray(2 * value - low))


def _resampled(sums: Floats, totals: Floats, resamples: int, seed: int) -> Floats:
    """The ratio in each resample: sums and totals `[R, n]` to `[resamples, n]`. The draws are the same for one seed,
    whatever the columns.
    """
    requests, rng = len(sums), np.random.default_rng(seed)
    found = np.empty((resamples, sums.shape[1]))
    at_once = max(1, _CELLS_AT_ONCE // requests)
    for start in range(0, resamples, at_once):
        draws = min(at_once, resamples - start)
        times = _times(rng, requests, draws)
        found[start : start + draws] = ratio(times @ sums, times @ totals)
    return found


def _times(rng: np.random.Generator, requests: int, draws: int) -> Floats:
    """How often each request is in each draw: float64 `[draws, requests]`."""
    drawn = rng.integers(0, requests, (draws, requests)) + np.arange(draws)[:, None] * requests
    return np.bincount(drawn.ravel(), minlength=draws * requests).reshape(draws, requests).astype(np.float64)


def _quantiles(found: Floats, tail: float) -> Floats:
    """The two quantiles of each column, of the draws that have a value: `[draws, n]` to `[2, n]`, NaN where none
    has.
    """
    ends = np.full((2, found.shape[1]), np.nan)
    some = ~np.isnan(found).all(axis=0)
    ends[:, some] = np.nanquantile(found[:, some], (tail, 1 - tail), axis=0)
    return ends


@dataclass(frozen=True)
class PermutationTest:
    """What shuffled labels give, beside the real ones.

    Attributes:
        value: the statistic of the real labels, float64 `[...]`.
        null: that of each shuffle, float64 `[shuffles, ...]`; its mean is what chance alone gives.
        p: (1 + shuffles with at least the value) / (1 + shuffles), float64 `[...]`; not corrected for looking at many.
    """

    value: Floats
    null: Floats
    p: Floats


def permutation_test(
    counts: npt.ArrayLike,
    labels: npt.ArrayLike,
    statistic: Callable[[Floats], npt.ArrayLike] = mutual_information,
    *,
    shuffles: int = 999,
    seed: int = 0,
) -> PermutationTest:
    """Whether experts are specialised by label more than chance makes them seem: counts of each of R requests `[R, E]`
    and the label of each (its domain, say), int `[R]` from 0, to a PermutationTest.

    `statistic` takes counts by label, float64 `[D, E]`, and returns a figure `[...]` that grows with specialisation:
    their mutual information unless given. The null is that labels have nothing to do with the routing: they are
    shuffled over the requests, and counted anew (Fisher's permutation test, one-sided). The same seed gives the same
    shuffles. Units other than requests can be given; they have to be independent of each other. Where a statistic is
    NaN, p is NaN.
    """
    c, of = checked(counts).astype(np.float64), np.asarray(labels)
    if c.ndim != 2 or of.shape != c.shape[:1] or of.dtype.kind not in "ui" or len(of) == 0 or (of < 0).any():
        raise ValueError(f"each request has counts [R, E] and a label from 0, [R]: {c.shape}, {of.dtype} {of.shape}")
    if shuffles < 1:
        raise ValueError(f"shuffles has to be positive, not {shuffles}")
    n = int(of.max()) + 1

    def of_labels(order: npt.NDArray[Any]) -> Floats:
        by_label = np.zeros((n, c.shape[1]))
        np.add.at(by_label, order, c)
        return np.asarray(statistic(by_label), np.float64)

    value, rng = of_labels(of), np.random.default_rng(seed)
    null = np.stack([of_labels(rng.permutation(of)) for _ in range(shuffles)])
    unknown = np.isnan(value) | np.isnan(null).any(axis=0)
    # Sums in another order may differ in their last bits: what is equal but for these is not less.
    least = value - 1e-12 * np.abs(value)
    return PermutationTest(value, null, np.where(unknown, np.nan, (1 + (null >= least).sum(axis=0)) / (1 + shuffles)))
