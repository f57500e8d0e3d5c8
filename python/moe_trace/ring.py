"""The ring of a dead process: the steps that had not reached a segment. csrc/RING.md, section 4, is what this follows."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import DTYPES, Block, Piece, check_runs
from moe_trace.errors import DamagedTrace, NotATrace
from moe_trace.files import mapped, open_plain
from moe_trace.statistics import LayerStats

HEADER = np.dtype(
    [
        ("magic", "S8"), ("header_size", "<u4"), ("major", "<u2"), ("minor", "<u2"), ("ring_id", "<u8"),
        ("file_bytes", "<u8"), ("lanes", "<u4"), ("descriptors", "<u4"), ("arena_bytes", "<u8"),
        ("lanes_offset", "<u8"), ("descriptors_offset", "<u8"), ("arena_offset", "<u8"), ("owner_pid", "<u4"),
        ("reserved", "<u4"), ("owner_start_ticks", "<u8"), ("owner_boot_id", "S40"), ("created_ns", "<i8"),
        ("zero", "V116"), ("crc", "<u4"),
    ]
)  # fmt: skip
DESCRIPTOR = np.dtype(
    [
        ("word", "<u8"), ("step", "<u8"), ("offset", "<u8"), ("bytes", "<u8"), ("kind", "u1"), ("ids_dtype", "u1"),
        ("weights_dtype", "u1"), ("logits_dtype", "u1"), ("hidden_dtype", "u1"), ("tokens", "u1"), ("layer", "<u2"),
        ("rows", "<u4"), ("first_row", "<u4"), ("step_rows", "<u4"), ("k", "<u4"), ("logits_width", "<u4"),
        ("hidden_width", "<u4"), ("invalid_ids", "<u4"), ("runs", "<u4"), ("notes_bytes", "<u4"), ("flags", "<u4"),
        ("time_ns", "<i8"), ("notes", "<u4"), ("zero", "V36"),
    ]
)  # fmt: skip
assert (HEADER.itemsize, DESCRIPTOR.itemsize) == (256, 128)

_PAGE = 4096
_UINT32, _FLOAT16 = 3, 4
_RESERVED, _COMMITTED, _ABORTED = 1, 2, 3
_NOTE_REQUEST, _NOTE_LINE = 1, 3
_LAYER, _STEP = 1, 2
_COUNTERS_AT, _LOSSES_AT = 256, 8
_FIELDS = ((fmt.IDS, "ids_dtype", "k"), (fmt.WEIGHTS, "weights_dtype", "k"),
           (fmt.LOGITS, "logits_dtype", "logits_width"), (fmt.HIDDEN, "hidden_dtype", "hidden_width"))  # fmt: skip


def boot_id() -> str:
    """Of this machine since its last start; empty where it is not told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_lives(pid: int, start_ticks: int, boot: str) -> bool:
    """Whether the process that started at `start_ticks` of that boot still runs."""
    if boot and boot_id() and boot != boot_id():
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return start_ticks in (0, int(fields[19])) and fields[0] not in ("Z", "X")


def locked(file: int) -> bool:
    """Whether a process holds a POSIX lock on an open file: the sign of life that also works across containers."""
    probe = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    return struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, probe))[0] != fcntl.F_UNLCK


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
        self.aborted: set[int] = set()  #: steps that the program gave up, once blocks() has looked
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
        """The finished records of a lane that follow record `written`, as far as they are without a gap and were not overwritten.

        Where all went well the first of them is `written + 1`. After an error of the disk, records were given back without a block (and
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
                self._say(f"record {sequence} of lane {lane} in the ring {self.path} is damaged; it and what follows are lost")
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
        """Whether a record lies where the producer places it: behind the one before, or at the beginning if it would cross the end."""
        behind = before.offset + before.size
        return record.offset == (0 if behind + record.size > len(self._arenas[lane]) else behind % len(self._arenas[lane]))

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
        if int(d["kind"]) == _LAYER:
            dtypes = [(field, int(d[dtype]), int(d[width])) for field, dtype, width in _FIELDS]
            known = all(
                dtype in DTYPES[field] and width if dtype or field == fmt.IDS else True for field, dtype, width in dtypes
            )
            rows = int(d["rows"])
            return bool(
                known and _layer_columns(d)[1] == int(d["bytes"]) and int(d["first_row"]) + rows <= int(d["step_rows"])
            ) and int(d["layer"]) != fmt.NO_LAYER
        return int(d["kind"]) == _STEP and (bool(int(d["flags"]) & 1) or _step_parts(d)[2] == int(d["bytes"]))

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
            exact_weights: whether this trace keeps weights as the router gave them; otherwise they become float16, as in its segments.
            fragments: a step's number and what a segment has of it already.
        """
        steps: dict[int, _Step] = {}
        for lane in range(self.lanes):
            chain = self.chain(lane, written.get(lane, 0))
            # A chain that lacks its beginning may start in the middle of a step.
            partial = int(chain[0].descriptor["step"]) if chain and chain[0].sequence != written.get(lane, 0) + 1 else -1
            after_step = max(after_step, partial)
            for record in chain:
                d = record.descriptor
                if int(d["word"]) & 3 == _ABORTED:
                    continue
                step = steps.setdefault(int(d["step"]), _Step(int(d["step"])))
                payload = self._arenas[lane][record.offset : record.offset + int(d["bytes"])]
                if int(d["kind"]) == _STEP:
                    step.record = (d, payload)
                else:
                    step.layers.setdefault(int(d["layer"]), []).append((d, payload))
        last = max(steps, default=-1)
        blocks = []
        for number in sorted(steps):
            step = steps[number]
            if number <= after_step:
                continue
            if step.record is not None and int(step.record[0]["flags"]) & 1:
                self.aborted.add(number)
                continue
            if step.record is None and number != last:
                continue  # its end found no room, and the producer counted it
            try:
                blocks.append(RingBlock(step, exact_weights, fragments[1] if number == fragments[0] else ()))
            except DamagedTrace as error:
                self._say(f"step {number} in the ring {self.path} is damaged, and left out: {error}")
        return blocks


class Record(NamedTuple):
    """A record in its lane: its descriptor, and where its payload lies in the arena, with its length rounded up to 64."""

    sequence: int
    descriptor: Any
    offset: int
    size: int


class _Step:
    def __init__(self, number: int) -> None:
        self.number = number
        self.record: tuple[Any, memoryview] | None = None
        self.layers: dict[int, list[tuple[Any, memoryview]]] = {}


def _layer_columns(d: Any) -> tuple[dict[int, int], int]:
    """Where the columns of a layer record start in its payload, and its length."""
    at, size = {}, 0
    for field, dtype, width in _FIELDS:
        at[field] = size
        item = fmt.ITEM_BYTES.get(int(d[dtype]), 0)
        size = fmt.align(size + int(d["rows"]) * int(d[width]) * item)
    return at, size


def _step_parts(d: Any) -> tuple[int, int, int]:
    """Where tokens and notes start in the payload of a step record, and its length."""
    tokens = fmt.align(int(d["runs"]) * 16)
    notes = tokens + (fmt.align(int(d["rows"]) * 4) if int(d["tokens"]) else 0)
    return tokens, notes, notes + fmt.align(int(d["notes_bytes"]))


class RingBlock(Block):
    """One step in a ring, as a block; with the fragments of it that had been written to a segment already."""

    def __init__(self, step: _Step, exact_weights: bool, fragments: Sequence[Piece] = ()) -> None:
        self._step = step
        self._fragments = frozenset(fragments)
        self.complete = step.record is not None
        d = step.record[0] if step.record else next(iter(step.layers.values()))[0][0]
        self.first_step = self.last_step = step.number
        self.first_time_ns = self.last_time_ns = int(d["time_ns"])
        self.rows = int(d["step_rows"])
        columns: dict[tuple[int, int], list[Piece]] = {}
        for piece in (*fragments, *_layer_pieces(step, exact_weights)):
            columns.setdefault((piece.field, piece.layer), []).append(piece)
        if step.record is not None and int(d["tokens"]):
            at, payload = _step_parts(d)[0], step.record[1]
            columns[fmt.TOKENS, fmt.NO_LAYER] = [
                Piece(fmt.TOKENS, fmt.NO_LAYER, _UINT32, 1, 0, self.rows, lambda: np.frombuffer(payload, "<u4", self.rows, at).reshape(-1, 1))
            ]
        gaps = {layer for (_, layer), pieces in columns.items() if not self._covered(pieces)}
        self._pieces = {key: pieces for key, pieces in columns.items() if key[1] not in gaps}
        self.incomplete_layers = len(gaps)
        self.runs = self._read_runs()
        self.notes = self._read_notes()
        time_ns, rows = self.first_time_ns, self.rows
        self.steps = np.array([(step.number, time_ns, rows, len(self.runs), 0)], fmt.TABLES[fmt.STEPS])
        check_runs(self.steps, self.runs)

    def _covered(self, pieces: list[Piece]) -> bool:
        pieces.sort(key=lambda piece: piece.first_row)
        next_row = 0
        for piece in pieces:
            if (piece.first_row, piece.dtype, piece.width) != (next_row, pieces[0].dtype, pieces[0].width):
                return False
            next_row += piece.rows
        return next_row == self.rows

    def _read_runs(self) -> npt.NDArray[Any]:
        if self._step.record is None:
            return np.array([(fmt.NOBODY, fmt.NOBODY, self.rows, 0, 0)], fmt.TABLES[fmt.RUNS])
        d, payload = self._step.record
        return np.frombuffer(payload, fmt.TABLES[fmt.RUNS], int(d["runs"]))

    def _read_notes(self) -> list[dict[str, Any]]:
        if self._step.record is None:
            return []
        d, payload = self._step.record
        at = _step_parts(d)[1]
        data = payload[at : at + int(d["notes_bytes"])]
        lines, at = [], 0
        while at + 12 <= len(data):
            kind, _, size = struct.unpack_from("<III", data, at)
            at += 12
            if kind in (_NOTE_REQUEST, _NOTE_LINE):
                try:
                    line = json.loads(bytes(data[at : at + size]))
                except (ValueError, RecursionError) as error:
                    raise DamagedTrace(f"a note is no JSON ({error})") from None
                if isinstance(line, dict):
                    lines.append(line)
            at += size
        return lines

    @property
    def columns(self) -> dict[tuple[int, int], tuple[int, int]]:
        return {key: (pieces[0].dtype, pieces[0].width) for key, pieces in self._pieces.items()}

    @property
    def from_ring(self) -> list[Piece]:
        """Of its columns, the pieces that no segment has yet."""
        return [piece for pieces in self._pieces.values() for piece in pieces if piece not in self._fragments]

    def column(self, field: int, layer: int) -> npt.NDArray[Any]:
        parts = [piece.load() for piece in self._pieces[field, layer]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def add_statistics(self, into: dict[int, LayerStats], wanted: Callable[[int, int], bool]) -> None:
        classes = np.repeat(self.runs["cls"], self.runs["count"]) if self.layers else np.zeros(0, np.uint16)
        for layer in self.layers:
            ids = self.column(fmt.IDS, layer)
            weights = self.column(fmt.WEIGHTS, layer) if self.has(fmt.WEIGHTS, layer) else None
            for cls in np.unique(classes).tolist():
                if wanted(layer, cls):
                    mine = classes == cls
                    into.setdefault(layer, LayerStats()).add_rows(ids[mine], None if weights is None else weights[mine])


def _layer_pieces(step: _Step, exact_weights: bool) -> Iterator[Piece]:
    """The columns of a step's layer records, with the dtypes that a segment would give them."""
    for layer, records in step.layers.items():
        for d, payload in records:
            places, _ = _layer_columns(d)
            for field, dtype_name, width_name in _FIELDS:
                dtype, width, rows = int(d[dtype_name]), int(d[width_name]), int(d["rows"])
                if dtype == 0:
                    continue
                stored = _FLOAT16 if field == fmt.WEIGHTS and not exact_weights else dtype

                def load(
                    payload: memoryview = payload, at: int = places[field], dtype: int = dtype, width: int = width,
                    rows: int = rows, stored: int = stored,
                ) -> npt.NDArray[Any]:  # fmt: skip
                    raw = np.frombuffer(payload, np.uint8, rows * width * fmt.ITEM_BYTES[dtype], at)
                    return fmt.widen(raw, dtype).reshape(rows, width).astype(fmt.numpy_dtype(stored), copy=False)

                yield Piece(field, layer, stored, width, int(d["first_row"]), rows, load)
