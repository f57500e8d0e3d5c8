"""A selection as NumPy arrays: one `.npz` file, to be read by `numpy.load` without pickle.

| key | array |
|---|---|
| `ids` | `[rows, layers, k]` uint8 or uint16; the dtype's largest value marks an id that was no expert's |
| `weights` | `[rows, layers, k]` float16 or float32, if they were recorded for all rows and layers |
| `logits` | `[rows, layers, experts]`, likewise; float32 where the router's were bfloat16, which is exact |
| `layers` | `[layers]` int32: the model's own index of each layer |
| `positions` | `[rows]` int64: position in the request, -1 where unknown |
| `request` | `[rows]` int32: index into `request_names`, -1 for a row that is nobody's |
| `request_names` | `[requests]` text |
| `run`, `run_names` | the same of runs: requests of one name in two runs are two requests |
| `step` | `[rows]` int64: number of the step in its run |
| `phase` | `[rows]` uint8: 0 unknown, 1 prefill, 2 decode |
| `modality` | `[rows]` uint8: 0 unknown, 1 text, 2 image, 3 video, 4 audio |
| `flags` | `[rows]` uint16: what became of the row, as in `Selection.flags` |
| `model` | text: the model's name, empty where unknown |

`[rows, layers, …]` also for one layer. In memory there is one array at a time, so twice the largest of them must fit.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace.batch import these
from moe_trace.exchange.made import Advance, Exported, ignore, whole_file
from moe_trace.exchange.rows import FIELDS, Names, lacking, parts

if TYPE_CHECKING:
    from moe_trace.select import Selection

_PER_ROW: dict[str, tuple[str, Any]] = {
    "positions": ("positions", np.int64),
    "step": ("step_numbers", np.int64),
    "phase": ("phases", np.uint8),
    "modality": ("modalities", np.uint8),
    "flags": ("flags", np.uint16),
}


def write(selection: Selection, path: Path, advance: Advance = ignore) -> Exported:
    """Write a selection; `exchange.export` says what can go wrong."""
    selection = selection.layer(selection.layers)
    done = Exported(path)
    lengths = [part.rows for _, part in parts(selection)]
    done.rows = sum(lengths)
    with whole_file(path) as part_path, zipfile.ZipFile(part_path, "w", allowZip64=True) as archive:

        def add(key: str, array: npt.NDArray[Any]) -> None:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.save(file, array, allow_pickle=False)

        add("ids", selection.ids)
        for name in ("weights", "logits"):
            without = lacking(selection, FIELDS[name])
            if without and len(without) < len(selection.layers):
                done.problems.append(f"{name} are left out: not all rows of {these(without)} have them")
            elif not without and done.rows:
                add(name, getattr(selection, name))
        for key, (attribute, dtype) in _PER_ROW.items():
            add(key, _joined(selection, lambda part, name=attribute: getattr(part, name), dtype))  # type: ignore[misc]
        requests, runs = Names(), Names()
        add("request", _joined(selection, lambda part: requests.numbers(part.request_ids), np.int32))
        numbers = [runs.numbers(np.array([run], object)) for run, _ in parts(selection)]
        add("run", np.repeat(np.concatenate(numbers or [np.zeros(0, np.int32)]), lengths))
        add("request_names", np.array(requests.names, np.str_))
        add("run_names", np.array(runs.names, np.str_))
        add("layers", np.array(selection.layers, np.int32))
        add("model", np.array(str(selection._trace.metadata.get("model") or "")))
    advance(done.rows)
    return done


def _joined(selection: Selection, of: Callable[[Any], npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    found = [of(part).astype(dtype, copy=False) for _, part in parts(selection)]
    return np.concatenate(found) if found else np.zeros(0, dtype)
