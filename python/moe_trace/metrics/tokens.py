"""Tokens: what a token's experts have to do with those of the token before, of an earlier model, of its domain or
word, and of its batch.

Ids are `[..., k]`, integers; what marks an invalid one is said by `arrays.valid`.
"""

from __future__ import annotations

from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt

from moe_trace.metrics.arrays import Bools, Floats, Ints, floats, legal, ratio, rows_of_ids
from moe_trace.metrics.choices import first_choice, overlap, same_rows

Choice = Literal["first", "any"]


def follows(requests: npt.ArrayLike, positions: npt.ArrayLike) -> Bools:
    """Which rows are the next token after the row before them: request numbers and positions, int `[N]`, to bool `[N]`.

    A row follows where it has the request of the row before it and the next position. Rows of nobody (negative
    requests) and of unknown position (negative) follow nothing, and nothing follows them. The rows of a request have to
    stand together, in the order of their positions, and only those that count (`Selection.current`).
    """
    r, p = np.asarray(requests), np.asarray(positions)
    found = np.zeros(len(r), bool)
    found[1:] = (r[1:] == r[:-1]) & (p[1:] == p[:-1] + 1) & (r[1:] >= 0) & (p[:-1] >= 0)
    return found


def repetition(
    ids: npt.ArrayLike, follows: npt.ArrayLike, choice: Choice = "any", weights: npt.ArrayLike | None = None
) -> Floats:
    """The share of tokens whose choice repeats from the token before: ids `[..., N, k]`, in the order of positions, to
    float64 `[...]`.

    Of the pairs of rows n - 1 and n for which `follows[..., n]` holds (bool `[..., N]`, see the function `follows`; of
    the first row it is not looked at), the share in which

    - `any`: some expert was chosen for both, or
    - `first`: both have the same first choice, the expert of the largest `weights` (of the shape of `ids`), which are
      needed for it.

    Pairs in which an expert set, or a first choice, is not known because of an invalid id are left out. NaN without
    pairs. By chance it is `repetition_by_chance`. Mixtral, arXiv 2401.04088, table 5.
    """
    e, next_to = rows_of_ids(ids), np.asarray(follows, bool)[..., 1:]
    if choice == "any":
        shared = overlap(e[..., 1:, :], e[..., :-1, :])
        known, same = ~np.isnan(shared), shared > 0
    elif choice == "first":
        if weights is None:
            raise ValueError("the first choice is the one of the largest weight: give weights=")
        first = first_choice(e, weights)
        known = (first[..., 1:] >= 0) & (first[..., :-1] >= 0)
        same = first[..., 1:] == first[..., :-1]
    else:
        raise ValueError(f"there is no choice {choice!r}: use 'first' or 'any'")
    counted = known & next_to
    return ratio((same & counted).sum(axis=-1), counted.sum(axis=-1))


def repetition_by_chance(experts: int, k: int, choice: Choice = "any") -> float:
    """`repetition` of a router that draws k of E experts uniformly, each time anew: 1/E for the first choice,
    1 - C(E - k, k) / C(E, k) for any (Mixtral, arXiv 2401.04088, table 5: 12.5 % and 46 % for 2 of 8).
    """
    _check_k(experts, k)
    return 1 / experts if choice == "first" else 1 - comb(experts - k, k) / comb(experts, k)


def saturation(ids: npt.ArrayLike, final: npt.ArrayLike) -> Floats:
    """Router saturation, the mean over tokens of |top-k at t ∩ top-k at T| / k: ids `[..., N, k]` of an earlier and of
    the final checkpoint, for the same tokens, to float64 `[...]`.

    From 0 to 1; k/E by chance. Tokens with an invalid id in either are left out; NaN without tokens. OLMoE,
    arXiv 2409.02060.
    """
    a, b = same_rows(ids, final)
    shared = overlap(a, b) / a.shape[-1]
    return ratio(np.nan_to_num(shared).sum(axis=-1), (~np.isnan(shared)).sum(axis=-1))


def counts_by_group(groups: npt.ArrayLike, ids: npt.ArrayLike, experts: int, n: int | None = None) -> Ints:
    """How often each expert was chosen for each group of tokens (domain, token id, request): groups int `[N]` and ids
    `[N, k]` to int64 `[G, E]`.

    Negative groups are nobody's and left out, as are invalid ids. `n` is the number of groups, else the largest and 1.
    """
    g, e = np.asarray(groups), rows_of_ids(ids)
    if g.ndim != 1 or e.shape[:1] != g.shape or e.ndim != 2:
        raise ValueError(f"each row has a group, [rows] beside [rows, k], but the shapes are {g.shape} and {e.shape}")
    of = int(g.max(initial=-1)) + 1 if n is None else n
    if len(g) and int(g.max()) >= of:
        raise ValueError(f"there is a group {int(g.max())}, but there are only {of}")
    mine = g >= 0
    cells = g[mine].astype(np.int64)[:, None] * (experts + 1) + legal(e[mine], experts)
    return np.bincount(cells.ravel(), minlength=of * (experts + 1)).reshape(of, experts + 1)[:, :-1].astype(np.int64)


def specialization(counts: npt.ArrayLike, rows: npt.ArrayLike) -> Floats:
    """The share of a group's tokens that are routed to e, N_(g,e) / N_g: counts `[..., G, E]` (`counts_by_group`) and
    tokens of each group `[..., G]` to float64 `[..., G, E]`.

    Each row of it adds up to k, or to less where ids were invalid; by chance each is k/E. NaN for a group without
    tokens. Of domains it is OLMoE's domain specialisation, of token ids its vocabulary specialisation
    (arXiv 2409.02060). Whether it is more than chance, a `permutation_test` says.
    """
    return ratio(floats(counts), np.asarray(rows, np.float64)[..., None])


def vocabulary_specialization(counts: npt.ArrayLike, rows: npt.ArrayLike, least: int = 1) -> Floats:
    """The mean over token ids of max_e N_(x,e) / N_x, the share of the id's occurrences that its top expert gets:
    counts `[..., V, E]` (`counts_by_group` by token id) and occurrences `[..., V]` to float64 `[...]`.

    Each id that occurs at least `least` times weighs the same; NaN without any. An id that occurs once has the share 1,
    whatever the router does, so it takes a `least` or a `permutation_test` to tell. OLMoE's released code counts first
    choices: so counts of `first_choice(ids, weights)[..., None]` give its figure.
    """
    n = np.asarray(rows, np.float64)
    share = specialization(counts, n).max(axis=-1)
    used = n >= max(least, 1)
    return ratio(np.where(used, share, 0.0).sum(axis=-1), used.sum(axis=-1))


def distinct_experts(ids: npt.ArrayLike, steps: npt.ArrayLike, experts: int) -> tuple[Ints, Ints, Ints]:
    """How many experts of a layer each step needs: ids `[N, k]` and the step of each row, int `[N]`, to three int64
    `[S]`: the steps, ascending, their numbers of rows B, and of distinct experts.

    Exact; invalid ids are nobody's. By chance: `distinct_by_chance(experts, k, B)`.
    """
    e, (labels, of, rows) = rows_of_ids(ids), np.unique(np.asarray(steps), return_inverse=True, return_counts=True)
    if e.ndim != 2 or len(of) != len(e):
        raise ValueError(f"each row has a step, [rows] beside [rows, k], but there are {len(of)} and {e.shape}")
    used = np.zeros((len(labels), experts + 1), bool)
    used[of[:, None], legal(e, experts)] = True
    return labels.astype(np.int64), rows.astype(np.int64), used[:, :-1].sum(axis=1, dtype=np.int64)


def distinct_by_chance(experts: int, k: int, rows: npt.ArrayLike) -> Floats:
    """The mean of `distinct_experts` for a step of B rows that draw k of E experts uniformly, each for itself:
    E (1 - ((E - k)/E)^B), float64 of the shape of `rows`.
    """
    _check_k(experts, k)
    return np.asarray(experts * (1 - ((experts - k) / experts) ** np.asarray(rows, np.float64)))


def _check_k(experts: int, k: int) -> None:
    if not 1 <= k <= experts:
        raise ValueError(f"{k} of {experts} experts cannot be chosen")
