"""A run that is not recorded but made: written beside the trace, and moved into it once all of it is there."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.errors import TraceError
from moe_trace.exchange.made import beside
from moe_trace.statistics import Sums
from moe_trace.trace import open as open_trace
from moe_trace.writer import Columns, SegmentWriter

_ATTRIBUTED = 1 << 6  # bit of a class
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class NewRuns:
    """The runs that are being made.

    Attributes:
        scratch: a directory for what is needed meanwhile.
    """

    def __init__(self, trace: Path, here: Path) -> None:
        self._trace = trace
        self.made = here / "trace"
        self.scratch = here / "scratch"
        for directory in (self.made, self.scratch):
            directory.mkdir(mode=0o700)

    def add(self, name: str | None = None) -> Path:
        """The directory of a new run. It is called `name` if that can be a directory's name and is not taken."""
        stem = name if name is not None and _SAFE_NAME.fullmatch(name) else None
        stem = stem or f"run-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}"
        free, number = stem, 1
        while (self.made / free).exists() or (self._trace / free).exists():
            number += 1
            free = f"{stem}-{number}"
        (self.made / free).mkdir(mode=0o700)
        return self.made / free


@contextmanager
def new_runs(trace: Path) -> Iterator[NewRuns]:
    """Runs that become the trace, or part of it, when the block ends; not where it raises.

    Raises:
        TraceError: something that is no trace is at the path.
        FileNotFoundError: there is no directory for it.
    """
    if not trace.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {trace}: there is no directory {trace.parent}")
    there = trace.exists() and not (trace.is_dir() and not any(trace.iterdir()))
    if there:
        _check_trace(trace)
    with beside(trace) as here:
        runs = NewRuns(trace, here)
        yield runs
        if there:
            for run in sorted(runs.made.iterdir()):
                os.rename(run, trace / run.name)
        else:
            os.rename(runs.made, trace)


def _check_trace(path: Path) -> None:
    refusal = f"{path} is there already and is no trace: name a new directory, or a trace to add a run to"
    try:
        runs = open_trace(path).runs
    except TraceError:
        raise TraceError(refusal) from None
    if any(run.directory.absolute().parent != path.absolute() for run in runs) or not path.is_dir():
        raise TraceError(refusal.replace("no trace:", "only a part of a trace:"))


class NewRun:
    """Writes one run of one rank and one segment: `rows` or `counts`, then `close`. What a step was is not known, and
    neither are times: each block is a step, at time 0.
    """

    def __init__(self, directory: Path, metadata: Mapping[str, Any]) -> None:
        self._rank = directory / "rank-0"
        self._rank.mkdir(mode=0o700)
        self._metadata = dict(metadata)
        self._run_id = secrets.token_hex(16)
        self._segment = SegmentWriter(self._rank, metadata=self._metadata, run_id=self._run_id)
        self._blocks = 0
        self._named = np.zeros(0, bool)  # which requests have a note

    def rows(
        self,
        columns: Columns,
        requests: npt.NDArray[np.uint32],
        positions: npt.NDArray[np.int64],
        names: Sequence[str],
    ) -> None:
        """Append a block.

        Args:
            columns: by (field, layer), `[rows, width]`.
            requests: `[rows]` indices into `names`, 4294967295 for nobody.
            positions: `[rows]`, -1 where unknown.
        """
        known = positions >= 0
        follows = np.where(known[1:], positions[1:] == positions[:-1] + 1, True) & (known[1:] == known[:-1])
        first = np.flatnonzero(np.append(True, ~(follows & (requests[1:] == requests[:-1]))))
        runs = np.zeros(len(first), fmt.TABLES[fmt.RUNS])
        runs["request"] = requests[first]
        runs["position"] = np.where(known[first], positions[first], fmt.NOBODY)
        runs["count"] = np.diff(np.append(first, len(requests)))
        runs["cls"] = np.where(requests[first] == fmt.NOBODY, 0, _ATTRIBUTED)
        self._segment.add(columns, self._step(len(requests), len(runs)), runs, notes=self._notes(requests, names))
        self._blocks += 1

    def _notes(self, requests: npt.NDArray[np.uint32], names: Sequence[str]) -> list[dict[str, Any]]:
        self._named = np.append(self._named, np.zeros(len(names) - len(self._named), bool))
        here = np.unique(requests[requests != fmt.NOBODY])
        new = here[~self._named[here]]
        self._named[new] = True
        return [{"type": "request", "index": index, "id": names[index]} for index in new.tolist()]

    def counts(self, sums: Sums, executed: int) -> None:
        """Append a block without rows: the statistics of `executed` tokens."""
        no_runs = np.zeros(0, fmt.TABLES[fmt.RUNS])
        self._segment.add({}, self._step(0, 0), no_runs, counted=(sums, executed))
        self._blocks += 1

    def _step(self, rows: int, runs: int) -> npt.NDArray[Any]:
        return np.array([(self._blocks, 0, rows, runs, 0)], fmt.TABLES[fmt.STEPS])

    def close(self, problems: Sequence[str]) -> str:
        """Finish; returns the run's name. Readers repeat the problems."""
        self._segment.close()
        content = {
            "format": "moe-native rank",
            "version": 1,
            "run_id": self._run_id,
            "rank": self._rank.name,
            "owner": {},
            "ring": None,
            "closed": True,
            "metadata": self._metadata,
            **({"problems": list(problems)} if problems else {}),
        }
        handle = os.open(self._rank / "rank.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        return self._rank.parent.name
