"""JSONL logs, of this package and of others, into a trace. `exchange.load` says how, `exchange.lines` what is read.

Files may be larger than memory: lines go to the disk layer by layer, as `exchange.spool` says, and from there into
blocks. In memory there are the names of the requests and some ten thousand lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import these
from moe_trace.exchange.lines import INVALID, Malformed, Reader, Route, lines_of
from moe_trace.exchange.made import Loaded
from moe_trace.exchange.new_run import NewRun, NewRuns, new_runs
from moe_trace.exchange.spool import Spool
from moe_trace.units import count

LINES_AT_ONCE = 1 << 14  # in memory
BLOCK_BYTES = 4 << 20
SKIPPED_SAID = 20  # of the skipped lines, so many are named
TOKEN_IDX = ("auto", "position", "step")


class _Order:
    """Whether `token_idx` can be a position: then, of each request, it ascends. It is looked at in one layer of each.

    Attributes:
        restart: where it does not, a clause that says so; None while it does.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str | None, str], tuple[int, int]] = {}  # by run and request: layer, token_idx
        self.restart: str | None = None

    def see(self, route: Route, where: str) -> None:
        if route.request is None or route.at < 0 or self.restart is not None:
            return
        key = route.run, route.request
        layer, last = self._last.get(key, (route.layer, -1))
        if layer == route.layer:
            if route.at <= last:
                self.restart = f"request {route.request!r} has {route.at} after {last} in {where}"
                self._last.clear()
            else:
                self._last[key] = layer, route.at


class _Log:
    """The lines of all files."""

    def __init__(self, scratch: Path, reader: Reader, keep_going: bool) -> None:
        self.runs: dict[str | None, Spool] = {}
        self.order = _Order()
        self.lines = self.skipped = 0
        self.first_skipped: list[str] = []
        self._scratch = scratch
        self._reader = reader
        self._keep_going = keep_going
        self._waiting = 0
        self._unsure = False  # a line was skipped that may have been one of any run

    def read(self, file: Path) -> None:
        self._reader.begin()
        for number, line in lines_of(file):
            try:
                route = self._reader.read(line)
                if route is not None:
                    self._add(route, f"{file}:{number}")
            except Malformed as why:
                if not self._keep_going:
                    raise ValueError(
                        f"{file}:{number}: the line cannot be imported: {why}. To skip and count such lines, keep "
                        "going (--keep-going)"
                    ) from None
                self._skip(f"{file}:{number}: {why}", line)
        self._flush()

    def _add(self, route: Route, where: str) -> None:
        spool = self.runs.get(route.run)
        if spool is None:
            directory = self._scratch / str(len(self.runs))
            directory.mkdir()
            spool = self.runs[route.run] = Spool(directory)
            if self._unsure:
                spool.skipped()
        spool.add(self.lines, route)
        self.lines += 1
        self.order.see(route, where)
        self._waiting += 1
        if self._waiting >= LINES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        for spool in self.runs.values():
            spool.flush()
        self._waiting = 0

    def _skip(self, what: str, line: bytes | None) -> None:
        self.skipped += 1
        if len(self.first_skipped) < SKIPPED_SAID:
            self.first_skipped.append(what)
        # What stands before all lines may be a heading.
        if self.lines or line is None or b"topk" in line or b"route" in line:
            self._unsure = True
        for spool in self.runs.values():
            spool.skipped()


def load(
    files: list[Path], trace: Path, *, keep_going: bool, model: str | None, experts: int | None, token_idx: str
) -> Loaded:
    """`exchange.load` of JSONL."""
    if token_idx not in TOKEN_IDX:
        raise ValueError(f"token_idx={token_idx!r} is not known: use {', '.join(TOKEN_IDX)}")
    done = Loaded(trace)
    with new_runs(trace) as runs:
        reader = Reader(experts)
        log = _Log(runs.scratch, reader, keep_going)
        for file in files:
            log.read(file)
        done.lines, done.skipped = log.lines, log.skipped
        if not log.lines:
            skipped = f" ({count(log.skipped, 'malformed line')})" if log.skipped else ""
            raise ValueError(f"there is nothing to import in {', '.join(map(str, files))}: no line is a route{skipped}")
        positions = token_idx == "position" or (token_idx == "auto" and log.order.restart is None)
        done.notes += _notes(log, reader, token_idx, positions)
        for name, spool in log.runs.items():
            _write_run(runs, name, spool, files, log, reader, model, positions, done)
    done.layers = tuple(sorted({layer for spool in log.runs.values() for layer in spool.layers}))
    done.requests = len({name for spool in log.runs.values() for name in spool.requests})
    return done


def _write_run(
    runs: NewRuns,
    name: str | None,
    spool: Spool,
    files: list[Path],
    log: _Log,
    reader: Reader,
    model: str | None,
    positions: bool,
    done: Loaded,
) -> None:
    imported: dict[str, Any] = {"format": "jsonl", "files": list(map(str, files)), "lines": log.lines}
    if name is not None:
        imported["run"] = name
    if log.skipped:
        imported |= {"skipped": log.skipped, "skipped_first": log.first_skipped}
    notes = done.notes + _uneven(spool)
    done.notes = notes
    metadata = _metadata(reader.meta, model) | {
        "fields": ["ids", "weights"] if spool.has_weights else ["ids"],
        "weights_dtype": "float32",
        "layers": [
            {"layer": layer, "name": "", "experts": reader.experts or 0, "top_k": k, "status": "exact",
             "detail": "imported from JSONL", "every_step": False}
            for layer, (k, _) in spool.layers.items()
        ],
        "imported": imported | {"notes": notes},
    }  # fmt: skip
    run = NewRun(runs.add(name), metadata)
    names = spool.requests
    bytes_a_row = sum(6 * k for k, _ in spool.layers.values())
    for records in spool.rows(max(1, BLOCK_BYTES // bytes_a_row), unique=log.order.restart is None):
        first = next(iter(records.values()))
        requests = np.array(first["request"])
        at = np.array(first["at"]) if positions else np.full(len(first), -1)
        at[requests == fmt.NOBODY] = -1  # a position is one in a request
        run.rows(_columns(records, spool.layers), requests, at, names)
        done.rows += len(first)
    problems = []
    if log.skipped:
        some = "" if log.skipped == 1 else " first"
        problems.append(
            f"{count(log.skipped, 'malformed line')} of the imported log {'was' if log.skipped == 1 else 'were'} "
            f"skipped,{some} {log.first_skipped[0]}"
        )
    if spool.apart:
        problems.append(
            f"{count(spool.apart, 'line')} of the imported log are rows of one layer each: they could not be matched "
            "with those of the other layers"
        )
    done.problems += [problem for problem in problems if problem not in done.problems]
    done.runs.append(run.close(problems))


def _columns(
    records: Mapping[int, npt.NDArray[Any]], layers: Mapping[int, tuple[int, int]]
) -> dict[tuple[int, int], npt.NDArray[Any]]:
    columns: dict[tuple[int, int], npt.NDArray[Any]] = {}
    for layer, of in records.items():
        ids = np.array(of["ids"])
        if layers[layer][1] < 255:  # bytes, of which the largest marks what is no expert's
            ids = np.where(ids == INVALID, 255, ids).astype(np.uint8)
        columns[fmt.IDS, layer] = ids
        if of["has"][0] > 1:
            columns[fmt.WEIGHTS, layer] = np.array(of["weights"])
    return columns


def _metadata(meta: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """What the meta line says, in the words of csrc/FORMAT.md, and no more."""
    found: dict[str, Any] = {
        "model": model if model is not None else meta.get("model_id"),
        "device": meta.get("device"),
        "seed": meta.get("seed"),
        "versions": {
            package: meta[key]
            for package, key in (("vllm", "vllm_version"), ("torch", "torch_version"))
            if meta.get(key)
        },
    }
    return {key: value for key, value in found.items() if value not in (None, {})}


def _notes(log: _Log, reader: Reader, token_idx: str, positions: bool) -> list[str]:
    notes = ["the log does not say phases, modalities, times and steps: a step here is a block of rows"]
    restart = log.order.restart
    if restart is not None and not positions:
        notes.append(f"token_idx is no position, because it restarts ({restart}): positions are unknown")
    elif not positions:
        notes.append("token_idx was said to be no position: positions are unknown")
    elif restart is not None:
        notes.append(f"token_idx was said to be a position, and is repeated ({restart}): the last row of each counts")
    if reader.experts is None:
        largest = max(largest for spool in log.runs.values() for _, largest in spool.layers.values())
        notes.append(f"the log does not say how many experts there are; the largest id is {largest}")
    return notes


def _uneven(spool: Spool) -> list[str]:
    """Where the layers have different numbers of lines."""
    lines = spool.lines
    most = max(lines.values())
    short = [layer for layer, n in lines.items() if n < most]
    if not short:
        return []
    fewest = min(lines.values())
    return [f"{these(short)} {'has' if len(short) == 1 else 'have'} fewer lines ({fewest:,}) than others ({most:,})"]
