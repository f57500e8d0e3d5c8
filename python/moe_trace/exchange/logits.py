"""Router logits as a safetensors file: what `safetensors.numpy.load_file` or `safetensors.torch.load_file` read.

| tensor | shape |
|---|---|
| `layers.7.logits` | `[rows, experts]` F16 or F32, one tensor for each layer, named by the model's own index |
| `positions` | `[rows]` I64: position in the request, -1 where unknown |
| `request` | `[rows]` I32: index into the metadata's `requests`, -1 for a row that is nobody's |
| `run` | `[rows]` I32: index into the metadata's `runs` |

The file's metadata are text, as the format wants: `requests` and `runs` are JSON lists of names, `layers` one of the
layers' indices, `model` is the model's name (empty where unknown). Logits that the router had in bfloat16 are float32
here, as everywhere in this package: exactly the same numbers, twice the bytes.

The format is a length, a JSON header and the tensors one after the other (its description is in the README of
huggingface/safetensors). It is written here, and not by that package, because that takes all tensors in memory: so
there is one column of one block, and the trace is read once for each tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import these
from moe_trace.errors import TraceError
from moe_trace.exchange.made import Advance, Exported, ignore, whole_file
from moe_trace.exchange.rows import Names, lacking, parts

if TYPE_CHECKING:
    from moe_trace.select import Selection

_DTYPES = {"float16": "F16", "float32": "F32", "int64": "I64", "int32": "I32"}


def write(selection: Selection, path: Path, advance: Advance = ignore) -> Exported:
    """Write the logits of a selection; `exchange.export` says what can go wrong."""
    without = lacking(selection, fmt.LOGITS)
    if without:
        raise TraceError(
            f"logits were not recorded for all rows of {these(without)}. To record them, set "
            "MOE_NATIVE_FIELDS=ids,weights,logits; or select other layers or times"
        )
    done = Exported(path)
    requests, runs = Names(), Names()
    shapes: dict[int, tuple[int, np.dtype[Any]]] = {}
    for run, part in parts(selection):
        done.rows += part.rows
        requests.numbers(part.request_ids)
        runs.numbers(np.array([run], object))
        for layer in selection.layers:
            if layer not in shapes:
                shapes[layer] = _shape(_logits(part, layer))
    if not done.rows:
        raise TraceError("there are no rows to export: the selection is empty")
    per_row: dict[str, Callable[[str, Any], npt.NDArray[Any]]] = {
        "positions": lambda run, part: part.positions.astype(np.int64),
        "request": lambda run, part: requests.numbers(part.request_ids),
        "run": lambda run, part: runs.numbers(np.array([run], object)).repeat(part.rows),
    }
    about = {
        "model": str(selection._trace.metadata.get("model") or ""),
        "layers": json.dumps(list(selection.layers)),
        "requests": json.dumps(requests.names),
        "runs": json.dumps(runs.names),
    }
    tensors: list[tuple[str, np.dtype[Any], tuple[int, ...]]]
    tensors = [(f"layers.{layer}.logits", dtype, (done.rows, width)) for layer, (width, dtype) in shapes.items()]
    dtypes: dict[str, np.dtype[Any]] = {
        "positions": np.dtype(np.int64),
        "request": np.dtype(np.int32),
        "run": np.dtype(np.int32),
    }
    tensors += [(name, dtype, (done.rows,)) for name, dtype in dtypes.items()]
    with whole_file(path) as whole, whole.open("wb") as file:
        file.write(_header(tensors, about))
        for layer in selection.layers:
            for _, part in parts(selection):
                column = _logits(part, layer)
                if _shape(column) != shapes[layer]:
                    raise TraceError(
                        f"the logits of layer {layer} have different widths or types over time: select some steps"
                    )
                file.write(_little(column))
        for values in per_row.values():
            for run, part in parts(selection):
                file.write(_little(values(run, part)))
    advance(done.rows)
    return done


def _logits(part: Any, layer: int) -> npt.NDArray[Any]:
    column: npt.NDArray[Any] | None = part.column(fmt.LOGITS, layer)
    if column is None:
        raise TraceError(f"logits were not recorded for all rows of layer {layer}")
    return column


def _shape(column: npt.NDArray[Any]) -> tuple[int, np.dtype[Any]]:
    return column.shape[1], column.dtype


def _header(tensors: list[tuple[str, np.dtype[Any], tuple[int, ...]]], about: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name, dtype, shape in tensors:
        end = at + dtype.itemsize * int(np.prod(shape))
        entries[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors are aligned; the format pads with spaces
    return len(text).to_bytes(8, "little") + text


def _little(array: npt.NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
