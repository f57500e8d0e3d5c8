"""Rows of ids: which choice is the first, and how much two rows have in common.

Ids are `[..., k]`, integers of any dtype; what marks an invalid one is said by `arrays.valid`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace.metrics.arrays import Floats, Ints, rows_of_ids, valid


def first_choice(ids: npt.ArrayLike, weights: npt.ArrayLike) -> Ints:
    """The id with the largest weight of each row: ids and weights `[..., k]` to int64 `[...]`, -1 for none.

    Never column 0: routers on a CPU and grouped ones do not sort their choices. Of equal weights (which float16 makes
    of some that were different) the first column is taken. A row has no first choice where the id is invalid or any
    weight is NaN.
    """
    e, w = rows_of_ids(ids), np.asarray(weights)
    if e.shape != w.shape or e.shape[-1] == 0:
        raise ValueError(f"each id has a weight, but the shapes are {e.shape} and {w.shape}")
    at = w.argmax(axis=-1)[..., None]
    first = np.take_along_axis(e, at, axis=-1)[..., 0]
    known = np.take_along_axis(valid(e), at, axis=-1)[..., 0] & ~np.isnan(w).any(axis=-1)
    return np.asarray(np.where(known, first, 0).astype(np.int64) - np.where(known, 0, 1))


def by_rank(ids: npt.ArrayLike, weights: npt.ArrayLike) -> npt.NDArray[Any]:
    """Ids `[..., k]` with each row by descending weight; of equal weights the earlier column comes first."""
    e, w = rows_of_ids(ids), np.asarray(weights, np.float64)
    if e.shape != w.shape:
        raise ValueError(f"each id has a weight, but the shapes are {e.shape} and {w.shape}")
    return np.take_along_axis(e, np.argsort(-w, axis=-1, kind="stable"), axis=-1)


def overlap(a: npt.ArrayLike, b: npt.ArrayLike) -> Floats:
    """|A ∩ B|, how many experts two rows share: ids `[..., k]` and `[..., k']` to float64 `[...]`.

    NaN where either row has an invalid id, since then its set is not known. No expert may be twice in a row, as routers
    guarantee; it would count twice.
    """
    x, y = rows_of_ids(a), rows_of_ids(b)
    known = valid(x).all(axis=-1) & valid(y).all(axis=-1)
    # Column by column, which holds `[...]` in memory rather than `[..., k, k']`. Signed and unsigned ids may meet.
    if x.dtype != y.dtype:
        x, y = x.astype(np.int64), y.astype(np.int64)
    shared = np.zeros(np.broadcast_shapes(x.shape[:-1], y.shape[:-1]))
    for column in range(x.shape[-1]):
        shared += (x[..., column, None] == y).any(axis=-1)
    return np.asarray(np.where(known, shared, np.nan))


def same_rows(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Ids `[..., k]` of the same tokens. Raises ValueError for different shapes."""
    x, y = rows_of_ids(a), rows_of_ids(b)
    if x.shape != y.shape or x.shape[-1] == 0:
        raise ValueError(f"both have to be rows of the same tokens and k, but the shapes are {x.shape} and {y.shape}")
    return x, y
