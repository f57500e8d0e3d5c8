"""One pass over a selection that fills several accumulators, in one process or in several."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_trace import trace as traces
from moe_trace.analysis.accumulator import Accumulator
from moe_trace.analysis.part import Names, Part
from moe_trace.analysis.work import Reader, Window, split, windows
from moe_trace.batch import Filter
from moe_trace.errors import DamagedTrace, TraceError
from moe_trace.select import Selection
from moe_trace.units import count

Advance = Callable[[int], Any]

_POLL_SECONDS = 0.1  # between two looks at how far the processes are


@dataclass(frozen=True)
class _Filled:
    """What one share of the windows gave."""

    accumulators: list[Accumulator]
    left_out: list[str]
    lacking: int


def fill(selection: Selection, *accumulators: Accumulator, jobs: int = 1, progress: Advance | None = None) -> list[str]:
    """Read the rows of a selection once, block by block, and add them to the accumulators.

        together, repeated = Coactivation(), Repetition()
        notes = analysis.fill(trace.decode().current(), together, repeated, jobs=4)
        together.share(12), repeated.share(12).low

    The rows are those that `selection.ids` is of: all that were executed, superseded rows and rejected drafts too,
    unless it is narrowed by `.current()`; where the selected layers are in several stages of a pipeline, the rows that
    all of them have. In memory are one block of each rank that has to be joined, and what the accumulators hold.

    Args:
        jobs: how many processes share the work, 0 for as many as there are cores. Each opens the trace itself. What
            they find is the same, exactly. As with all of `multiprocessing`, a script that asks for several has to
            begin under `if __name__ == "__main__":`, and accumulators of one's own have to be in a module.
        progress: called with a number of rows each time that so many more were read.

    Returns:
        Sentences: what was left out, and why. Blocks that are damaged, rows that not all stages have, rows that were
        counted when they were recorded but not stored, and the notes of the accumulators.

    Raises:
        TraceError: an accumulator needs what was not recorded, or one of the processes was killed. The accumulators
            are then as they were.
    """
    if jobs < 0:
        raise ValueError(f"jobs is a number of processes, or 0 for one on each core, not {jobs}")
    shares = split(windows(selection), jobs or len(os.sched_getaffinity(0)))
    empty = [one.empty() for one in accumulators]
    if len(shares) > 1:
        found = _in_processes(selection, shares, empty, progress)
    else:
        found = [_fill_share(selection, share, empty, progress) for share in shares]
    for filled in found:
        for into, part in zip(accumulators, filled.accumulators, strict=True):
            into.merge(part)
    return _notes(selection, found, accumulators)


def _fill_share(
    selection: Selection, share: Sequence[Window], accumulators: Sequence[Accumulator], progress: Advance | None
) -> _Filled:
    filled = [one.empty() for one in accumulators]
    needs = frozenset().union(*(one.needs for one in filled))
    reader, layers, experts = Reader(selection), selection.layers, selection._trace.experts
    names: dict[tuple[str, ...], Names] = {}
    for window in share:
        for rows in reader.read(window):
            if window.group not in names:
                names[window.group] = Names(reader.group(window))
            try:
                part = Part(rows, needs, layers, experts, names[window.group])
            except DamagedTrace as error:
                reader.leave_out(window.first, window.end - 1, error)
                continue
            for one in filled:
                one.add(part)
            if progress is not None:
                progress(part.rows)
    return _Filled(filled, reader.left_out, reader.lacking)


def _notes(selection: Selection, found: Sequence[_Filled], accumulators: Sequence[Accumulator]) -> list[str]:
    notes = [sentence for filled in found for sentence in filled.left_out]
    if lacking := sum(filled.lacking for filled in found):
        notes.append(f"{count(lacking, 'row')} are left out: not all stages of the pipeline have them")
    trace = selection._trace
    if trace.executed_rows > trace.stored_rows:
        notes.append(
            f"of the {count(trace.executed_rows, 'executed row')} of the trace, {trace.stored_rows:,} are stored: what "
            "is analysed is of these"
        )
    notes += [sentence for one in accumulators for sentence in one.notes()]
    return list(dict.fromkeys(notes))


_done: Any = None  # of a process: rows that each of the processes has read


def _start(done: Any) -> None:
    global _done
    _done = done


def _in_processes(
    selection: Selection, shares: Sequence[list[Window]], empty: list[Accumulator], progress: Advance | None
) -> list[_Filled]:
    # Not forked: a program with torch in it has threads, whose locks a fork would copy as they are.
    context = multiprocessing.get_context("spawn")
    done, told = context.Array("q", len(shares), lock=False), 0
    path, asked = selection._trace.path.absolute(), selection._asked
    with ProcessPoolExecutor(len(shares), mp_context=context, initializer=_start, initargs=(done,)) as pool:
        futures = [pool.submit(_job, path, asked, share, empty, n) for n, share in enumerate(shares)]
        try:
            waiting = True
            while waiting:
                finished = wait(futures, _POLL_SECONDS, FIRST_EXCEPTION)
                waiting = bool(finished.not_done) and not any(future.exception() for future in finished.done)
                if progress is not None and (rows := sum(done)) > told:
                    progress(rows - told)
                    told = rows
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise TraceError(
                "a process that shared the work could not start or was killed. Is there enough memory for its share of "
                'the accumulators, and is the script that asks for jobs under if __name__ == "__main__":?'
            ) from None
        finally:
            for future in futures:
                future.cancel()


def _job(path: Path, asked: Filter, share: list[Window], empty: list[Accumulator], number: int) -> _Filled:
    def advance(rows: int) -> None:
        _done[number] += rows

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is in the notes
        return _fill_share(Selection(traces.open(path), asked), share, empty, advance)
