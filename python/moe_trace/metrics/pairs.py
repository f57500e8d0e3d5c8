"""Pairs: which experts are chosen together in one layer, and which follow which from layer to layer.

Counting and ratios are apart: counts of parts add up to those of the whole, and the ratios are functions of counts. An
invalid id (`arrays.valid`) is in no pair; the other ids of its row are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.metrics.arrays import PAIRS_AT_ONCE, Floats, Ints, legal, matrix, ratio, rows_of_ids
from moe_trace.metrics.choices import by_rank


def coactivation_counts(ids: npt.ArrayLike, experts: int) -> Ints:
    """N_ij, in how many rows experts i and j were both chosen: ids `[..., N, k]` to int64 `[..., E, E]`, symmetric.

    The diagonal is N_i, in how many rows i was chosen. No expert may be twice in a row, as routers guarantee.
    """
    e = _many(ids)
    return _symmetric(e, list(combinations(range(e.shape[-1]), 2)), experts)


def adjacent_counts(ids: npt.ArrayLike, weights: npt.ArrayLike, experts: int) -> Ints:
    """As `coactivation_counts`, but of the pairs of adjacent ranks only (first and second choice, second and third, …):
    ids and weights `[..., N, k]` to int64 `[..., E, E]`.

    This is what OLMoE's released code counts (`do_correlation_analysis` of its `run_moe_analysis.py`), where its paper
    speaks of all pairs. The ranks are those of the weights, since columns need not be sorted.
    """
    e = by_rank(_many(ids), weights)
    return _symmetric(e, list(pairwise(range(e.shape[-1]))), experts)


def coactivation(joint: npt.ArrayLike) -> Floats:
    """N_ij / N_i, the share of i's rows in which j was chosen too: counts `[..., E, E]` with N_i on the diagonal, as
    the two functions above give them, to float64 `[..., E, E]`.

    The diagonal is 1; a row adds up to k where all pairs were counted. NaN in the row of an expert that was never
    chosen. Not symmetric. OLMoE, arXiv 2409.02060.
    """
    c = matrix(joint)
    return ratio(c, np.diagonal(c, axis1=-2, axis2=-1)[..., None])


def transition_counts(ids_a: npt.ArrayLike, ids_b: npt.ArrayLike, experts: int, experts_b: int | None = None) -> Ints:
    """How often e was chosen in layer a and e' in layer b, for the same token: ids `[..., N, k_a]` and `[..., N, k_b]`
    to int64 `[..., E_a, E_b]`.

    Each token counts once for each of its k_a · k_b pairs of choices. Of first choices only: give them as `[..., N, 1]`
    (`first_choice(ids, weights)[..., None]`). `experts_b` is the number of experts of layer b where it is another.
    """
    a, b = _many(ids_a), _many(ids_b)
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"the rows of both layers are the same tokens, but the shapes are {a.shape} and {b.shape}")
    of_a, of_b = experts, experts if experts_b is None else experts_b
    rows = np.concatenate((legal(a, of_a), legal(b, of_b)), axis=-1)
    pairs = list(product(range(a.shape[-1]), range(a.shape[-1], rows.shape[-1])))
    return _for_leading_axes(rows, lambda of: _counted(of, pairs, of_a + 1, of_b + 1)[:-1, :-1], (of_a, of_b))


def transition(joint: npt.ArrayLike) -> Floats:
    """P(e' at layer b | e at layer a): counts `[..., E_a, E_b]` (`transition_counts`) to float64, each row adding up to
    1.

    With several choices it is of a pair drawn at random: a token of e, then one of its choices at b. NaN in the row of
    an expert that was never chosen. ExFlow, arXiv 2401.08383, which has one choice.
    """
    c = matrix(joint)
    return ratio(c, c.sum(axis=-1, keepdims=True))


def mutual_information(joint: npt.ArrayLike) -> Floats:
    """I(A; B) = sum p(a, b) ln(p(a, b) / (p(a) p(b))) in nats: counts `[..., A, B]` to float64 `[...]`.

    From 0 (independent) to the lesser entropy of the two; NaN without counts. With several choices per token it is that
    of one choice at a and one at b, drawn at random. Estimated from counts it is too large by about
    (A - 1)(B - 1) / (2n) for n independent pairs (Miller 1955): `permutation_test` says how much that is. Cover and
    Thomas, Elements of Information Theory, 2.3.
    """
    c = matrix(joint)
    total = c.sum(axis=(-2, -1), keepdims=True)
    p = ratio(c, total)
    independent = p.sum(axis=-1, keepdims=True) * p.sum(axis=-2, keepdims=True)
    logs = np.log(ratio(p, independent), where=p > 0, out=np.zeros_like(p))
    found = np.maximum((p * logs).sum(axis=(-2, -1)), 0.0)
    return np.asarray(np.where(total[..., 0, 0] > 0, found, np.nan))


def _many(ids: npt.ArrayLike) -> npt.NDArray[Any]:
    e = rows_of_ids(ids)
    if e.ndim < 2:
        raise ValueError(f"ids need axes of rows and choices, [..., rows, k], but have the shape {e.shape}")
    return e


def _symmetric(ids: npt.NDArray[Any], pairs: list[tuple[int, int]], experts: int) -> Ints:
    """Each of the pairs of columns both ways, and on the diagonal how often each expert was chosen."""
    columns = legal(ids, experts)

    def of_rows(rows: Ints) -> Ints:
        joint = _counted(rows, pairs, experts + 1, experts + 1)[:-1, :-1]
        joint = joint + joint.T
        joint[np.diag_indices(experts)] = np.bincount(rows.ravel(), minlength=experts + 1)[:-1]
        return joint

    return _for_leading_axes(columns, of_rows, (experts, experts))


def _counted(rows: Ints, pairs: list[tuple[int, int]], of_a: int, of_b: int) -> Ints:
    """How often each pair of values is in these pairs of columns: rows `[N, columns]` to `[of_a, of_b]`."""
    joint = np.zeros(of_a * of_b, np.int64)
    first, second = [i for i, _ in pairs], [j for _, j in pairs]
    at_once = max(1, PAIRS_AT_ONCE // max(len(pairs), 1))
    for start in range(0, len(rows) if pairs else 0, at_once):
        part = rows[start : start + at_once]
        joint += np.bincount((part[:, first] * of_b + part[:, second]).ravel(), minlength=of_a * of_b)
    return joint.reshape(of_a, of_b)


def _for_leading_axes(rows: Ints, count: Callable[[Ints], Ints], shape: tuple[int, int]) -> Ints:
    """`count` of each `[N, columns]` in `[..., N, columns]`: `[..., *shape]`."""
    leading = rows.shape[:-2]
    found = np.zeros((*leading, *shape), np.int64)
    for at in np.ndindex(leading):
        found[at] = count(rows[at])
    return found


def coactivation_by_chance(counts: npt.ArrayLike) -> Floats:
    """How often two experts would be chosen together by chance, given how often each is chosen at all.

    counts: `[experts, experts]` as from `coactivation_counts`. Returns float64 of that shape, zeros on the diagonal:
    a_i a_j of the `pair_factors`, the table of that form that has the same sums of rows as the counts. A row never
    chooses an expert twice, so that this, and not N_i N_j / N, is independence here (quasi-independence: Goodman, JASA
    63, 1968).
    """
    a = pair_factors(counts)
    table = np.outer(a, a)
    np.fill_diagonal(table, 0)
    return np.asarray(table, np.float64)


def pair_factors(counts: npt.ArrayLike) -> Floats:
    """The a_i of `coactivation_by_chance`, float64 `[experts]`, by iterative proportional fitting."""
    seen = np.array(counts, dtype=np.float64)
    np.fill_diagonal(seen, 0)
    sums = seen.sum(axis=1)
    a = np.sqrt(sums)
    for _ in range(1000):
        rest = a.sum() - a
        fitted = np.divide(sums, rest, out=np.zeros_like(a), where=rest > 0)
        new = np.sqrt(a * fitted)  # halfway on a logarithmic scale: the plain step swings to and fro
        done = np.allclose(new, a, rtol=1e-12, atol=0)
        a = new
        if done:
            break
    return np.asarray(a)


def lift(counts: npt.ArrayLike, expected: npt.ArrayLike) -> Floats:
    """counts / expected, NaN where nothing is expected."""
    seen, by_chance = np.asarray(counts, np.float64), np.asarray(expected, np.float64)
    return np.asarray(np.divide(seen, by_chance, out=np.full(seen.shape, np.nan), where=by_chance > 0))
