"""Writes segments in Python: for what a dead process left behind, for imports, for what a selection is saved as."""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from moe_trace import format as fmt
from moe_trace.block import Piece
from moe_trace.errors import DamagedTrace
from moe_trace.segment import Segment
from moe_trace.statistics import Sums

_CODES = {np.dtype(np.uint8): 1, np.dtype("<u2"): 2, np.dtype("<u4"): 3, np.dtype("<f2"): 4, np.dtype("<f4"): 6}

Columns = Mapping[tuple[int, int], npt.NDArray[Any]]


class _Entries:
    """The entries of a block that is being built."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._parts: list[bytes] = []
        self._size = 0
        self._zstd = zstandard.ZstdCompressor(level=1)

    def add(
        self,
        field: int,
        data: bytes,
        *,
        rows: int,
        layer: int = fmt.NO_LAYER,
        dtype: int = 0,
        byte: int = 0,
        width: int = 0,
        first_row: int = 0,
    ) -> None:
        frame = self._zstd.compress(data) if data else b""
        codec, stored = (1, frame) if 0 < len(frame) < len(data) else (0, data)
        crc = zlib.crc32(stored)
        self._rows.append(
            (field, dtype, byte, codec, layer, 0, width, first_row, rows, crc, self._size, len(stored), len(data))
        )
        self._parts.append(stored)
        self._size += len(stored)

    def table(self, field: int, rows: npt.NDArray[Any]) -> None:
        self.add(field, fmt.encode_table(rows.astype(fmt.TABLES[field], copy=False)), rows=len(rows))

    def column(
        self, field: int, layer: int, values: npt.NDArray[Any], code: int | None = None, first_row: int = 0
    ) -> None:
        rows, width = values.shape
        if code == fmt.BFLOAT16:
            values = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2")
        else:
            code = _CODES[values.dtype]
        planes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(rows * width, fmt.ITEM_BYTES[code])
        for byte in range(planes.shape[1]):
            plane = planes[:, byte].tobytes()
            self.add(field, plane, rows=rows, layer=layer, dtype=code, byte=byte, width=width, first_row=first_row)

    def block(self, reach: int = 0, **header: Any) -> bytes:
        """The block without the padding that makes it `reach` bytes long or, as a multiple of 64, a little longer."""
        directory = np.array(self._rows, fmt.ENTRY)
        body_at = fmt.align(fmt.BLOCK.itemsize + directory.nbytes)
        directory["offset"] += body_at
        raw = directory.tobytes()
        size = fmt.align(body_at + self._size)
        head = np.zeros(1, fmt.BLOCK)
        values = {
            "magic": b"MOEB", "header_size": fmt.BLOCK.itemsize, "entries": len(directory),
            "block_bytes": max(size, fmt.align(reach)),
            "directory_stored": len(raw), "directory_raw": len(raw), "directory_crc": zlib.crc32(raw), **header,
        }  # fmt: skip
        for name, value in values.items():
            head[name] = value
        head["crc"] = zlib.crc32(head.tobytes()[:124])
        return (head.tobytes() + raw).ljust(body_at, b"\0") + b"".join(self._parts).ljust(size - body_at, b"\0")


class SegmentWriter:
    """Writes one segment: `add` blocks, then `close`. Until then it is `NNNNNN.moe.open`.

    Args:
        directory: of the rank.
        number: of the segment.
        metadata: csrc/FORMAT.md, section 6.
        run_id: 32 hexadecimal digits, as in rank.json.
        ring_id: of the ring the blocks come from; 0 for none.
    """

    def __init__(
        self,
        directory: Path,
        number: int = 0,
        *,
        metadata: Mapping[str, Any] | None = None,
        run_id: str = "0" * 32,
        ring_id: int = 0,
    ) -> None:
        self.path = directory / f"{number:06d}.moe"
        self._open_path = self.path.with_name(self.path.name + ".open")
        text = json.dumps(dict(metadata or {})).encode()
        head = np.zeros(1, fmt.SUPERBLOCK)
        values = {
            "magic": b"MOETRACE", "header_size": fmt.SUPERBLOCK.itemsize, "major": fmt.MAJOR,
            "ring_id": ring_id, "number": number,
            "created_ns": time.time_ns(), "metadata_offset": fmt.SUPERBLOCK.itemsize, "metadata_stored": len(text),
            "metadata_raw": len(text), "metadata_crc": zlib.crc32(text), "run_id": np.void(bytes.fromhex(run_id)),
        }  # fmt: skip
        for name, value in values.items():
            head[name] = value
        head["crc"] = zlib.crc32(head.tobytes()[:124])
        self._start(fmt.align(fmt.SUPERBLOCK.itemsize + len(text)), np.zeros(0, fmt.TABLES[fmt.LOSSES]))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._open_path, flags, 0o600)
        self._write(text.ljust(self._end - fmt.SUPERBLOCK.itemsize, b"\0"), fmt.SUPERBLOCK.itemsize)
        self._write(head.tobytes(), 0)

    @classmethod
    def resume(cls, segment: Segment) -> SegmentWriter:
        """Go on behind the last whole block of a segment that a dead process left open."""
        self = cls.__new__(cls)
        self._open_path = segment.path
        self.path = segment.path.with_suffix("") if segment.path.suffix == ".open" else segment.path
        losses = segment.losses
        # Killed before its first block, a segment ends with its metadata, wherever that is.
        whole_to = fmt.align(segment.whole_to)
        self._start(whole_to, np.zeros(0, fmt.TABLES[fmt.LOSSES]) if losses is None else losses)
        for block in segment.blocks():
            self._index += block.index_items
            self._next_block = max(self._next_block, block.number + 1)
            if block.complete:
                self._rows += block.rows
                self._executed += block.executed_rows
                with contextlib.suppress(DamagedTrace):  # its rows cannot be counted; that the block is damaged is said
                    self._sum.add_tables(*block.statistics_tables())
        self._file = os.open(segment.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self

    def _start(self, end: int, losses: npt.NDArray[Any]) -> None:
        self._end = end
        self._losses = losses
        self._index: list[tuple[int, ...]] = []
        self._sum = Sums()
        self._rows = self._executed = 0
        self._next_block = 0

    def add(
        self,
        columns: Columns,
        steps: npt.NDArray[Any],
        runs: npt.NDArray[Any],
        *,
        notes: Sequence[Mapping[str, Any]] = (),
        lanes: npt.NDArray[Any] | None = None,
        losses: npt.NDArray[Any] | None = None,
        stored_as: Mapping[tuple[int, int], int] | None = None,
        fragments: int = 0,
        rest: Sequence[Piece] = (),
        counted: tuple[Sums, int] | None = None,
    ) -> None:
        """Append a rows block.

        Args:
            columns: by (field, layer), `[rows, width]`, uint8, uint16, uint32, float16 or float32; tokens under layer
                65535.
            steps, runs, lanes, losses: tables with the dtypes of `format.TABLES`.
            notes: JSON objects.
            stored_as: dtype codes of columns; of use for bfloat16, whose values come as float32.
            fragments: how many fragment blocks at the end of the segment belong to this block, which then has one step.
            rest: with fragments, the pieces of the columns that these do not have.
            counted: the sums of all rows that the steps executed, and how many tokens these are, where not all of them
                are in the columns. None: they are.

        Raises:
            ValueError: the parts do not fit together.
        """
        rows = int(steps["rows"].sum())
        if int(runs["count"].sum()) != rows or int(steps["runs"].sum()) != len(runs):
            raise ValueError("the runs do not add up to the steps' rows")
        entries, sums = _Entries(), counted[0] if counted else Sums()
        classes = np.repeat(runs["cls"], runs["count"])
        for (field, layer), values in columns.items():
            if values.ndim != 2 or len(values) != rows:
                raise ValueError(
                    f"{fmt.FIELD_NAMES[field]} of layer {layer} have the shape {values.shape}, "
                    f"the steps have {rows} rows"
                )
            if not fragments and rows:
                entries.column(field, layer, values, (stored_as or {}).get((field, layer)))
            if field == fmt.IDS and counted is None:
                sums.add_rows(layer, classes, values, columns.get((fmt.WEIGHTS, layer)))
        for piece in rest:
            entries.column(piece.field, piece.layer, piece.load(), piece.dtype, piece.first_row)
        # Steps ascend; their times need not, for a clock may be set back.
        numbers, times = (steps[name] if len(steps) else np.zeros(1, np.int64) for name in ("step", "time_ns"))
        span = {
            "steps": len(steps), "rows": rows, "first_step": int(numbers[0]), "last_step": int(numbers[-1]),
            "first_time_ns": int(times.min()), "last_time_ns": int(times.max()),
        }  # fmt: skip
        self._add(entries, steps, runs, sums, notes, lanes, losses, span, fragments, counted[1] if counted else rows)

    def take_back(
        self,
        step: int,
        fragments: int,
        lanes: npt.NDArray[Any] | None = None,
        losses: npt.NDArray[Any] | None = None,
    ) -> None:
        """Append the block that says of the fragments at the end of the segment that their step was aborted."""
        steps, runs = (np.zeros(0, fmt.TABLES[field]) for field in (fmt.STEPS, fmt.RUNS))
        span = {"steps": 0, "rows": 0, "first_step": step, "last_step": step, "first_time_ns": 0, "last_time_ns": 0}
        self._add(_Entries(), steps, runs, Sums(), (), lanes, losses, span, fragments, 0)

    def _add(
        self,
        entries: _Entries,
        steps: npt.NDArray[Any],
        runs: npt.NDArray[Any],
        sums: Sums,
        notes: Sequence[Mapping[str, Any]],
        lanes: npt.NDArray[Any] | None,
        losses: npt.NDArray[Any] | None,
        span: dict[str, int],
        fragments: int,
        executed: int,
    ) -> None:
        tables = sums.tables()
        for field, table in (
            (fmt.STEPS, steps),
            (fmt.RUNS, runs),
            (fmt.STAT_GROUPS, tables[0]),
            (fmt.STAT_COUNTS, tables[1]),
        ):
            entries.table(field, table)
        if notes:
            entries.add(fmt.NOTES, b"".join(json.dumps(note).encode() + b"\n" for note in notes), rows=len(notes))
        entries.table(fmt.LANES, np.zeros(0, fmt.TABLES[fmt.LANES]) if lanes is None else lanes)
        self._losses = self._losses if losses is None else losses
        entries.table(fmt.LOSSES, self._losses)
        widened = 0 if executed == span["rows"] else executed
        block = entries.block(
            kind=fmt.ROWS_BLOCK, number=self._next_block, fragments=fragments, executed=widened, **span
        )
        self._rows += span["rows"]
        self._executed += executed
        self._index.append((self._end, len(block), fmt.ROWS_BLOCK, *span.values()))
        self._append(block)
        self._sum.add_tables(*tables)
        self._next_block += 1

    def _append(self, block: bytes) -> None:
        # The body first: a valid header is the promise that everything behind it is there.
        head = fmt.BLOCK.itemsize
        self._write(block[head:], self._end + head)
        self._write(block[:head], self._end)
        self._end += len(block)

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    def close(self) -> Path:
        """Write the footer and the trailer, and give the file its final name, which is returned."""
        entries = _Entries()
        for field, table in zip((fmt.STAT_GROUPS, fmt.STAT_COUNTS), self._sum.tables(), strict=True):
            entries.table(field, table)
        entries.table(fmt.INDEX, np.array(self._index, fmt.TABLES[fmt.INDEX]))
        entries.table(fmt.LANES, np.zeros(0, fmt.TABLES[fmt.LANES]))
        entries.table(fmt.LOSSES, self._losses)
        footer_at = self._end
        span = {"first_step": self._index[0][5], "last_step": self._index[-1][6]} if self._index else {}
        span["executed"] = 0 if self._executed == self._rows else self._executed
        # A reader may have the file mapped, so it must not become shorter: what a crash left torn behind the last whole
        # block becomes padding of the footer.
        torn = os.fstat(self._file).st_size - fmt.TRAILER.itemsize - footer_at
        footer = entries.block(reach=torn, kind=fmt.FOOTER_BLOCK, number=self._next_block, **span)
        self._append(footer)
        self._end = max(self._end, footer_at + fmt.align(torn))
        trailer = np.zeros(1, fmt.TRAILER)
        trailer["footer_offset"], trailer["file_bytes"] = footer_at, self._end + fmt.TRAILER.itemsize
        trailer["magic"], trailer["crc"] = b"MOEFOOT1", zlib.crc32(trailer.tobytes()[:20])
        self._write(trailer.tobytes(), self._end)
        os.fdatasync(self._file)
        os.close(self._file)
        os.rename(self._open_path, self.path)
        return self.path
