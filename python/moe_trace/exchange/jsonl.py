"""A trace as JSON lines, in the schema that per-token router logs have.

The first line describes the model:

    {"type": "meta", "model_id", "vllm_version", "torch_version", "device", "seed", "layers_logged", "top_k"}

and then there is a line for each token and layer, in the order of execution, the layers of a token together:

    {"type": "route", "req_id", "token_idx", "layer", "topk_ids", "topk_weights"}

and, where the trace has several runs, `"run"` with the name of its run, since two runs may have a request of one name.

`token_idx` is the row's absolute position in its request. `topk_ids` are in the order in which the router gave them,
which need not be descending, and `topk_weights` beside them, rounded to 4 decimals. What is not known is null: a key of
the meta line, `req_id` of a row that belongs to no known request, `token_idx`, the weights where they were not
recorded, or a weight that is not finite. An id that was no expert's is -1. `top_k` is a list, beside `layers_logged`,
where layers differ.

Rows are written as they were executed. A draft token that was rejected, or a position that was computed again, has its
lines too; of several lines with one `run`, `req_id`, `token_idx` and `layer` the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace.errors import DamagedTrace
from moe_trace.exchange.made import Advance, Exported, ignore, whole_file
from moe_trace.format import IDS, WEIGHTS

if TYPE_CHECKING:
    from moe_trace import Selection, Trace

Column = tuple[int, npt.NDArray[Any], npt.NDArray[Any] | None]  # a layer's index, ids and weights

DECIMALS = 4
LINES_AT_ONCE = 1 << 16  # lines in memory at a time, whatever the size of a block


def write(selection: Selection, path: Path, advance: Advance = ignore) -> Exported:
    """Write a selection; `exchange.export` says what can go wrong. Damaged blocks are left out, which is said."""
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        done = write_to(selection, file, advance)
    done.path = path
    return done


def write_to(selection: Selection, file: IO[str], advance: Advance = ignore) -> Exported:
    """The same to an open file."""
    done = Exported(None)
    for lines, rows in jsonl(selection._trace, selection, done.problems):
        file.write(lines)
        done.rows += rows
        advance(rows)
    return done


def jsonl(trace: Trace, selection: Selection, problems: list[str]) -> Iterator[tuple[str, int]]:
    """The whole export of a selection, piece by piece: (text of whole lines, how many rows of the trace are done with).

    Holds one block of the trace in memory. A block of which a needed part is damaged is left out, and a sentence that
    says so is added to `problems`.
    """
    top_k = {entry.layer: entry.top_k or None for entry in trace.coverage}
    yield meta_line(trace.metadata, {layer: top_k.get(layer) for layer in selection.layers}) + "\n", 0
    for batch in selection.batches(problems):
        try:
            columns = [(batch.column(IDS, layer), batch.column(WEIGHTS, layer)) for layer in batch.layers]
            names, positions = batch.request_ids, batch.positions
        except DamagedTrace as error:
            problems.append(f"{batch.rows:,} rows are left out, their block is damaged: {error}")
            continue
        parts = [(layer, ids, weights) for layer, (ids, weights) in zip(batch.layers, columns, strict=True)]
        run = batch.run if len(trace.runs) > 1 else None
        lines = route_lines(names, positions, [(layer, ids, w) for layer, ids, w in parts if ids is not None], run)
        while piece := "".join(f"{line}\n" for line in islice(lines, LINES_AT_ONCE)):
            yield piece, 0
        yield "", batch.rows


def meta_line(metadata: Mapping[str, Any], layers: Mapping[int, int | None]) -> str:
    """The first line. `metadata` is the trace's; `layers` maps each exported layer to its k, None where it is not
    known.
    """
    said = metadata.get("versions")
    versions = said if isinstance(said, dict) else {}
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
    request_ids: Sequence[Any] | npt.NDArray[Any],
    positions: npt.NDArray[np.int64],
    columns: Sequence[Column],
    run: str | None = None,
) -> Iterator[str]:
    """The lines of some rows.

    request_ids: `[rows]`, None or empty for nobody's; positions: `[rows]`, negative for unknown; columns: for each
    layer its index, its ids `[rows, k]` (uint8 or uint16, whose largest value marks an invalid one) and its weights,
    of the same shape, or None; run: its name, where the lines shall have it.
    """
    end = "}" if run is None else f', "run": {_json(run)}}}'
    names = {request: _json(request) if request else "null" for request in set(request_ids)}
    piece = max(1, LINES_AT_ONCE // max(len(columns), 1))
    for first in range(0, len(positions), piece):
        part = slice(first, first + piece)
        heads = [
            f'{{"type": "route", "req_id": {names[request]}, "token_idx": {at if at >= 0 else "null"}, "layer": '
            for request, at in zip(request_ids[part], positions[part].tolist(), strict=True)
        ]
        of_layers = [
            (f'{layer}, "topk_ids": ', _ids(ids[part]), _weights(weights, part, len(heads)))
            for layer, ids, weights in columns
        ]
        for row, head in enumerate(heads):
            for layer, ids_of_rows, weights_of_rows in of_layers:
                # The text of a list of ints or finite floats is JSON already, at a fifth of the cost of json.dumps.
                yield f'{head}{layer}{ids_of_rows[row]}, "topk_weights": {weights_of_rows[row]}{end}'


def _ids(ids: npt.NDArray[Any]) -> list[Any]:
    invalid = np.iinfo(ids.dtype).max
    signed = ids.astype(np.int32)
    signed[ids == invalid] = -1
    listed: list[Any] = signed.tolist()
    return listed


def _weights(weights: npt.NDArray[Any] | None, part: slice, rows: int) -> list[Any]:
    if weights is None:
        return ["null"] * rows
    rounded = np.round(weights[part].astype(np.float64), DECIMALS)
    listed: list[Any] = rounded.tolist()
    if np.isfinite(rounded).all():
        return listed
    return [_json([w if np.isfinite(w) else None for w in row]) for row in listed]


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
