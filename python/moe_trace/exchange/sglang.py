"""Counts as SGLang keeps them: a `.pt` file (`torch.save`) of a dict with the tensor `logical_count`. It needs torch.

`logical_count` is `[layers, experts]`, or `[steps, layers, experts]`, int32 (int64 where a count is larger): how often
each logical expert was chosen. SGLang's recorder writes the second form, in its mode `stat`, and its server takes both
for `--init-expert-location FILE.pt`, where it adds the steps up. The layers are all layers of the model, by index:
those that have no experts are zeros.

`write` makes the first form, from statistics, so of traces without rows too. `write_steps` makes the second, from rows.
`load` makes a trace of either: statistics without rows, as `fields="counts"` records them, one block for each step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import these
from moe_trace.errors import TraceError
from moe_trace.exchange.made import Advance, Exported, Loaded, ignore, package, whole_file
from moe_trace.exchange.new_run import NewRun, new_runs
from moe_trace.exchange.rows import parts
from moe_trace.statistics import LayerStats, Sums
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_trace.select import Selection

_WHAT = "SGLang's .pt"
Counts = npt.NDArray[np.int64]


def write(selection: Selection, path: Path, advance: Advance = ignore) -> Exported:
    """Write the counts of a selection, `[layers, experts]`; `exchange.export` says what can go wrong."""
    torch = package("torch", _WHAT)
    done = Exported(path)
    stats = selection.stats()
    done.rows = max((of.rows for of in stats.values()), default=0)
    if not done.rows:
        raise TraceError("there is nothing to export: no row is counted in the selection")
    counts = np.zeros((_depth(selection), max(len(of.counts) for of in stats.values())), np.int64)
    for layer, of in stats.items():
        counts[layer, : len(of.counts)] = of.counts
    _save(torch, selection, counts, path, done)
    advance(done.rows)
    return done


def write_steps(selection: Selection, path: Path, advance: Advance = ignore) -> Exported:
    """Write the counts of each step of a selection, `[steps, layers, experts]`, in the order of the steps, rank by
    rank. All counts are in memory.

    Raises:
        TraceError: besides what `exchange.export` says, rows were counted and not stored: steps cannot be told apart.
    """
    torch = package("torch", _WHAT)
    if selection._trace.executed_rows > selection._trace.stored_rows:
        raise TraceError("not all rows are stored, and so steps cannot be told apart: export the sum of all steps")
    done = Exported(path)
    depth, experts = _depth(selection), max((len(of.counts) for of in selection.stats().values()), default=0)
    found = [_of_steps(part, depth, experts) for _, part in parts(selection)]
    if not found:
        raise TraceError("there is nothing to export: the selection has no rows")
    counts = np.concatenate(found)
    done.rows = len(counts)
    _save(torch, selection, counts, path, done)
    advance(done.rows)
    return done


def _of_steps(part: Any, depth: int, experts: int) -> Counts:
    """`[steps, layers, experts]` of whole steps: no step is in two parts."""
    _, step = np.unique(part.step_numbers, return_inverse=True)
    steps = int(step.max()) + 1
    counts = np.zeros((steps, depth, experts), np.int64)
    for layer in part.layers:
        ids = part.column(fmt.IDS, layer)
        legal = ids != np.iinfo(ids.dtype).max
        cells = (step[:, None] * experts + ids.astype(np.int64))[legal]
        counts[:, layer] = np.bincount(cells, minlength=steps * experts).reshape(steps, experts)
    return counts


def _depth(selection: Selection) -> int:
    """How many layers the model has, as far as the trace knows."""
    known = [*selection._trace.layers, *(entry.layer for entry in selection._trace.coverage)]
    return max(known, default=-1) + 1


def _save(torch: Any, selection: Selection, counts: Counts, path: Path, done: Exported) -> None:
    trace = selection._trace
    unselected = sorted(set(trace.layers) - set(selection.layers))
    unrecorded = sorted(entry.layer for entry in trace.coverage if not entry.recorded)
    for layers, why in ((unselected, "not selected"), (unrecorded, "not recorded")):
        if layers:
            done.problems.append(f"{these(layers)} {'was' if len(layers) == 1 else 'were'} {why}, and read as unused")
    narrow = counts.max(initial=0) <= np.iinfo(np.int32).max
    with whole_file(path) as part, part.open("wb") as file:
        torch.save({"logical_count": torch.from_numpy(counts.astype(np.int32) if narrow else counts)}, file)


def load(files: list[Path], trace: Path, *, model: str | None, experts: int | None, top_k: int | None) -> Loaded:
    """`exchange.load` of SGLang's files, one after the other."""
    torch = package("torch", _WHAT)
    counts = np.concatenate(_alike(files, [_read(torch, file) for file in files]))
    width = counts.shape[2]
    if experts not in (None, width):
        raise ValueError(f"{files[0]} has counts of {width} experts, not of {experts}")
    used = np.flatnonzero(counts.any(axis=(0, 2)))
    steps = counts[counts.any(axis=(1, 2))]
    if not len(steps):
        raise ValueError(f"{', '.join(map(str, files))}: all counts are zero, so there is nothing to import")
    done = Loaded(trace, layers=tuple(used.tolist()), lines=len(steps))
    rows = _rows(steps, top_k, files[0])
    done.notes += _notes(counts, steps, used, top_k)
    imported = {"format": "sglang", "from": "SGLang's expert distribution recorder", "files": list(map(str, files))}
    metadata: dict[str, Any] = {"model": model} if model is not None else {}
    metadata |= {"fields": ["counts"], "imported": imported | {"notes": done.notes}}
    detail = "imported from counts" + ("" if top_k else "; each choice counts as a row")
    metadata["layers"] = [
        {"layer": layer, "name": "", "experts": width, "top_k": top_k or 0, "status": "exact", "detail": detail}
        for layer in done.layers
    ]
    with new_runs(trace) as runs:
        run = NewRun(runs.add(), metadata)
        for of_step, of_layers in zip(steps, rows, strict=True):
            run.counts(_sums(of_step, of_layers, top_k or 1), int(of_layers.max()))
        done.runs.append(run.close([]))
    done.rows = int(rows.max(axis=1).sum())
    return done


def _read(torch: Any, file: Path) -> Counts:
    """`[steps, layers, experts]` of one file."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # it is not said which: of pickle, of zip files, of torch
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} cannot be read as a file of torch: {why}") from None
    if isinstance(content, dict) and "records" in content:
        raise ValueError(
            f"{file} is of SGLang's mode per_pass or per_token, which has physical experts: record it with "
            "--expert-distribution-recorder-mode stat"
        )
    if not isinstance(content, dict) or "logical_count" not in content:
        raise ValueError(f"{file} has no logical_count: it is not what SGLang's recorder writes in its mode stat")
    tensor = content["logical_count"]
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"logical_count of {file} is no tensor of integers")
    counts: Counts = tensor.numpy().astype(np.int64)
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or not counts.size or counts.shape[1] > fmt.NO_LAYER or counts.shape[2] > fmt.NO_LAYER:
        raise ValueError(
            f"logical_count of {file} has the shape {list(tensor.shape)}: it should be [layers, experts] or "
            "[steps, layers, experts]"
        )
    if counts.min() < 0:
        raise ValueError(f"logical_count of {file} has negative counts")
    return counts


def _alike(files: list[Path], found: list[Counts]) -> list[Counts]:
    for file, counts in zip(files, found, strict=True):
        if counts.shape[1:] != found[0].shape[1:]:
            shapes = " and ".join(f"{c.shape[1]} layers of {c.shape[2]} experts" for c in (found[0], counts))
            raise ValueError(f"{files[0]} and {file} are not of one model: {shapes}")
    return found


def _rows(steps: Counts, top_k: int | None, file: Path) -> Counts:
    """`[steps, layers]`: tokens or, where k is not known, choices."""
    choices: Counts = steps.sum(axis=2)
    if top_k is None:
        return choices
    if top_k < 1 or (choices % top_k).any():
        raise ValueError(f"the counts of {file} are not those of {top_k} experts a token: {top_k} does not divide them")
    return choices // top_k


def _notes(counts: Counts, steps: Counts, used: npt.NDArray[np.intp], top_k: int | None) -> list[str]:
    notes = ["counts do not say whose rows they are, their phase, their modality, and when they were executed"]
    if top_k is None:
        notes.append("counts do not say how many experts a token chose (top_k does): each choice counts as a row")
    if len(used) < counts.shape[1]:
        unused = [layer for layer in range(counts.shape[1]) if layer not in used]
        notes.append(f"{these(unused)} {'has' if len(unused) == 1 else 'have'} no counts, as dense layers, and no rows")
    if len(steps) < len(counts):
        empty = count(len(counts) - len(steps), "step")
        notes.append(f"{empty} without counts are left out: SGLang's buffer has places that were never filled")
    return notes


def _sums(counts: Counts, rows: Counts, k: int) -> Sums:
    """The statistics of one step."""
    stats = {
        layer: LayerStats(int(rows[layer]), of_layer, np.zeros(len(of_layer)))
        for layer, of_layer in enumerate(counts)
        if rows[layer]
    }
    sums = Sums()
    sums.add_stats(0, k, stats)
    return sums
