"""Writes segments in Python: for what a dead process left behind, for imports, for what a selection is saved as."""

from __future__ import annotations

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
from moe_trace import statistics
from moe_trace.segment import Segment
from moe_trace.statistics import LayerStats

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
    ) -> None:
        frame = self._zstd.compress(data) if data else b""
        codec, stored = (1, frame) if 0 < len(frame) < len(data) else (0, data)
        crc = zlib.crc32(stored)
        self._rows.append(
            (field, dtype, byte, codec, layer, 0, width, 0, rows, crc, self._size, len(stored), len(data))
        )
        self._parts.append(stored)
        self._size += len(stored)

    def table(self, field: int, rows: npt.NDArray[Any]) -> None:
        self.add(field, fmt.encode_table(rows.astype(fmt.TABLES[field], copy=False)), rows=len(rows))

    def column(self, field: int, layer: int, values: npt.NDArray[Any]) -> None:
        code = _CODES[values.dtype]
        rows, width = values.shape
        planes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(rows * width, fmt.ITEM_BYTES[code])
        for byte in range(planes.shape[1]):
            self.add(field, planes[:, byte].tobytes(), rows=rows, layer=layer, dtype=code, byte=byte, width=width)

    def block(self, **header: Any) -> bytes:
        directory = np.array(self._rows, fmt.ENTRY)
        body_at = fmt.align(fmt.BLOCK.itemsize + directory.nbytes)
        directory["offset"] += body_at
        raw = directory.tobytes()
        size = fmt.align(body_at + self._size)
        head = np.zeros(1, fmt.BLOCK)
        values = {
            "magic": b"MOEB", "header_size": fmt.BLOCK.itemsize, "entries": len(directory), "block_bytes": size,
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
        self._index: list[tuple[int, ...]] = []
        self._sum: dict[tuple[int, int], tuple[int, LayerStats]] = {}
        self._next_block = 0
        self._losses = np.zeros(0, fmt.TABLES[fmt.LOSSES])
        text = json.dumps(dict(metadata or {})).encode()
        head = np.zeros(1, fmt.SUPERBLOCK)
        values = {
            "magic": b"MOETRACE", "header_size": fmt.SUPERBLOCK.itemsize, "major": fmt.MAJOR, "ring_id": ring_id, "number": number,
            "created_ns": time.time_ns(), "metadata_offset": fmt.SUPERBLOCK.itemsize, "metadata_stored": len(text),
            "metadata_raw": len(text), "metadata_crc": zlib.crc32(text), "run_id": np.void(bytes.fromhex(run_id)),
        }  # fmt: skip
        for name, value in values.items():
            head[name] = value
        head["crc"] = zlib.crc32(head.tobytes()[:124])
        self._file = os.fdopen(
            os.open(self._open_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "r+b"
        )
        self._end = fmt.align(fmt.SUPERBLOCK.itemsize + len(text))
        self._file.write((head.tobytes() + text).ljust(self._end, b"\0"))

    @classmethod
    def resume(cls, segment: Segment, without_cut_step: bool = False) -> SegmentWriter:
        """Go on behind the last whole block of a segment that a dead process left open; `without_cut_step` first takes off the
        fragments at its end, because what is added now has that step whole."""
        self = cls.__new__(cls)
        self._open_path = segment.path
        self.path = segment.path.with_suffix("") if segment.path.suffix == ".open" else segment.path
        blocks = segment.blocks[:-1] if without_cut_step else segment.blocks
        self._index = [item for block in blocks for item in block.index_items]
        self._sum = {}
        self._next_block = 0
        self._losses = segment.losses
        for block in blocks:
            self._next_block = max(self._next_block, block.number + 1)
            if block.complete:
                self._add_to_sum(*block.statistics_tables())
        self._file = segment.path.open("r+b")
        self._end = segment.blocks[-1].offset if without_cut_step else segment.whole_to
        self._file.truncate(self._end)
        return self

    def _add_to_sum(self, groups: npt.NDArray[Any], counts: npt.NDArray[Any]) -> None:
        for group in groups:
            key = int(group["layer"]), int(group["cls"])
            into: dict[int, LayerStats] = {}
            statistics.add_groups(into, groups, counts, lambda layer, cls, key=key: (layer, cls) == key)  # type: ignore[misc]
            k, total = self._sum.get(key, (int(group["k"]), LayerStats()))
            total.merge(into[key[0]])
            self._sum[key] = k, total

    def add(
        self,
        columns: Columns,
        steps: npt.NDArray[Any],
        runs: npt.NDArray[Any],
        *,
        notes: Sequence[Mapping[str, Any]] = (),
        lanes: npt.NDArray[Any] | None = None,
        losses: npt.NDArray[Any] | None = None,
    ) -> None:
        """Append a rows block.

        Args:
            columns: by (field, layer), `[rows, width]`, uint8, uint16, uint32, float16 or float32; tokens under layer 65535.
            steps, runs, lanes, losses: tables with the dtypes of `format.TABLES`.
            notes: JSON objects.

        Raises:
            ValueError: the parts do not fit together.
        """
        rows = int(steps["rows"].sum())
        if int(runs["count"].sum()) != rows or int(steps["runs"].sum()) != len(runs):
            raise ValueError("the runs do not add up to the steps' rows")
        entries = _Entries()
        classes = np.repeat(runs["cls"], runs["count"])
        by_class: list[tuple[int, int, int, LayerStats]] = []
        for (field, layer), values in columns.items():
            if values.ndim != 2 or len(values) != rows:
                raise ValueError(
                    f"{fmt.FIELD_NAMES[field]} of layer {layer} have the shape {values.shape}, the steps have {rows} rows"
                )
            entries.column(field, layer, values)
            if field == fmt.IDS:
                weights = columns.get((fmt.WEIGHTS, layer))
                for cls in np.unique(classes).tolist():
                    mine, stats = classes == cls, LayerStats()
                    stats.add_rows(values[mine], None if weights is None else weights[mine])
                    by_class.append((layer, cls, values.shape[1], stats))
        entries.table(fmt.STEPS, steps)
        entries.table(fmt.RUNS, runs)
        groups, counts = statistics.tables(by_class)
        entries.table(fmt.STAT_GROUPS, groups)
        entries.table(fmt.STAT_COUNTS, counts)
        self._add_to_sum(groups, counts)
        if notes:
            entries.add(fmt.NOTES, b"".join(json.dumps(note).encode() + b"\n" for note in notes), rows=len(notes))
        entries.table(fmt.LANES, np.zeros(0, fmt.TABLES[fmt.LANES]) if lanes is None else lanes)
        if losses is not None:
            self._losses = losses
        entries.table(fmt.LOSSES, self._losses)
        first, last = (steps[0], steps[-1]) if len(steps) else (np.zeros((), steps.dtype), np.zeros((), steps.dtype))
        span = {
            "first_step": int(first["step"]), "last_step": int(last["step"]),
            "first_time_ns": int(first["time_ns"]), "last_time_ns": int(last["time_ns"]),
        }  # fmt: skip
        block = entries.block(kind=fmt.ROWS_BLOCK, number=self._next_block, steps=len(steps), rows=rows, **span)
        self._index.append((self._end, len(block), fmt.ROWS_BLOCK, len(steps), rows, *span.values()))
        self._append(block)
        self._next_block += 1

    def _append(self, block: bytes) -> None:
        # The body first: a valid header is the promise that everything behind it is there.
        head = fmt.BLOCK.itemsize
        os.pwrite(self._file.fileno(), block[head:], self._end + head)
        os.pwrite(self._file.fileno(), block[:head], self._end)
        self._end += len(block)

    def close(self) -> Path:
        """Write the footer and the trailer, and give the file its final name, which is returned."""
        self._file.flush()
        entries = _Entries()
        groups, counts = statistics.tables((layer, cls, k, stats) for (layer, cls), (k, stats) in self._sum.items())
        entries.table(fmt.STAT_GROUPS, groups)
        entries.table(fmt.STAT_COUNTS, counts)
        entries.table(fmt.INDEX, np.array(self._index, fmt.TABLES[fmt.INDEX]))
        entries.table(fmt.LANES, np.zeros(0, fmt.TABLES[fmt.LANES]))
        entries.table(fmt.LOSSES, self._losses)
        footer_at = self._end
        self._append(entries.block(kind=fmt.FOOTER_BLOCK, number=self._next_block))
        trailer = np.zeros(1, fmt.TRAILER)
        trailer["footer_offset"], trailer["file_bytes"], trailer["magic"] = (
            footer_at,
            self._end + fmt.TRAILER.itemsize,
            b"MOEFOOT1",
        )
        trailer["crc"] = zlib.crc32(trailer.tobytes()[:20])
        os.pwrite(self._file.fileno(), trailer.tobytes(), self._end)
        os.fdatasync(self._file.fileno())
        self._file.close()
        os.rename(self._open_path, self.path)
        return self.path
