"""The ring of a dead process: the steps that had not reached a segment. Follows csrc/RING.md, section 4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import Piece
from moe_trace.errors import DamagedTrace, NotATrace
from moe_trace.files import mapped, open_plain
from moe_trace.owner import locked, process_lives
from moe_trace.ring_block import CAPTURED_ONLY, DESCRIPTOR, STEP_ABORTED, STEP_RECORD, RingBlock, RingStep, well_formed

HEADER = np.dtype(
    [
        ("magic", "S8"), ("header_size", "<u4"), ("major", "<u2"), ("minor", "<u2"), ("ring_id", "<u8"),
        ("file_bytes", "<u8"), ("lanes", "<u4"), ("descriptors", "<u4"), ("arena_bytes", "<u8"),
        ("lanes_offset", "<u8"), ("descriptors_offset", "<u8"), ("arena_offset", "<u8"), ("owner_pid", "<u4"),
        ("reserved", "<u4"), ("owner_start_ticks", "<u8"), ("owner_boot_id", "S40"), ("created_ns", "<i8"),
        ("zero", "V116"), ("crc", "<u4"),
    ]
)  # fmt: skip
assert HEADER.itemsize == 256

_PAGE = 4096
_RESERVED, _COMMITTED, _ABORTED = 1, 2, 3
_COUNTERS_AT, _LOSSES_AT = 256, 8


class Ring:
    """The ring file of a dead owner, mapped for reading.

    Raises:
        NotATrace, UnsupportedVersion, DamagedTrace: the file is no ring that can be read.
        OSError: it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_plain(path) as handle:
            self.owned = locked(handle)
            self._data = mapped(handle)
        if bytes(self._data[:8]) != b"MOERING1" or len(self._data) < _PAGE:
            raise NotATrace(f"{path} is no ring of moe_native")
        head = fmt.struct_at(self._data, 0, HEADER)
        fmt.check_version(int(head["major"]), 0, str(path))
        lanes, descriptors, arena = (int(head[name]) for name in ("lanes", "descriptors", "arena_bytes"))
        at_descriptors = _PAGE * (1 + lanes)
        at_arena = at_descriptors + lanes * descriptors * DESCRIPTOR.itemsize
        layout = _PAGE, len(self._data), _PAGE, at_descriptors, at_arena
        names = "header_size", "file_bytes", "lanes_offset", "descriptors_offset", "arena_offset"
        if (
            not fmt.crc_holds(self._data, 0, head)
            or layout != tuple(int(head[name]) for name in names)
            or at_arena + lanes * arena != len(self._data)
            or not lanes
            or not descriptors
        ):
            raise DamagedTrace(f"the header of the ring {path} is damaged")
        self.id = int(head["ring_id"])
        self.lanes = lanes
        self.aborted: set[int] = set()  #: steps that are no steps of the trace, once blocks() has looked
        self.problems: list[str] = []  #: what was found damaged, once blocks() has looked
        boot = head["owner_boot_id"].decode("ascii", "replace")
        self.owned = self.owned or process_lives(int(head["owner_pid"]), int(head["owner_start_ticks"]), boot)
        self._descriptors = np.frombuffer(self._data, DESCRIPTOR, lanes * descriptors, at_descriptors).reshape(
            lanes, descriptors
        )
        self._arenas = [self._data[at_arena + i * arena : at_arena + (i + 1) * arena] for i in range(lanes)]
        self._counters = np.frombuffer(self._data, "<u8", 64, _COUNTERS_AT)

    @property
    def losses(self) -> npt.NDArray[Any]:
        """Table *losses*: the totals when the process died."""
        rows = []
        for cause in range(len(fmt.CAUSES)):
            steps, layers, lost = (int(self._counters[_LOSSES_AT + 3 * cause + i]) for i in range(3))
            if steps or layers or lost:
                rows.append((cause, steps, layers, lost))
        return np.array(rows, fmt.TABLES[fmt.LOSSES])

    def chain(self, lane: int, written: int) -> list[Record]:
        """The finished records of a lane that follow record `written`, as far as they are without a gap and were not
        overwritten.

        Where all went well the first of them is `written + 1`. After an error of the disk, records were given back
        without a block (and
        counted): then what matters is the unbroken chain that ends with the newest, as far back as the arena reaches.
        """
        words = self._descriptors[lane]["word"]
        count = len(words)
        sequences, states = words >> 2, words & 3
        at = (np.arange(count, dtype=np.uint64) + 1) % count
        finished = (sequences > written) & (sequences % count == at) & ((states == _COMMITTED) | (states == _ABORTED))
        known = set(sequences[finished].tolist())
        if not known:
            return []
        first = written + 1
        if first not in known:
            first = max(known)
            while first - 1 in known:
                first -= 1
            if not self._had_io_errors:
                self._say(f"record {written + 1} of lane {lane} in the ring {self.path} is damaged; its step is lost")
        records: list[Record] = []
        for sequence in range(first, max(known) + 1):
            d = self._descriptors[lane][(sequence - 1) % count]
            record = Record(sequence, d, int(d["offset"]), fmt.align(int(d["bytes"])))
            fits = sequence in known and self._fits(lane, record)
            if not fits or (records and not self._follows(lane, records[-1], record)):
                self._say(
                    f"record {sequence} of lane {lane} in the ring {self.path} is damaged; it and what follows are lost"
                )
                break
            records.append(record)
        return self._not_overwritten(lane, records)

    @property
    def _had_io_errors(self) -> bool:
        return bool(self._counters[_LOSSES_AT + 3 * fmt.CAUSES.index("io_error")])

    def _say(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _follows(self, lane: int, before: Record, record: Record) -> bool:
        """Whether a record lies where the producer places it: behind the one before, or at the beginning if it would
        cross the end.
        """
        behind = before.offset + before.size
        return record.offset == (
            0 if behind + record.size > len(self._arenas[lane]) else behind % len(self._arenas[lane])
        )

    def _not_overwritten(self, lane: int, records: list[Record]) -> list[Record]:
        if not records:
            return records
        arena = len(self._arenas[lane])
        newer = records
        if self._had_io_errors:
            # Only then may the record that was being filled lie over one that no block has.
            d = self._descriptors[lane][records[-1].sequence % self._descriptors.shape[1]]
            filling = Record(records[-1].sequence + 1, d, int(d["offset"]), fmt.align(int(d["bytes"])))
            if int(d["word"]) == filling.sequence << 2 | _RESERVED and self._follows(lane, records[-1], filling):
                newer = [*records, filling]
        end = newer[-1].offset + newer[-1].size
        kept, lap = len(newer) - 1, 0
        for record, after in zip(newer[-2::-1], newer[:0:-1], strict=True):
            lap += after.offset < record.offset + record.size
            if end - (record.offset - lap * arena) > arena:
                break
            kept -= 1
        return records[kept:]

    def _fits(self, lane: int, record: Record) -> bool:
        d, arena = record.descriptor, len(self._arenas[lane])
        if int(d["word"]) & 3 == _ABORTED:
            return record.offset <= arena
        if record.offset % fmt.ALIGN or record.size > arena or record.offset > arena - record.size:
            return False
        return well_formed(d)

    def blocks(
        self,
        written: dict[int, int],
        after_step: int,
        exact_weights: bool,
        fragments: tuple[int, Sequence[Piece]] = (-1, ()),
    ) -> list[RingBlock]:
        """The steps that are in no segment, each a block.

        Args:
            written: of each lane, the last record that a segment's block holds; a lane that is missing has none.
            after_step: the last step that a segment has whole; -1 for none.
            exact_weights: whether this trace keeps weights as the router gave them; otherwise they become float16, as
                in its segments.
            fragments: a step's number and what a segment has of it already; -1 for none.
        """
        steps = {fragments[0]: RingStep(fragments[0])} if fragments[0] >= 0 else {}
        for lane in range(self.lanes):
            chain = self.chain(lane, written.get(lane, 0))
            # A chain that lacks its beginning may start in the middle of a step.
            partial = (
                int(chain[0].descriptor["step"]) if chain and chain[0].sequence != written.get(lane, 0) + 1 else -1
            )
            after_step = max(after_step, partial)
            for record in chain:
                d = record.descriptor
                if int(d["word"]) & 3 == _ABORTED:
                    continue
                step = steps.setdefault(int(d["step"]), RingStep(int(d["step"])))
                payload = self._arenas[lane][record.offset : record.offset + int(d["bytes"])]
                if int(d["kind"]) == STEP_RECORD:
                    step.record = (d, payload)
                elif not int(d["flags"]) & CAPTURED_ONLY:
                    step.layers.setdefault(int(d["layer"]), []).append((d, payload))
        last = max(steps, default=-1)
        blocks = []
        for number in sorted(steps):
            step = steps[number]
            if number <= after_step:
                continue
            if step.record is not None and int(step.record[0]["flags"]) & (STEP_ABORTED | CAPTURED_ONLY):
                self.aborted.add(number)
                continue
            if step.record is None and number != last:
                self.aborted.add(number)  # its end found no room, and the producer counted it
                continue
            if step.record is None and not step.layers:
                continue  # all that is here of it is for captures
            try:
                blocks.append(RingBlock(step, exact_weights, fragments[1] if number == fragments[0] else ()))
            except DamagedTrace as error:
                self._say(f"step {number} in the ring {self.path} is damaged, and left out: {error}")
        return blocks


class Record(NamedTuple):
    """A record in its lane: its descriptor, and where its payload lies in the arena, with its length rounded up to
    64.
    """

    sequence: int
    descriptor: Any
    offset: int
    size: int
