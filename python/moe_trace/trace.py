"""A trace: runs of ranks in a directory, or one segment file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_trace import format as fmt
from moe_trace.batch import Filter
from moe_trace.errors import NotATrace, TraceError, TraceNotFound
from moe_trace.rank import Rank, Request, segment_paths
from moe_trace.select import Selection

_STATUSES = ("missed", "derived", "exact", "skipped")  # where ranks or runs differ, the first of these is what is said


@dataclass(frozen=True)
class Layer:
    """What the trace says of one MoE layer: the coverage ledger.

    Attributes:
        layer: the model's own index.
        name: of the module.
        experts, top_k: as the recorder was told; 0 where it could not be.
        status: `exact`; `derived` (ids computed from logits); `missed` (not recorded, `detail` says why); `skipped`
            (not asked for).
        detail: a remark.
    """

    layer: int
    name: str
    experts: int
    top_k: int
    status: str
    detail: str


@dataclass(frozen=True)
class Loss:
    """What was lost for one cause: whole steps, layers (of lost steps, or alone), and rows of them."""

    steps: int = 0
    layers: int = 0
    rows: int = 0


class Run:
    """One recording process group: its ranks."""

    def __init__(self, directory: Path, ranks: list[Rank]) -> None:
        self.directory = directory
        self.name = directory.name
        self.ranks = ranks

    def __repr__(self) -> str:
        return f"<moe_trace run {self.name}: {len(self.ranks)} ranks>"


class Trace(Selection):
    """Everything that was recorded into a directory. It is a `Selection` of all rows; narrow it with `.layer(…)`,
    `.decode()`, `.request(…)` and so on.

    Attributes:
        path: what was opened.
        runs: its runs, the oldest first.
    """

    def __init__(self, path: Path, runs: list[Run]) -> None:
        super().__init__(self, Filter())
        self.path = path
        self.runs = runs

    @property
    def ranks(self) -> list[Rank]:
        """The ranks of all runs, in order."""
        return [rank for run in self.runs for rank in run.ranks]

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What ran, of the newest rank: model, versions, device, … (csrc/FORMAT.md, section 6)."""
        return self.ranks[-1].metadata if self.ranks else {}

    @cached_property
    def layers(self) -> list[Layer]:
        """The coverage ledger, ascending by layer."""
        found: dict[int, Layer] = {}
        for rank in self.ranks:
            entries = rank.metadata.get("layers")
            for entry in entries if isinstance(entries, list) else ():
                if not isinstance(entry, dict) or not _small(entry.get("layer")):
                    continue
                experts, top_k = (entry[key] if _small(entry.get(key)) else 0 for key in ("experts", "top_k"))
                name, status, detail = (str(entry.get(key, "")) for key in ("name", "status", "detail"))
                new = Layer(entry["layer"], name, experts, top_k, status, detail)
                old = found.get(new.layer)
                if old is None or _rank_of(new.status) <= _rank_of(old.status):
                    found[new.layer] = new
        return [found[layer] for layer in sorted(found)]

    @cached_property
    def recorded_layers(self) -> tuple[int, ...]:
        """The layers that have rows, or would have: in the ledger as recorded, or in a block."""
        ledger = {entry.layer for entry in self.layers if entry.status in ("exact", "derived")}
        if ledger:
            return tuple(sorted(ledger))
        return tuple(sorted({layer for rank in self.ranks for layer in rank.layers}))

    @cached_property
    def experts(self) -> Mapping[int, int]:
        """Number of experts of each layer, where it is known."""
        return {entry.layer: entry.experts for entry in self.layers if entry.experts}

    @cached_property
    def requests(self) -> Mapping[str, Request]:
        """The requests by the names that their users know, in the order of their appearance."""
        found: dict[str, Request] = {}
        for rank in self.ranks:
            for request in rank.requests.values():
                found[request.id] = request
        return found

    @cached_property
    def losses(self) -> Mapping[str, Loss]:
        """What was lost, by cause (csrc/FORMAT.md, table *losses*); empty when nothing was."""
        totals: dict[str, Loss] = {}
        for rank in self.ranks:
            for cause, (steps, layers, rows) in rank.losses.items():
                name = fmt.CAUSES[cause] if cause < len(fmt.CAUSES) else f"cause {cause}"
                old = totals.get(name, Loss())
                totals[name] = Loss(old.steps + steps, old.layers + layers, old.rows + rows)
        return totals

    @property
    def problems(self) -> list[str]:
        """What is wrong with the trace: damage, what a crash left unfinished, files that cannot be read. A sentence
        each.

        Opening does not read everything: damage inside a closed segment is found, and said here, when it is read.
        """
        return list(dict.fromkeys(problem for rank in self.ranks for problem in rank.problems))

    @property
    def state(self) -> str:
        """`live` (a process is recording into it), `crashed` (one died, and its ring was not folded in yet) or
        `closed`.
        """
        states = {rank.state for rank in self.ranks}
        return next((state for state in ("live", "crashed") if state in states), "closed")

    @property
    def complete(self) -> bool:
        """Whether it has everything: no loss, no problem, no layer missed."""
        return not self.losses and not self.problems and all(entry.status != "missed" for entry in self.layers)

    @cached_property
    def _times(self) -> tuple[int, int] | None:
        spans = [times for rank in self.ranks if len(times := rank.times())]
        return (min(int(t[0]) for t in spans), max(int(t[1]) for t in spans)) if spans else None

    @property
    def first_time(self) -> datetime | None:
        """Start of the first step, UTC; None without steps."""
        return None if self._times is None else _datetime(self._times[0])

    @property
    def last_time(self) -> datetime | None:
        """Start of the last step, UTC; None without steps."""
        return None if self._times is None else _datetime(self._times[1])

    def __repr__(self) -> str:
        model = self.metadata.get("model") or "unknown model"
        whole = "complete" if self.complete else "INCOMPLETE"
        layers = len(self.recorded_layers)
        size = f"{self.rows:,} rows x {layers} layers, {len(self.runs)} runs"
        return f"<moe_trace.Trace {self.path}: {model}, {size}, {self.state}, {whole}>"


def open(path: str | os.PathLike[str]) -> Trace:
    """Open a trace for reading: its directory, a run's or a rank's directory in it, or one segment file; also while
    it is being written.

    What a killed process left in its ring is read as well. Nothing is written.

    Raises:
        TraceNotFound: there is nothing at the path, or it cannot be read.
        NotATrace: it is no trace.
        UnsupportedVersion: a newer moe_native wrote it.
        DamagedTrace: nothing in it can be read.

    Where only some segments of a directory cannot be read, the others are, and `problems` says which.
    """
    path = Path(path)
    if not path.exists():
        raise TraceNotFound(f"there is no {path}. Give the directory that MOE_NATIVE_TRACE named, or a .moe file in it")
    try:
        if path.is_file():
            return _readable(Trace(path, [Run(path.parent.parent, [Rank(path.parent, path)])]))
        for runs in (_runs_of(path), [Run(path, _ranks_of(path))], [Run(path.parent, _rank_at(path))]):
            if any(run.ranks for run in runs):
                return _readable(Trace(path, [run for run in runs if run.ranks]))
    except PermissionError as error:
        raise TraceNotFound(
            f"{error.filename or path} cannot be read: its files are private to the user who recorded them"
        ) from None
    raise NotATrace(
        f"there is no trace in {path}: no directory run-*/rank-* with segments. "
        "'moe-native doctor' says why nothing was recorded"
    )


def _readable(trace: Trace) -> Trace:
    """The trace, unless none of its segments can be read: then it raises why."""
    errors: list[TraceError] = []
    for rank in reversed(trace.ranks):
        if rank.segments or not rank.errors:
            return trace
        errors += rank.errors
    raise errors[0]


def _runs_of(trace: Path) -> list[Run]:
    return [Run(run, _ranks_of(run)) for run in sorted(trace.iterdir()) if run.is_dir()]


def _ranks_of(run: Path) -> list[Rank]:
    return [rank for directory in sorted(run.iterdir()) if directory.is_dir() for rank in _rank_at(directory)]


def _rank_at(directory: Path) -> list[Rank]:
    if (directory / "rank.json").exists() or segment_paths(directory):
        return [Rank(directory)]
    return []


def _small(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= fmt.NO_LAYER


def _rank_of(status: str) -> int:
    return _STATUSES.index(status) if status in _STATUSES else len(_STATUSES)


def _datetime(ns: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ns // 1000)
