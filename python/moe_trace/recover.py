"""Folds what dead processes left in their rings into their segments, and closes those."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import Block
from moe_trace.errors import TraceError
from moe_trace.owner import hold
from moe_trace.rank import Rank
from moe_trace.ring_block import RingBlock
from moe_trace.segment import never_begun, segment_paths
from moe_trace.statistics import Sums
from moe_trace.trace import open as open_trace
from moe_trace.writer import SegmentWriter

_BLOCK_BYTES = 4 << 20


@dataclass
class Recovery:
    """What `recover` did.

    Attributes:
        ranks: directories of the dead processes that were recovered.
        steps, rows: folded from their rings into their segments; rows that are only counted are among them.
        problems: what could not be recovered, a sentence each.
    """

    ranks: list[Path] = field(default_factory=list)
    steps: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.ranks and not self.problems:
            return "nothing to recover: no process of this trace died"
        what = [f"{n:,} {noun}{'' if n == 1 else 's'}" for n, noun in ((self.steps, "step"), (self.rows, "row"))]
        whose = "a process" if len(self.ranks) == 1 else f"{len(self.ranks):,} processes"
        text = f"recovered {what[0]} ({what[1]}) of {whose} that died" if self.ranks else "nothing was recovered"
        return "\n".join([text, *self.problems])


def recover(path: str | os.PathLike[str]) -> Recovery:
    """Fold the rings of dead processes into a trace. Ranks of living processes are left alone, and so are those of
    which it cannot be told (a problem then says so); calling it again finds nothing to do.

    Raises:
        TraceError: there is no trace at the path.
    """
    report = Recovery()
    try:
        ranks = open_trace(path).ranks
    except TraceError:
        if Path(path).is_dir() and all(found.is_dir() for found in Path(path).rglob("*")):
            return report  # at most a run that begins
        raise
    for found in ranks:
        if found.state != "crashed" and not found.left_its_ring:
            continue
        try:
            with hold(found.directory) as mine:
                if mine:
                    _recover_held(Rank(found.directory, mine=True), report)  # anew: another may have recovered it
        except (OSError, TraceError) as error:
            report.problems.append(f"{found.directory} could not be recovered: {error}")
    return report


def _recover_held(rank: Rank, report: Recovery) -> None:
    if rank.left_its_ring:
        _finish(rank, rank.file)
    elif rank.state == "crashed":
        _recover_rank(rank, report)


def _recover_rank(rank: Rank, report: Recovery) -> None:
    blocks, taken = rank.tail.blocks, rank.tail.records
    problems = list(dict.fromkeys(rank.problems))
    losses = _table(fmt.LOSSES, [(cause, *totals) for cause, totals in rank.losses.items()])
    content = {**rank.file, "losses": _as_json(losses)} | ({"problems": problems} if problems else {})
    if rank.file:  # first: once a step is in a segment, nothing else says that the process died in it
        _replace(rank.directory / "rank.json", json.dumps(content, indent=1))
    lanes = _table(fmt.LANES, [(lane, first, last) for lane, (first, last) in taken.items()])
    writer = _writer(rank, bool(blocks or len(losses)))
    if writer is not None:
        cut = rank.tail.cut_step
        defined: set[Any] = set()
        rest: list[RingBlock] = list(blocks)
        if cut is not None:
            # Fragments are completed by what the ring has of their step: it may be nothing, or that it was aborted.
            of_ring = rest.pop(0) if rest and rest[0].first_step == cut.first_step else None
            last = None if any(block.complete or block.layers for block in rest) else lanes
            if rank.tail.cut_step_was_aborted or rank.tail.cut_step_was_counted:
                writer.take_back(cut.first_step, cut.fragments, last, losses)
            else:
                whole: Block = of_ring or cut
                columns = {key: whole.column(*key) for key in whole.columns}
                pieces = of_ring.from_ring if of_ring else ()
                notes = _with_requests(whole.notes, whole.runs, rank, defined)
                writer.add(
                    columns, whole.steps, whole.runs, notes=notes, lanes=last, losses=losses,
                    fragments=cut.fragments, rest=pieces,
                )  # fmt: skip
        # Of the step that was cut off there may be no whole layer; then its loss is all there is to say.
        groups = list(_alike([block for block in rest if block.complete or block.layers]))
        for group in groups:
            _write(writer, group, rank, defined, lanes if group is groups[-1] else None, losses)
        if not groups and cut is None and (len(losses) or len(lanes)):
            writer.add({}, _table(fmt.STEPS), _table(fmt.RUNS), lanes=lanes, losses=losses)
        writer.close()
    _finish(rank, {**content, "closed": True})
    report.ranks.append(rank.directory)
    saved = [block for block in blocks if block.layers]
    report.steps += len(saved)
    report.rows += sum(block.executed_rows for block in saved)
    report.problems += problems


def _writer(rank: Rank, needed: bool) -> SegmentWriter | None:
    """A writer that goes on where the dead process stopped; None where there is nothing to close and nothing is
    `needed`.
    """
    for path in segment_paths(rank.directory):
        if path.suffix == ".open" and never_begun(path):
            path.unlink()
    last = rank.segments[-1] if rank.segments else None
    if last is not None and last.path.suffix == ".open":
        return SegmentWriter.resume(last)
    if not needed:
        return None
    paths = segment_paths(rank.directory)
    number = int(paths[-1].name.split(".")[0]) + 1 if paths else 0
    run_id = rank.file.get("run_id")
    return SegmentWriter(
        rank.directory, number, metadata=rank.metadata, ring_id=rank.ring.id if rank.ring else 0,
        run_id=run_id if isinstance(run_id, str) and re.fullmatch("[0-9a-f]{32}", run_id) else "0" * 32,
    )  # fmt: skip


def _alike(blocks: list[RingBlock]) -> Iterator[list[RingBlock]]:
    """Steps that can share a block: those with the same columns, up to some size."""
    group: list[RingBlock] = []
    size = 0
    for block in blocks:
        if group and (size >= _BLOCK_BYTES or block.columns != group[0].columns):
            yield group
            group, size = [], 0
        group.append(block)
        size += sum(block.executed_rows * width * fmt.ITEM_BYTES[dtype] for dtype, width in block.columns.values())
    if group:
        yield group


def _write(
    writer: SegmentWriter, group: list[RingBlock], rank: Rank, defined: set[Any], lanes: Any, losses: npt.NDArray[Any]
) -> None:
    columns = {key: np.concatenate([block.column(*key) for block in group]) for key in group[0].columns}
    steps, runs = (np.concatenate([getattr(block, table) for block in group]) for table in ("steps", "runs"))
    notes = _with_requests([note for block in group for note in block.notes], runs, rank, defined)
    dtypes = {key: dtype for key, (dtype, _) in group[0].columns.items()}
    counted = None
    if any(block.executed_rows > block.rows for block in group):
        counted = Sums(), sum(block.executed_rows for block in group)
        for block in group:
            block.add_to(counted[0])
    writer.add(columns, steps, runs, notes=notes, lanes=lanes, losses=losses, stored_as=dtypes, counted=counted)


def _with_requests(
    notes: list[dict[str, Any]], runs: npt.NDArray[Any], rank: Rank, defined: set[Any]
) -> list[dict[str, Any]]:
    """The notes, and before them the requests of these runs that an earlier segment defined: this one can then be
    read alone.
    """
    defined |= {note.get("index") for note in notes if note.get("type") == "request"}
    again = [i for i in np.unique(runs["request"]).tolist() if i in rank.requests and i not in defined]
    defined |= set(again)
    return [{"type": "request", "index": i, **rank.requests[i].info} for i in again] + notes


def _finish(rank: Rank, content: dict[str, Any]) -> None:
    """Say in rank.json that all is in the segments, then remove the ring. Killed in between, the next recovery does
    the rest.
    """
    if rank.file:
        _replace(rank.directory / "rank.json", json.dumps(content, indent=1))
    if rank.left_its_ring or rank.ring is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(str(rank.ring_path))
    if rank.file:
        _replace(rank.directory / "rank.json", json.dumps({**content, "ring": None}, indent=1))


def _table(field: int, rows: Sequence[tuple[int, ...]] = ()) -> npt.NDArray[Any]:
    return np.array(sorted(rows), fmt.TABLES[field])


def _as_json(losses: npt.NDArray[Any]) -> dict[str, dict[str, int]]:
    return {
        fmt.CAUSES[cause]: {"steps": steps, "layers": layers, "rows": rows}
        for cause, steps, layers, rows in losses.tolist()
        if cause < len(fmt.CAUSES)
    }


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".rank-", suffix=".json", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
