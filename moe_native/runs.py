"""Runs: whose rows a step has. A run is consecutive rows of one request at consecutive positions (csrc/FORMAT.md, "runs")."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RUN_DTYPE = np.dtype([("request", "<u4"), ("position", "<u4"), ("count", "<u4"), ("cls", "<u2"), ("flags", "<u2")])
UNKNOWN = 0xFFFFFFFF

PHASES = {"unknown": 0, "prefill": 1, "decode": 2}
MODALITIES = {"unknown": 0, "text": 1, "image": 2, "video": 3, "audio": 4}


def row_class(phase: str = "unknown", modality: str = "unknown", attributed: bool = False) -> int:
    """The class of a row: what statistics are kept by, beside the layer.

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
