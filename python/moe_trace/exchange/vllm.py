"""Expert ids as vLLM returns them (`enable_return_routed_experts`): a directory with a `.npy` file for each request.

A file is `[tokens - 1, layers, k]`, uint8 where all ids of the model fit, else uint16, one row for each position from 0
on; of the last token there is none, because it was sampled and never executed. The file's name is the request's, with
`%2F` for `/` and so on (`urllib.parse.unquote` undoes it).

What vLLM does with the layers: it has a place for every layer of the model and zeros for dense ones. Here are the
layers that were recorded, ascending; a note says which they are where that makes a difference.

Rows that the engine had in its prefix cache are those of the request that computed them, as `Selection.sequence` finds
them. A request that lacks a row is left out, and said: nothing is filled in.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from moe_trace.batch import Filter, these
from moe_trace.errors import TraceError
from moe_trace.exchange.made import Advance, Exported, beside, ignore
from moe_trace.sequence import CACHED, STATES, TokenSequence
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_trace.select import Selection


def write(selection: Selection, path: Path, advance: Advance = ignore) -> Exported:
    """Write the requests of a selection; `exchange.export` says what can go wrong.

    Raises:
        TraceError: besides, the selection cuts requests by time or phase, several runs have a request of one name, the
            directory is there and not empty, or no request is whole.
    """
    asked = selection._asked
    if replace(asked, layers=None, one_layer=False, requests=None, runs=None, current=False) != Filter():
        raise TraceError("vLLM's format has whole requests: select by layer, request and run only")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise TraceError(f"{path} is there already: name a directory that is new or empty")
    trace = selection._trace
    runs = {run.name for run in trace.runs} if asked.runs is None else asked.runs
    names = [
        name
        for name, request in trace.requests.items()
        if runs.intersection(request.runs) and (asked.requests is None or name in asked.requests)
    ]
    if not names:
        raise TraceError("the selection has no request with a name, and vLLM's format is one of requests")
    done = Exported(path)
    selection = selection.layer(selection.layers)
    experts = max((trace.experts.get(layer, 0) for layer in selection.layers), default=0)
    files = 0
    with beside(path) as directory:
        for name in names:
            try:
                ids = _whole(selection.sequence(name), experts, trace.requests[name].prompt_len or 0)
            except _NotWhole as error:
                done.problems.append(f"request {name!r} is left out: {error}")
                continue
            np.save(directory / f"{quote(name, safe=' ')}.npy", ids, allow_pickle=False)
            done.rows += len(ids)
            advance(len(ids))
            files += 1
        if not files:
            raise TraceError(f"no request is whole: {done.problems[0]}")
        os.chmod(directory, 0o777 & ~_umask())
        os.rename(directory, path)
    if selection.layers != tuple(range(len(selection.layers))):
        done.notes.append(
            f"the {count(len(selection.layers), 'layer')} of these arrays are {these(selection.layers)} of the model; "
            "vLLM's own arrays have zeros for the others"
        )
    return done


class _NotWhole(Exception):
    pass


def _whole(sequence: TokenSequence, experts: int, prompt: int) -> npt.NDArray[Any]:
    """`[positions, layers, k]`, with `prompt` positions at least. Raises _NotWhole where a row or an id is missing."""
    if not sequence.complete:
        numbers = {state: int((sequence.state == state).sum()) for state in range(CACHED)}
        states = [f"{count(n, 'position')} {STATES[state]}" for state, n in numbers.items() if n]
        raise _NotWhole(f"{' and '.join(states)} of {len(sequence):,}")
    if not len(sequence):
        raise _NotWhole("none of its rows is in the trace")
    if len(sequence) < prompt:
        raise _NotWhole(f"it has {len(sequence):,} of the {count(prompt, 'position')} of its prompt")
    ids = sequence.ids
    invalid = int((ids == np.iinfo(ids.dtype).max).sum())
    if invalid:
        raise _NotWhole(f"{count(invalid, 'id')} of it {'is' if invalid == 1 else 'are'} no expert's")
    # vLLM has bytes up to 256 experts, where the trace, which keeps 255 free, has them up to 255.
    return ids.astype(np.uint8) if ids.dtype == np.uint16 and 0 < experts <= 256 else ids


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
