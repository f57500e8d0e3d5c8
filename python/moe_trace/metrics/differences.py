"""Differences: between two runs over the same tokens, and between two loads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_trace.metrics.arrays import Floats, floats, ratio
from moe_trace.metrics.choices import overlap, same_rows
from moe_trace.metrics.load import shares


def flip_rate(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """1 - |A ∩ B| / k, the share of a row's experts that differ: ids `[..., k]` of two runs, aligned by token and
    layer, to float64 `[...]`.

    The order of choices does not matter. NaN where either row has an invalid id (`arrays.valid`), or where one stands
    for a token that a run does not have; so average with `np.nanmean`, over tokens, layers or both. R3,
    arXiv 2510.11370.
    """
    x, y = same_rows(a, b)
    return np.asarray(1 - overlap(x, y) / x.shape[-1])


def flipped_tokens(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """The share of tokens of which any expert differs in any layer: ids `[..., N, L, k]` of two runs, aligned, to
    float64 `[...]`.

    A token with an invalid id is known to be flipped where another layer's row says so, and else left out. NaN without
    tokens. R3, arXiv 2510.11370.
    """
    flips = flip_rate(a, b)
    if flips.ndim < 2:
        raise ValueError(f"ids need axes of tokens and layers, [..., tokens, layers, k]: {np.shape(a)}")
    flipped = (flips > 0).any(axis=-1)
    known = flipped | ~np.isnan(flips).any(axis=-1)
    return ratio(flipped.sum(axis=-1), known.sum(axis=-1))


def js_divergence(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """Jensen-Shannon divergence of two loads, H((p + q)/2) - (H(p) + H(q))/2 in nats: counts `[..., E]` of each (axes
    before the last broadcast) to float64 `[...]`.

    From 0 (the same shares) to ln 2 (no expert in common); symmetric; the square of `scipy.spatial.distance.
    jensenshannon`. NaN where either has no counts. Two samples of one distribution differ too, by about
    (E - 1) (1/n + 1/m) / 8 for n and m independent assignments. Lin 1991.
    """
    p, q = shares(floats(a)), shares(floats(b))
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"both loads need the same experts, but they have {p.shape[-1]} and {q.shape[-1]}")
    middle = (p + q) / 2
    return np.asarray(np.maximum((_divergence(p, middle) + _divergence(q, middle)) / 2, 0.0))


def total_variation(first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """Half the sum of |p_e - q_e| on counts `[..., experts]`: the share of the assignments that one set gives to other
    experts than the other does. float64 `[...]`, 0 to 1, NaN where a set has no assignments.
    """
    return np.asarray(np.abs(shares(first) - shares(second)).sum(axis=-1) / 2)


def total_variation_by_chance(first: npt.ArrayLike, second: npt.ArrayLike) -> Floats:
    """What `total_variation` is expected to be of two sets with as many assignments if both were drawn independently
    from the shares of the two together: sum of sqrt(p(1-p)(1/n + 1/m)) / sqrt(2 pi), by the normal approximation.

    Tokens of one text resemble each other, so real sets without a systematic difference differ by more than this.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    p = shares(a + b)
    with np.errstate(divide="ignore"):
        noise = 1 / a.sum(axis=-1) + 1 / b.sum(axis=-1)
    value = np.sqrt(p * (1 - p)).sum(axis=-1) * np.sqrt(noise / (2 * np.pi))
    return np.asarray(np.where(np.isfinite(noise), value, np.nan))


def _divergence(p: Floats, m: Floats) -> Floats:
    """sum p ln(p / m), NaN where p or m is."""
    p, m = np.broadcast_arrays(p, m)
    with np.errstate(invalid="ignore"):
        logs = np.log(ratio(p, m), where=p > 0, out=np.zeros_like(p))
    return np.asarray(np.where(np.isnan(m).any(axis=-1), np.nan, (p * logs).sum(axis=-1)))
