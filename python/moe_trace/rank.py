"""What one recording process wrote: its segments, its ring if it died, and who it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import Block
from moe_trace.coverage import Layer, read_ledger, without_rows_missed
from moe_trace.errors import TraceError, TraceNotFound
from moe_trace.files import read_plain
from moe_trace.notes import Amendment, Notes, Repeats, Request, read_notes
from moe_trace.owner import held, process_lives
from moe_trace.ring import Ring
from moe_trace.ring_block import RingBlock
from moe_trace.segment import Segment, never_begun, segment_paths
from moe_trace.statistics import LayerStats
from moe_trace.tail import Tail
from moe_trace.units import count

_INCOMPLETE = fmt.CAUSES.index("incomplete")


class Rank:
    """One recording process.

    Args:
        directory: of the rank.
        only: the one segment to look at, when a single file was asked for.
        mine: whether this process holds the directory (`owner.hold`), which is then no sign that its owner lives.
    """

    def __init__(self, directory: Path, only: Path | None = None, *, mine: bool = False) -> None:
        self.directory = directory
        self.name, self.run = directory.absolute().name, directory.absolute().parent.name
        self._only = only
        self._mine = mine
        self.errors: list[TraceError] = []  #: why segments could not be opened, once `segments` was asked for
        self._look()

    def _look(self) -> None:
        """Read rank.json, and see whether its owner lives."""
        self._problems: list[str] = []
        self.file = self._read_rank_file()
        # What a recovery could not save stays said.
        said = self.file.get("problems")
        self._problems += [text for text in said if isinstance(text, str)] if isinstance(said, list) else []
        owner = self.file.get("owner")
        self.owner: dict[str, Any] = owner if isinstance(owner, dict) else {}
        self.closed = bool(self.file.get("closed"))
        self.live = not self.closed and self._owner_lives()

    def _read_rank_file(self) -> dict[str, Any]:
        try:
            content = fmt.parse_json(read_plain(self.directory / "rank.json", fmt.MOST_METADATA_BYTES))
            if not isinstance(content, dict) or content.get("format") != "moe-native rank":
                raise ValueError("it is not what a recorder writes")
            return content
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._problems.append(f"{self.directory / 'rank.json'} cannot be read: {error}")
            return {}

    def _owner_lives(self) -> bool:
        """Any sign of life will do: in another container the process id means nothing, and the ring is not seen."""
        pid, ticks, boot = (self.owner.get(key) for key in ("pid", "start_ticks", "boot_id"))
        known = isinstance(pid, int) and isinstance(ticks, int) and isinstance(boot, str)
        if known and process_lives(pid, ticks, boot):  # type: ignore[arg-type]
            return True
        if not self._mine and held(self.directory):
            return True
        path = self.ring_path
        try:
            return path is not None and Ring(path).owned  # not opened by its owner, who would lose its lock by that
        except (OSError, TraceError):
            return False

    @property
    def ring_path(self) -> Path | None:
        """Where its ring lies, if it still has one."""
        ring = self.file.get("ring")
        path = ring.get("path") if isinstance(ring, dict) else None
        return Path(path) if isinstance(path, str) else None

    @cached_property
    def segments(self) -> list[Segment]:
        """Its segments, in order; those that retention deleted meanwhile are left out."""
        _ = self.ring  # first: whatever a recovery moves from it into the segments meanwhile is then seen once
        paths = [self._only] if self._only else segment_paths(self.directory)
        return [segment for path in paths if (segment := self._open(path)) is not None]

    def _open(self, path: Path) -> Segment | None:
        """A segment, or None where it is gone (retention) or unreadable, which is then a problem."""
        # A name that ends in .open may have lost that ending since the directory was listed.
        for name in (path, path.with_suffix("")) if path.suffix == ".open" else (path,):
            try:
                return Segment(name, self.live)
            except TraceNotFound:
                continue
            except TraceError as error:
                if not (path.suffix == ".open" and never_begun(path)):
                    self.errors.append(error)
                return None
        return None

    @cached_property
    def deleted_segments(self) -> int:
        """How many of its oldest segments retention deleted (max_bytes): a recorder numbers them from 0."""
        paths = [] if self._only else segment_paths(self.directory)  # with those that cannot be read
        return int(paths[0].name.split(".")[0]) if paths else 0

    @property
    def state(self) -> str:
        """`closed`, `live` or `crashed`."""
        if self.live:
            return "live"
        return "closed" if self.closed or (not self.file and all(s.closed for s in self.segments)) else "crashed"

    @cached_property
    def ring(self) -> Ring | None:
        """The ring of a process that died, if it can be read."""
        path = self.ring_path
        if self.closed or self.live or self._only is not None or path is None:
            return None
        try:
            ring = Ring(path)
        except FileNotFoundError:
            self._look()
            if self.closed:  # recovered since rank.json was read
                return None
            self._problems.append(
                f"the process that wrote {self.directory} died and its ring {path} is gone (was the machine or the "
                "container restarted?): what it had not yet written is lost"
            )
            return None
        except (OSError, TraceError) as error:
            self._problems.append(f"the ring of {self.directory} cannot be read: {error}")
            return None
        if self.file["ring"].get("id") != f"{ring.id:016x}" or ring.owned:
            self._problems.append(
                f"{path} is not the ring of {self.directory}, but another's; what was in its own is lost"
            )
            return None
        return ring

    @cached_property
    def tail(self) -> Tail:
        """What stands behind its last whole block."""
        return Tail(self.segments, self.ring, self.metadata.get("weights_dtype") == "exact", self._problems)

    @property
    def left_its_ring(self) -> bool:
        """Whether a recovery closed it and was killed before it removed the ring, which has nothing more to say."""
        path = self.ring_path
        if not self.closed or path is None:
            return False
        try:
            ring = Ring(path)
        except FileNotFoundError:
            return True
        except (OSError, TraceError):
            return False
        return not ring.owned and self.file["ring"].get("id") == f"{ring.id:016x}"

    def blocks(self, newest_first: bool = False) -> Iterator[Block]:
        """All blocks, in the order of their steps. Each is made anew, so that what was read of it is freed with it."""
        tail = self.tail
        if newest_first:
            yield from reversed(tail.blocks)
        for segment in reversed(self.segments) if newest_first else self.segments:
            for block in segment.blocks(newest_first):
                if not (segment is self.segments[-1] and tail.replaces(block)):
                    yield block
        if not newest_first:
            yield from tail.blocks

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What ran: of rank.json, or of the newest segment where that is missing."""
        metadata = self.file.get("metadata")
        if isinstance(metadata, dict) and metadata:
            return metadata
        return self.segments[-1].metadata if self.segments else {}

    @cached_property
    def losses(self) -> dict[int, tuple[int, int, int]]:
        """Totals since the start of the run by cause: steps, layers, rows."""
        tables = (
            (self.ring.losses,) if self.ring is not None else (segment.losses for segment in reversed(self.segments))
        )
        table = next((table for table in tables if table is not None), ())  # the newest has the totals
        found = {int(loss["cause"]): (int(loss["steps"]), int(loss["layers"]), int(loss["rows"])) for loss in table}
        for steps, layers, rows in self.tail.incomplete:
            old = found.get(_INCOMPLETE, (0, 0, 0))
            found[_INCOMPLETE] = (old[0] + steps, old[1] + layers, old[2] + rows)
        for cause, said in self._losses_said().items():
            found[cause] = tuple(map(max, said, found.get(cause, (0, 0, 0))))  # type: ignore[assignment]
        return found

    def _losses_said(self) -> dict[int, tuple[int, int, int]]:
        """Of rank.json: what no segment says where the disk took none any more, or a recovery was killed."""
        said = self.file.get("losses")
        found: dict[int, tuple[int, int, int]] = {}
        for cause, totals in said.items() if isinstance(said, dict) and self._only is None else ():
            numbers = [totals.get(key) for key in ("steps", "layers", "rows")] if isinstance(totals, dict) else []
            known = [number for number in numbers if isinstance(number, int) and 0 <= number < 1 << 63]
            if cause in fmt.CAUSES and len(known) == 3:
                found[fmt.CAUSES.index(cause)] = (known[0], known[1], known[2])
        return found

    @cached_property
    def ledger(self) -> list[Layer]:
        """The coverage ledger as the recorder wrote it."""
        return read_ledger(self.metadata)

    @cached_property
    def coverage(self) -> list[Layer]:
        """The ledger, where a layer that has no row in all of the steps is missed, whatever the recorder expected."""
        there = self._layers_with_rows
        steps = sum(_steps_with_rows(segment) for segment in self.segments)
        steps += sum(block.complete and block.executed_rows > 0 for block in self.tail.blocks)
        if not steps or any(segment.problems for segment in self.segments):  # it may be what is damaged that has them
            return self.ledger
        return without_rows_missed(self.ledger, there, steps, f"{self.run}/{self.name}")

    @cached_property
    def _layers_with_rows(self) -> frozenset[int]:
        found = {layer for segment in self.segments for layer in segment.layers}
        return frozenset(found.union(*(block.layers for block in self.tail.blocks if block.executed_rows)))

    @cached_property
    def layers(self) -> frozenset[int]:
        """The layers that have rows or, where there is no step yet, shall have."""
        return self._layers_with_rows.union(entry.layer for entry in self.coverage if entry.recorded)

    @cached_property
    def _notes(self) -> Notes:
        return read_notes(self.blocks(), self.run, self._problems)

    @property
    def requests(self) -> dict[int, Request]:
        """The requests by their index in *runs*."""
        return self._notes.requests

    @property
    def amendments(self) -> dict[int, list[Amendment]]:
        """Late facts by step."""
        return self._notes.amendments

    @cached_property
    def repeats(self) -> Repeats:
        """Which positions were executed more than once."""
        return Repeats(self.blocks())

    @property
    def problems(self) -> list[str]:
        """What is wrong with what this process wrote, as far as it was looked at: of closed segments, their ends and
        what was read.
        """
        segments, ring = self.segments, self.ring
        problems = [*self._problems, *map(str, self.errors)]
        for segment in segments:
            # A torn block's records are still in the ring.
            if ring is None and not self.live and segment.path.suffix == ".open":
                problems.append(self._why_open(segment))
            if self.file.get("run_id") not in (None, segment.run_id):
                problems.append(f"{segment.path} is of another recording than {self.directory}")
            problems += segment.problems
        numbers = [segment.number for segment in segments]
        if self._only is None and any(b - a != 1 for a, b in pairwise(numbers)):
            problems.append(f"{self.directory} lacks a segment between others: rows are missing")
        problems += self.tail.problems(self.directory)
        return problems + self._failures

    @property
    def _failures(self) -> list[str]:
        """What the recording side could not do."""
        said = self.metadata.get("errors")
        failures = said.items() if isinstance(said, dict) else ()
        return [f"{what} failed in {self.directory} ({count(n, 'time')})" for what, n in failures if isinstance(n, int)]

    def _why_open(self, segment: Segment) -> str:
        torn = segment.torn_bytes
        end = f", and its last {torn:,} bytes are torn" if torn else ""
        if self.closed or segment is not self.segments[-1]:
            return f"{segment.path} was not closed: its process gave it up after an error in writing to it" + end
        return f"{segment.path} was not closed: its process died" + (end or "; what it had not yet written is lost")

    def add_statistics(self, into: dict[int, LayerStats], wanted: Callable[[int, int], bool]) -> None:
        """Add the totals of everything this process wrote."""
        if not self.tail.empty:
            for block in self.blocks():
                block.add_statistics(into, wanted)
            return
        for segment in self.segments:
            segment.add_statistics(into, wanted)

    @cached_property
    def row_totals(self) -> tuple[int, int]:
        """Tokens that are stored, and tokens that the statistics count."""
        parts: list[Segment | RingBlock] = [*self.segments, *self.tail.blocks]
        return sum(part.stored_rows for part in parts), sum(part.executed_rows for part in parts)

    @cached_property
    def rows_by_class(self) -> dict[int, int]:
        """Executed tokens by class: of each segment, those of the layer that has the most of them."""
        found: dict[int, int] = {}
        for part in self.segments if self.tail.empty else self.blocks():
            classes: set[int] = set()
            part.add_statistics({}, lambda _, cls, into=classes: into.add(cls))  # type: ignore[misc]
            for cls in classes:
                into: dict[int, LayerStats] = {}
                part.add_statistics(into, lambda _, of, cls=cls: of == cls)  # type: ignore[misc]
                found[cls] = found.get(cls, 0) + max((stats.rows for stats in into.values()), default=0)
        return found

    def times(self) -> npt.NDArray[np.int64]:
        """First and last start of a step, Unix nanoseconds; empty without steps. Of an import they are not known."""
        indices = (index[(index["steps"] > 0) & (index["last_time_ns"] != 0)] for index in self._indices())
        spans = [(int(i["first_time_ns"].min()), int(i["last_time_ns"].max())) for i in indices if len(i)]
        spans += [(block.first_time_ns, block.last_time_ns) for block in self.tail.blocks]
        if not spans:
            return np.zeros(0, np.int64)
        return np.array([min(a for a, _ in spans), max(b for _, b in spans)])

    def _indices(self) -> Iterator[npt.NDArray[Any]]:
        return (segment.index for segment in self.segments)


def _steps_with_rows(segment: Segment) -> int:
    """How many steps have executed a row; where rows were sampled this cannot be told, and it is all of them."""
    index = segment.index
    index = index[index["kind"] == fmt.ROWS_BLOCK]
    sampled = segment.executed_rows > segment.stored_rows
    return int(index["steps"][sampled | (index["rows"] > 0)].sum())
