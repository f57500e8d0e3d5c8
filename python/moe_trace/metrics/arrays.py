"""What the metrics share: which arrays are counts and which ids are experts, and ratios that may have no value."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PAIRS_AT_ONCE = 1 << 20  # how many pairs of ids are counted at a time, to bound memory


def floats(counts: npt.ArrayLike) -> Floats:
    """Counts as float64. Raises ValueError for what are no counts."""
    return checked(counts).astype(np.float64)


def checked(counts: npt.ArrayLike) -> npt.NDArray[Any]:
    """Counts `[..., E]` as they are. Raises ValueError for what are no counts."""
    c = np.asarray(counts)
    if c.ndim == 0 or c.shape[-1] == 0:
        raise ValueError(f"counts need an axis of experts, but have the shape {c.shape}")
    if c.dtype.kind not in "uifb":
        raise ValueError(f"counts must be numbers, not {c.dtype}")
    if not np.isfinite(c).all() or (c < 0).any():
        raise ValueError("counts must be finite and not negative")
    return c


def matrix(joint: npt.ArrayLike) -> Floats:
    """Counts of pairs `[..., A, B]` as float64. Raises ValueError for what is none."""
    c = floats(joint)
    if c.ndim < 2:
        raise ValueError(f"counts of pairs need two axes of experts, but have the shape {c.shape}")
    return c


def ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Floats:
    """numerator / denominator, NaN where the denominator is 0, without a warning."""
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    out = np.full(np.broadcast_shapes(top.shape, bottom.shape), np.nan)
    return np.asarray(np.divide(top, bottom, out=out, where=bottom != 0))


def valid(ids: npt.ArrayLike) -> Bools:
    """Which ids are experts: bool, of the shape of `ids`.

    Not the mark of an invalid id, which is the largest value of an unsigned dtype (255 of uint8, 65535 of uint16) and
    any negative value of a signed one. So ids from a trace keep their dtype: widened to another unsigned dtype, 255
    would be an expert's. Raises ValueError for what are no integers.
    """
    e = rows_of_ids(ids)
    return np.asarray(e != np.iinfo(e.dtype).max if e.dtype.kind == "u" else e >= 0)


def legal(ids: npt.ArrayLike, experts: int) -> Ints:
    """Ids as int64, `experts` in the place of each invalid one (`valid`). Raises ValueError for an id of `experts` or
    above that is not marked as invalid.
    """
    e = rows_of_ids(ids)
    ok = valid(e)
    most = int(e.max(where=ok, initial=0))
    if most >= experts and ok.any():
        raise ValueError(f"there is an id {most}, but there are only {experts} experts: give the number of all of them")
    return np.asarray(np.where(ok, e, 0).astype(np.int64) + np.where(ok, 0, experts))


def rows_of_ids(ids: npt.ArrayLike) -> npt.NDArray[Any]:
    """Ids `[..., k]`. Raises ValueError for what are none."""
    e = np.asarray(ids)
    if e.dtype.kind not in "ui":
        raise ValueError(f"ids must be integers, not {e.dtype}")
    if e.ndim == 0:
        raise ValueError("ids need an axis of choices, as in [rows, k]")
    return e
