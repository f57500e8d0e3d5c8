"""Folds what dead processes left in their rings into their segments, and closes those."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_trace import format as fmt
from moe_trace.errors import TraceError
from moe_trace.rank import Rank, segment_paths
from moe_trace.ring import RingBlock
from moe_trace.trace import open as open_trace
from moe_trace.writer import SegmentWriter


@dataclass
class Recovery:
    """What `recover` did.

    Attributes:
        ranks: directories of the dead processes that were recovered.
        steps, rows: folded from their rings into their segments.
        problems: what could not be recovered, a sentence each.
    """

    ranks: list[Path] = field(default_factory=list)
    steps: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.ranks and not self.problems:
            return "nothing to recover: no process of this trace died"
        text = f"recovered {self.steps:,} steps ({self.rows:,} rows) of {len(self.ranks)} processes that died"
        return "\n".join([text, *self.problems])


def recover(path: str | os.PathLike[str]) -> Recovery:
    """Fold the rings of dead processes into a trace. Rings of living processes are left alone; calling it again finds nothing to do.

    Raises:
        TraceError: there is no trace at the path.
    """
    report = Recovery()
    try:
        ranks = open_trace(path).ranks
    except TraceError:
        if Path(path).is_dir() and not any(Path(path).iterdir()):
            return report
        raise
    for found in ranks:
        if found.state != "crashed":
            continue
        with _locked(found.directory) as mine:
            rank = Rank(found.directory)  # anew: another process may have recovered it while we waited
            if not mine or rank.state != "crashed":
                continue
            try:
                _recover_rank(rank, report)
            except (OSError, TraceError) as error:
                report.problems.append(f"{rank.directory} could not be recovered: {error}")
    return report


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold the rank's directory against other recoverers. False where its file system has no locks or it cannot be written."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def _recover_rank(rank: Rank, report: Recovery) -> None:
    blocks, taken = rank.read_ring()
    problems = rank.problems
    open_segments = [segment for segment in rank.segments if segment.path.suffix == ".open"]
    losses = np.array([(cause, *numbers) for cause, numbers in sorted(rank.losses.items())], fmt.TABLES[fmt.LOSSES])
    lanes = np.array([(lane, first, last) for lane, (first, last) in sorted(taken.items())], fmt.TABLES[fmt.LANES])
    ring = rank.ring
    if open_segments or blocks or len(losses):
        if open_segments:
            writer = SegmentWriter.resume(open_segments[-1], rank.cut_step_is_in_ring)
        else:
            paths = segment_paths(rank.directory)
            number = int(paths[-1].name.split(".")[0]) + 1 if paths else 0
            run_id = rank.file.get("run_id")
            writer = SegmentWriter(
                rank.directory, number, metadata=rank.metadata, ring_id=ring.id if ring else 0,
                run_id=run_id if isinstance(run_id, str) and len(run_id) == 32 else "0" * 32,
            )  # fmt: skip
        # Requests that were defined in earlier segments are defined again, so that this one can be read alone.
        for i, block in enumerate(blocks):
            last = i == len(blocks) - 1
            defined = {note.get("index") for b in blocks[: i + 1] for note in b.notes if note.get("type") == "request"}
            wanted = set(np.unique(block.runs["request"]).tolist()) - defined
            again = [
                {"type": "request", "index": index, **rank.requests[index].info}
                for index in sorted(wanted)
                if index in rank.requests
            ]
            columns = {key: block.column(*key) for key in block.columns}
            writer.add(
                columns, block.steps, block.runs, notes=again + block.notes,
                lanes=lanes if last else None, losses=losses,
            )  # fmt: skip
        if not blocks and (len(losses) or len(lanes)):
            nothing = (np.zeros(0, fmt.TABLES[fmt.STEPS]), np.zeros(0, fmt.TABLES[fmt.RUNS]))
            writer.add({}, *nothing, lanes=lanes, losses=losses)
        writer.close()
    content = {**rank.file, "ring": None, "closed": True}
    if problems:
        content["problems"] = problems
    _replace(rank.directory / "rank.json", json.dumps(content, indent=1))
    if ring is not None:
        ring.path.unlink(missing_ok=True)
    report.ranks.append(rank.directory)
    report.steps += len(blocks)
    report.rows += sum(block.rows for block in blocks)
    report.problems += problems


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".rank-", suffix=".json", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


__all__ = ["Recovery", "RingBlock", "recover"]
