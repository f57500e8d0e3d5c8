"""A trace as JSON lines, in the schema that per-token router logs have.

The first line describes the model:

    {"type": "meta", "model_id", "vllm_version", "torch_version", "device", "seed", "layers_logged", "top_k"}

and then there is a line for each token and layer, in the order of execution, the layers of a token together:

    {"type": "route", "req_id", "token_idx", "layer", "topk_ids", "topk_weights"}

`token_idx` is the row's absolute position in its request. `topk_ids` are in the order in which the router gave them, which need
not be descending, and `topk_weights` beside them, rounded to 4 decimals. What is not known is null: a key of the meta line, `req_id` of a row that
belongs to no known request, `token_idx`, the weights where they were not recorded, or a weight that is not finite. An id that was no expert's is -1.
`top_k` is a list, beside `layers_logged`, where layers differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

DECIMALS = 4
LINES_AT_ONCE = 1 << 16  # lines in memory at a time, whatever the size of a block


def meta_line(metadata: Mapping[str, Any], layers: Mapping[int, int]) -> str:
    """The first line. `metadata` is the trace's; `layers` maps each exported layer to its k."""
    versions = metadata.get("versions") or {}
    widths = list(layers.values())
    top_k = widths[0] if len(set(widths)) == 1 else widths or None
    return _json(
        {
            "type": "meta",
            "model_id": metadata.get("model"),
            "vllm_version": versions.get("vllm"),
            "torch_version": versions.get("torch"),
            "device": metadata.get("device"),
            "seed": metadata.get("seed"),
            "layers_logged": list(layers),
            "top_k": top_k,
        }
    )


def route_lines(
    layers: Sequence[int],
    request_ids: Sequence[Any] | npt.NDArray[Any],
    positions: npt.NDArray[np.int64],
    ids: npt.NDArray[np.unsignedinteger[Any]],
    weights: npt.NDArray[np.floating[Any]] | None,
) -> Iterator[str]:
    """The lines of a batch of rows.

    request_ids: `[rows]`, None or empty for nobody's; positions: `[rows]`, negative for unknown; ids: uint8 or uint16
    `[rows, layers, k]`, their largest value marking an invalid one; weights: of the same shape, or None.
    """
    rows = len(positions)
    names = {request: _json(request) if request else "null" for request in set(request_ids)}
    piece = max(1, LINES_AT_ONCE // max(len(layers), 1))
    for first in range(0, rows, piece):
        part = slice(first, first + piece)
        of_rows = zip(
            (names[request] for request in request_ids[part]),
            positions[part].tolist(),
            _ids(ids[part]),
            [[None] * len(layers)] * rows if weights is None else _weights(weights[part]),
            strict=False,
        )
        for name, position, ids_of_row, weights_of_row in of_rows:
            head = f'{{"type": "route", "req_id": {name}, "token_idx": {position if position >= 0 else "null"}, "layer": '
            for layer, chosen, weight in zip(layers, ids_of_row, weights_of_row, strict=True):
                listed = "null" if weight is None else weight
                # The text of a list of Python ints or finite floats is JSON already, at a fifth of the cost of json.dumps.
                yield f'{head}{layer}, "topk_ids": {chosen}, "topk_weights": {listed}}}'


def _ids(ids: npt.NDArray[np.unsignedinteger[Any]]) -> list[list[list[int]]]:
    invalid = np.iinfo(ids.dtype).max
    signed = ids.astype(np.int32)
    if (ids == invalid).any():
        signed[ids == invalid] = -1
    listed: list[list[list[int]]] = signed.tolist()
    return listed


def _weights(weights: npt.NDArray[np.floating[Any]]) -> list[list[Any]]:
    rounded = np.round(weights.astype(np.float64), DECIMALS)
    listed: list[list[Any]] = rounded.tolist()
    if np.isfinite(rounded).all():
        return listed
    return [[_json([w if np.isfinite(w) else None for w in of_layer]) for of_layer in row] for row in listed]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
