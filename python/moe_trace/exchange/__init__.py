"""Traces in the formats that others read and write: `export` writes a selection, `load` makes a trace of a log.

| format | what | written | read |
|---|---|---|---|
| `jsonl` | a line for each token and layer (`exchange.jsonl`) | yes | yes |
| `npz` | NumPy arrays (`exchange.npz`) | yes | |
| `parquet` | a row for each token and layer; needs pyarrow (`exchange.parquet`) | yes | |
| `safetensors` | router logits, a tensor for each layer (`exchange.logits`) | yes | |
| `sglang` | counts for SGLang's `--init-expert-location`; needs torch (`exchange.sglang`) | yes | yes |
| `vllm` | a directory of arrays as vLLM returns them, one for each request (`exchange.vllm`) | yes | |
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from moe_trace.errors import TraceError
from moe_trace.exchange import jsonl, load_jsonl, logits, npz, parquet, sglang, vllm
from moe_trace.exchange.made import Advance, Exported, Loaded, ignore

if TYPE_CHECKING:
    from moe_trace.select import Selection

__all__ = ["ENDINGS", "FORMATS", "LOADED", "Exported", "Loaded", "export", "format_of", "load"]

_WRITERS: dict[str, Callable[[Selection, Path, Advance], Exported]] = {
    "jsonl": jsonl.write,
    "npz": npz.write,
    "parquet": parquet.write,
    "safetensors": logits.write,
    "sglang": sglang.write,
    "vllm": vllm.write,
}
FORMATS = tuple(_WRITERS)
LOADED = ("jsonl", "sglang")
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".npz": "npz",
    ".parquet": "parquet",
    ".safetensors": "safetensors",
    ".pt": "sglang",
}


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that the ending of a file's name says. Raises ValueError for an ending that says none."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        known = ", ".join(f"{name} ({ending})" for ending, name in ENDINGS.items() if ending != ".ndjson")
        raise ValueError(f"the name {path} says no format: end it in one of {known}, or name the format")
    return ENDINGS[ending]


def export(
    selection: Selection,
    to: str | os.PathLike[str] | IO[str],
    format: str | None = None,
    *,
    per_step: bool = False,
    advance: Advance = ignore,
) -> Exported:
    """Write a selection to a file (of the format `vllm`: a directory), which has its name only once it is whole.

    Rows are written as they were executed, repeated positions and rejected drafts too; `selection.current()` leaves out
    those that do not count.

    Args:
        to: where; of `jsonl` it may be an open text file.
        format: one of `FORMATS`; None for what the ending of the name says.
        per_step: of `sglang`: the counts of each step, and not their sum.
        advance: called with the number of rows that were done since the last call.

    Returns:
        What was written, and what was left out of it: `Exported.problems` is empty where it has all of the selection.

    Raises:
        ValueError: there is no such format.
        TraceError: the selection has no rows, or not what the format needs; a package is missing.
        OSError: the file cannot be written.
    """
    if isinstance(to, (str, os.PathLike)):
        name = format_of(to) if format is None else format
    else:
        name = "jsonl" if format is None else format
        if name != "jsonl":
            raise ValueError(f"only jsonl is text, and goes to a stream: name a file for {name}")
    if name not in _WRITERS:
        raise ValueError(f"there is no format {name!r} to export to: use {', '.join(FORMATS)}")
    if per_step and name != "sglang":
        raise ValueError("per_step is for the format sglang")
    trace = selection._trace
    if name != "sglang" and trace.executed_rows and not trace.stored_rows:
        raise TraceError(
            f"{trace.path} has counts only, and no row to export; counts can be exported to the format sglang"
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        if not isinstance(to, (str, os.PathLike)):
            done = jsonl.write_to(selection, to, advance)
        elif per_step:
            done = sglang.write_steps(selection, Path(to), advance)
        else:
            done = _WRITERS[name](selection, Path(to), advance)
    done.problems += dict.fromkeys(str(warning.message) for warning in said)
    if name != "sglang" and trace.executed_rows > trace.stored_rows:
        stored = f"{trace.stored_rows:,} of {trace.executed_rows:,} rows"
        done.notes.append(f"{stored} are stored, and exported; the others are counted")
    return done


def load(
    files: Sequence[str | os.PathLike[str]],
    trace: str | os.PathLike[str],
    format: str | None = None,
    *,
    keep_going: bool = False,
    model: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    token_idx: str = "auto",
) -> Loaded:
    """Make a trace of the logs of another tool, or add a run to a trace. Nothing is at the path until all is there.

    What the log does not say stays unknown: whose a row is, its position, its phase, when it was executed. The order of
    the rows is the file's, and weights are float32, as the log gives them.

    Args:
        files: of one recording. One layer in each of them, or one part after the other.
        trace: a directory that is not there yet, or a trace.
        format: `jsonl` or `sglang`; None for what the ending of the first name says.
        keep_going: skip and count malformed lines of JSONL. Else the first one is an error.
        model, experts: the model's name and its number of experts a layer, where the log does not say them.
        top_k: experts a token, for `sglang`, whose counts do not say it. Without it each choice counts as a row.
        token_idx: for `jsonl`: `position` (it is the token's position in its request), `step` (it is something else,
            and positions are unknown), or `auto`: a position unless, of some request, it restarts or repeats.

    Raises:
        ValueError: a line is malformed (the message names file and line), the files do not fit together, or an argument
            does not fit the format.
        TraceError: the place is taken by something that is no trace; a package is missing.
        OSError: a file cannot be read, or the trace cannot be written.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("there is no file to import: name at least one")
    name = format_of(paths[0]) if format is None else format
    if experts is not None and not 0 < experts <= 65535:
        raise ValueError(f"experts={experts} is no number of experts: give 1 to 65,535")
    if name == "jsonl":
        if top_k is not None:
            raise ValueError("top_k is for the format sglang: in JSONL each line has its experts")
        return load_jsonl.load(
            paths, Path(trace), keep_going=keep_going, model=model, experts=experts, token_idx=token_idx
        )
    if name == "sglang":
        return sglang.load(paths, Path(trace), model=model, experts=experts, top_k=top_k)
    raise ValueError(f"there is no format {name!r} to import: use {' or '.join(LOADED)}")
