"""A trace: runs of ranks in a directory, or one segment file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_trace import format as fmt
from moe_trace.batch import Filter
from moe_trace.coverage import Layer
from moe_trace.errors import NotATrace, TraceError, TraceNotFound
from moe_trace.joined import absent, groups
from moe_trace.notes import Request
from moe_trace.rank import Rank
from moe_trace.segment import segment_paths
from moe_trace.select import Selection
from moe_trace.units import count

ASK_THE_DOCTOR = ". 'moe-native doctor' says why nothing was recorded"  # who is the doctor leaves it out
PAUSED = "paused"  # a cause, but no loss
_STATUSES = ("missed", "derived", "exact", "skipped")  # where ranks or runs differ, the first of these is what is said


@dataclass(frozen=True)
class Loss:
    """What was lost for one cause: whole steps, layers (of lost steps, or alone), and rows of them."""

    steps: int = 0
    layers: int = 0
    rows: int = 0


class Run:
    """One recording process group: its ranks; with `whole` False, those of them that were asked for."""

    def __init__(self, directory: Path, ranks: list[Rank], *, whole: bool = True) -> None:
        self.directory = directory
        self.whole = whole
        self.name = directory.name
        self.ranks = ranks

    def __repr__(self) -> str:
        return f"<moe_trace run {self.name}: {count(len(self.ranks), 'rank')}>"


class Trace(Selection):
    """Everything that was recorded into a directory. It is a `Selection` of all rows; narrow it with `.layer(…)`,
    `.decode()`, `.request(…)` and so on.

    Attributes:
        path: what was opened.
        runs: its runs, the oldest first.
    """

    def __init__(self, path: Path, runs: list[Run]) -> None:
        self._asked = Filter()
        self.path = path
        self.runs = runs

    @property
    def _trace(self) -> Trace:
        return self  # an attribute would be a cycle, and keep what is mapped until the garbage is collected

    @property
    def ranks(self) -> list[Rank]:
        """The ranks of all runs, in order."""
        return [rank for run in self.runs for rank in run.ranks]

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What ran, of the newest rank: model, versions, device, … (csrc/FORMAT.md, section 6)."""
        return self.ranks[-1].metadata if self.ranks else {}

    @cached_property
    def coverage(self) -> list[Layer]:
        """The coverage ledger, ascending by layer. Where ranks or runs differ, it says the worst: a layer that one of
        them missed is missed, although the others' rows are there.
        """
        found: dict[int, Layer] = {}
        for new in (entry for rank in self.ranks for entry in rank.coverage):
            old = found.get(new.layer)
            if old is None or _rank_of(new.status) <= _rank_of(old.status):
                found[new.layer] = new
        return [found[layer] for layer in sorted(found)]

    @cached_property
    def experts(self) -> Mapping[int, int]:
        """Number of experts of each layer, where it is known."""
        return {entry.layer: entry.experts for rank in self.ranks for entry in rank.ledger if entry.experts}

    @cached_property
    def requests(self) -> Mapping[str, Request]:
        """The requests by the names that their users know, in the order of their appearance. A name that several runs
        have stands for all of their requests: `Request.runs` says so, and `.run(…)` tells them apart.
        """
        found: dict[str, Request] = {}
        for request in (request for rank in self.ranks for request in rank.requests.values()):
            runs = found[request.id].runs if request.id in found else ()
            found[request.id] = replace(request, runs=tuple(dict.fromkeys(runs + request.runs)))
        return found

    @cached_property
    def losses(self) -> Mapping[str, Loss]:
        """What was lost, by cause (csrc/FORMAT.md, table *losses*); empty when nothing was. What was not recorded
        because recording was paused is no loss, but `paused`.
        """
        totals: dict[str, Loss] = {}
        for rank in self.ranks:
            for cause, (steps, layers, rows) in rank.losses.items():
                name = fmt.CAUSES[cause] if cause < len(fmt.CAUSES) else f"cause {cause}"
                if name == PAUSED:
                    continue
                old = totals.get(name, Loss())
                totals[name] = Loss(old.steps + steps, old.layers + layers, old.rows + rows)
        return totals

    @cached_property
    def paused(self) -> Loss:
        """What was executed while recording was paused, and so is not in the trace: steps, and rows of them."""
        found = [rank.losses.get(fmt.CAUSES.index(PAUSED), (0, 0, 0)) for rank in self.ranks]
        return Loss(sum(steps for steps, _, _ in found), 0, sum(rows for _, _, rows in found))

    @cached_property
    def executed_rows(self) -> int:
        """Number of tokens that `counts()` counts: those of `rows`, and those of which no row is stored (`sample` below
        1, or `fields="counts"`)."""
        return self._row_totals(1)

    @cached_property
    def stored_rows(self) -> int:
        """Number of tokens that are stored, as the headers of the blocks say: `rows`, without reading the blocks."""
        return self._row_totals(0)

    def _row_totals(self, which: int) -> int:
        """Stages of a pipeline record the same tokens: the most of them counts."""
        shards = [shard for group in groups(self.ranks) for shard in group]
        return sum(max(rank.row_totals[which] for rank in shard) for shard in shards)

    @cached_property
    def rows_by_class(self) -> Mapping[int, int]:
        """Number of executed tokens by class (csrc/FORMAT.md, section 5: phase, modality, whether they were executed
        before, drafts), from block statistics. A segment in which layers were left out part of the time counts by the
        layer that has the most."""
        found: dict[int, int] = {}
        for shard in (shard for group in groups(self.ranks) for shard in group):
            stages = [rank.rows_by_class for rank in shard]
            for cls in {cls for stage in stages for cls in stage}:
                found[cls] = found.get(cls, 0) + max(stage.get(cls, 0) for stage in stages)
        return dict(sorted(found.items()))

    @property
    def left_out(self) -> list[str]:
        """What routed and was not to be recorded, a sentence each: such as the layers of a draft model."""
        said = (rank.metadata.get("left_out") for rank in self.ranks)
        return list(dict.fromkeys(str(text) for texts in said if isinstance(texts, list) for text in texts))

    @property
    def problems(self) -> list[str]:
        """What is wrong with the trace: damage, what a crash left unfinished, files that cannot be read. A sentence
        each.

        Opening does not read everything: damage inside a closed segment is found, and said here, when it is read.
        """
        found = [problem for rank in self.ranks for problem in rank.problems]
        found += [sentence for run in self.runs if run.whole for sentence in absent(run.ranks)]
        return list(dict.fromkeys(found))

    @property
    def state(self) -> str:
        """`live` (a process is recording into it), `crashed` (one died, and its ring was not folded in yet) or
        `closed`.
        """
        states = {rank.state for rank in self.ranks}
        return next((state for state in ("live", "crashed") if state in states), "closed")

    @property
    def deleted_segments(self) -> int:
        """How many of the oldest segments were deleted to keep the trace within max_bytes: asked for, so no loss."""
        return sum(rank.deleted_segments for rank in self.ranks)

    @property
    def whole_since(self) -> datetime | None:
        """Since when it has all steps, UTC, where the oldest segments were deleted; else None."""
        spans = [times for rank in self.ranks if rank.deleted_segments and len(times := rank.times())]
        return _datetime(max(int(t[0]) for t in spans)) if spans else None

    @property
    def complete(self) -> bool:
        """Whether it has everything that was to be kept: no loss, no problem, no layer missed."""
        return not self.losses and not self.problems and all(entry.status != "missed" for entry in self.coverage)

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
        whole += " but for deleted segments" if self.deleted_segments else ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows that not all stages have
            rows = count(self.rows, "row")
        if self.executed_rows > self.stored_rows:
            rows = f"{count(self.executed_rows, 'row')} executed, {self.stored_rows:,} stored"
        if self.paused.steps:
            whole += f", paused for {count(self.paused.steps, 'step')}"
        size = f"{rows} x {count(len(self.layers), 'layer')}, {count(len(self.runs), 'run')}"
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
    here = path.absolute()  # its runs need their names, even in "."
    if not path.exists():
        raise TraceNotFound(
            f"there is no trace {path}. Give the directory that MOE_NATIVE_TRACE named, or a .moe file in it"
        )
    if not path.is_dir() and not path.is_file():
        raise NotATrace(f"{path} is no trace: it is neither a directory nor a plain file")
    try:
        if path.is_file():
            return _readable(Trace(path, [Run(here.parent.parent, [Rank(path.parent, path)], whole=False)]))
        for runs in (_runs_of(path), [Run(here, _ranks_of(path))], [Run(here.parent, _rank_at(path), whole=False)]):
            if any(run.ranks for run in runs):
                return _readable(Trace(path, [run for run in runs if run.ranks]))
    except PermissionError as error:
        raise TraceNotFound(
            f"{error.filename or path} cannot be read: its files are private to the user who recorded them"
        ) from None
    raise NotATrace(f"there is no trace in {path}: no directory run-*/rank-* with segments" + ASK_THE_DOCTOR)


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


def _rank_of(status: str) -> int:
    return _STATUSES.index(status) if status in _STATUSES else len(_STATUSES)


def _datetime(ns: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ns // 1000)
