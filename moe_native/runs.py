"""Runs: whose rows a step has. A run is consecutive rows of one request at consecutive positions (csrc/FORMAT.md,
"runs")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt

RUN_DTYPE = fmt.TABLES[fmt.RUNS]
UNKNOWN = fmt.NOBODY  # a request or a position

PHASES = {name: code for code, name in enumerate(fmt.PHASES)}
MODALITIES = {name: code for code, name in enumerate(fmt.MODALITIES)}
FLAGS = fmt.RUN_FLAGS
RECOMPUTED, DRAFT = fmt.CLASS_RECOMPUTED, fmt.CLASS_DRAFT
COUNTED_FLAG = fmt.RUN_COUNTED  #: in the ring only: these rows are counted and not stored


def row_class(phase: str = "unknown", modality: str = "unknown", attributed: bool = False) -> int:
    """The class of a row: what statistics are kept by, beside the layer. `RECOMPUTED` and `DRAFT` may be added.

    Raises:
        ValueError: the phase or the modality is not one of `PHASES`, `MODALITIES`.
    """
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}: use one of {', '.join(PHASES)}")
    if modality not in MODALITIES:
        raise ValueError(f"unknown modality {modality!r}: use one of {', '.join(MODALITIES)}")
    return PHASES[phase] | MODALITIES[modality] << 2 | int(attributed) << 6


def join_rows(
    requests: npt.NDArray[np.uint32], positions: npt.NDArray[np.uint32], classes: npt.NDArray[np.uint16]
) -> npt.NDArray[np.void]:
    """Runs of rows given one by one.

    Args:
        requests: `[rows]` request indices, `UNKNOWN` for nobody's.
        positions: `[rows]` absolute positions, `UNKNOWN` where not known.
        classes: `[rows]` from `row_class`.

    Returns:
        `[runs]` of `RUN_DTYPE`, in the order of the rows; their counts add up to the number of rows.
    """
    rows = len(requests)
    if rows == 0:
        return np.zeros(0, RUN_DTYPE)
    known = positions != UNKNOWN
    follows = np.where(known[1:], positions[1:] == positions[:-1] + np.uint32(1), ~known[:-1]) & (
        known[1:] == known[:-1]
    )
    same = (requests[1:] == requests[:-1]) & (classes[1:] == classes[:-1]) & follows
    starts = np.concatenate(([0], np.flatnonzero(~same) + 1))
    runs = np.zeros(len(starts), RUN_DTYPE)
    runs["request"] = requests[starts]
    runs["position"] = positions[starts]
    runs["count"] = np.diff(np.append(starts, rows))
    runs["cls"] = classes[starts]
    return runs


def one_per_row(
    requests: Sequence[str] | None, positions: Any, rows: int | None
) -> tuple[list[str] | None, npt.NDArray[np.uint32]]:
    """Names and positions of a step's rows, one each, from the forms that `Recorder.step` takes.

    Returns:
        `[rows]` names, or None for nobody's; `[rows]` positions, `UNKNOWN` where not known.

    Raises:
        ValueError: they do not fit together, or do not say how many rows there are.
    """
    if positions is None:
        count = rows if rows is not None else len(requests) if requests is not None else None
        if count is None:
            raise ValueError("how many rows does the step have? Give positions, or rows")
        flat, per_request = np.full(count, UNKNOWN, np.uint32), None
    elif len(positions) > 0 and np.ndim(positions[0]) == 1:
        parts = [_positions(part) for part in positions]
        flat, per_request = np.concatenate(parts), [len(part) for part in parts]
    else:
        flat, per_request = _positions(positions), None
    if rows is not None and rows != len(flat):
        raise ValueError(f"rows={rows}, but there are {len(flat)} positions")
    if requests is None:
        return None, flat
    if isinstance(requests, str):
        raise ValueError("requests is a sequence of names: write [name]")
    names = [str(name) for name in requests]
    if per_request is not None:
        if len(names) != len(per_request):
            raise ValueError(f"{len(names)} requests, but positions for {len(per_request)}")
        names = [name for name, count in zip(names, per_request, strict=True) for _ in range(count)]
    elif len(names) != len(flat):
        raise ValueError(f"{len(names)} requests for {len(flat)} rows: give one name a row, or positions by request")
    return names, flat


def _positions(values: Any) -> npt.NDArray[np.uint32]:
    array = np.asarray(values, dtype=np.int64)
    if array.ndim != 1 or (array.size and (array.min() < 0 or array.max() >= UNKNOWN)):
        raise ValueError("positions are whole numbers from 0 to 4294967294, in one dimension")
    return array.astype(np.uint32)


def runs_of(
    names: Sequence[str] | None,
    positions: npt.NDArray[np.uint32],
    modality: str,
    learn: Callable[[str], tuple[int, int]],
) -> npt.NDArray[np.void]:
    """Runs of rows of which each has a name and a position, as `one_per_row` gives them.

    Args:
        learn: gives the index of a request, and the length of its prompt, -1 where unknown.

    Returns:
        `[runs]` of `RUN_DTYPE`. A row is of the prompt iff its position is below the prompt's length; where either is
        unknown, so is the phase.
    """
    rows = len(positions)
    if names is None:
        classes = np.full(rows, row_class("unknown", modality, False), np.uint16)
        return join_rows(np.full(rows, UNKNOWN, np.uint32), positions, classes)
    known = {name: learn(name) for name in dict.fromkeys(names)}
    requests = np.fromiter((known[name][0] for name in names), np.uint32, rows)
    prompts = np.fromiter((known[name][1] for name in names), np.int64, rows)
    unknown, prefill, decode = (row_class(phase, modality, True) for phase in ("unknown", "prefill", "decode"))
    told = (prompts >= 0) & (positions != UNKNOWN)
    classes = np.where(told, np.where(positions < prompts, prefill, decode), unknown).astype(np.uint16)
    return join_rows(requests, positions, classes)
