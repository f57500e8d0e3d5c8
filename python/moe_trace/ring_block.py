"""Records of a ring, and the steps that they make up, as blocks. Follows csrc/RING.md, section 2."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import DTYPES, Block, Piece, check_runs
from moe_trace.errors import DamagedTrace
from moe_trace.statistics import LayerStats, Sums

DESCRIPTOR = np.dtype(
    [
        ("word", "<u8"), ("step", "<u8"), ("offset", "<u8"), ("bytes", "<u8"), ("kind", "u1"), ("ids_dtype", "u1"),
        ("weights_dtype", "u1"), ("logits_dtype", "u1"), ("hidden_dtype", "u1"), ("tokens", "u1"), ("layer", "<u2"),
        ("rows", "<u4"), ("first_row", "<u4"), ("step_rows", "<u4"), ("k", "<u4"), ("logits_width", "<u4"),
        ("hidden_width", "<u4"), ("invalid_ids", "<u4"), ("runs", "<u4"), ("notes_bytes", "<u4"), ("flags", "<u4"),
        ("time_ns", "<i8"), ("notes", "<u4"), ("zero", "V36"),
    ]
)  # fmt: skip
assert DESCRIPTOR.itemsize == 128

LAYER_RECORD, STEP_RECORD = 1, 2
STEP_ABORTED, STEP_COUNTED, CAPTURED_ONLY = 1, 4, 16
_CAPTURED_COLUMN = {fmt.WEIGHTS: 32, fmt.LOGITS: 64, fmt.HIDDEN: 128}
_UINT32, _FLOAT16 = 3, 4
_NOTE_REQUEST, _NOTE_LINE = 1, 3
_FIELDS = ((fmt.IDS, "ids_dtype", "k"), (fmt.WEIGHTS, "weights_dtype", "k"),
           (fmt.LOGITS, "logits_dtype", "logits_width"), (fmt.HIDDEN, "hidden_dtype", "hidden_width"))  # fmt: skip


def well_formed(d: Any) -> bool:
    """Whether the payload of a committed record has exactly the length that its descriptor's columns need."""
    if int(d["kind"]) == STEP_RECORD:
        return bool(int(d["flags"]) & STEP_ABORTED) or _step_parts(d)[2] == int(d["bytes"])
    if int(d["kind"]) != LAYER_RECORD:
        return bool(int(d["flags"]) & CAPTURED_ONLY)  # whatever it is, the trace has nothing of it
    if int(d["layer"]) == fmt.NO_LAYER:
        return False
    for field, dtype, width in _FIELDS:
        there = field == fmt.IDS or int(d[dtype])
        if there and (int(d[dtype]) not in DTYPES[field] or not int(d[width])):
            return False
    rows_fit = int(d["first_row"]) + int(d["rows"]) <= int(d["step_rows"])
    return rows_fit and _layer_columns(d)[1] == int(d["bytes"])


class RingStep:
    """The records of one step that the trace has, each its descriptor and its payload. There may be none."""

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

    def __init__(self, step: RingStep, exact_weights: bool, fragments: Sequence[Piece] = ()) -> None:
        self._step = step
        self._fragments = frozenset(fragments)
        self.complete = step.record is not None
        d = step.record[0] if step.record else next(iter(step.layers.values()))[0][0]
        self.first_step = self.last_step = step.number
        self.first_time_ns = self.last_time_ns = int(d["time_ns"])
        self.executed_rows = int(d["step_rows"])
        columns: dict[tuple[int, int], list[Piece]] = {}
        for piece in (*fragments, *_layer_pieces(step, exact_weights)):
            columns.setdefault((piece.field, piece.layer), []).append(piece)
        if step.record is not None and int(d["tokens"]):
            at, payload, rows = _step_parts(d)[0], step.record[1], self.executed_rows
            columns[fmt.TOKENS, fmt.NO_LAYER] = [
                Piece(
                    fmt.TOKENS,
                    fmt.NO_LAYER,
                    _UINT32,
                    1,
                    0,
                    rows,
                    lambda: np.frombuffer(payload, "<u4", rows, at).reshape(-1, 1),
                )
            ]
        gaps = {layer for (_, layer), pieces in columns.items() if not self._covered(pieces)}
        self._pieces = {key: pieces for key, pieces in columns.items() if key[1] not in gaps}
        self.incomplete_layers = len(gaps)
        self._executed_runs = self._read_runs()
        self.notes = self._read_notes()
        check_runs(self._steps(self.executed_rows, self._executed_runs), self._executed_runs)
        self.runs, self._keep = self._stored(self._executed_runs)
        self.rows = int(self.runs["count"].sum())
        self.steps = self._steps(self.rows, self.runs)

    def _steps(self, rows: int, runs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.array([(self.first_step, self.first_time_ns, rows, len(runs), 0)], fmt.TABLES[fmt.STEPS])

    def _stored(self, runs: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """The runs whose rows are stored, and which rows these are; None for all. Fragments have the rows of all runs,
        before it is known whose they are: there what is only counted stays, as nobody's."""
        counted = runs["flags"] & fmt.RUN_COUNTED != 0
        if not counted.any():
            return runs, None
        if self._fragments:
            runs = runs.copy()
            runs["request"][counted] = runs["position"][counted] = fmt.NOBODY
            runs["flags"][counted] &= ~np.uint16(fmt.RUN_COUNTED)
            return runs, None
        return runs[~counted], np.repeat(~counted, runs["count"])

    def _covered(self, pieces: list[Piece]) -> bool:
        pieces.sort(key=lambda piece: piece.first_row)
        next_row = 0
        for piece in pieces:
            if (piece.first_row, piece.dtype, piece.width) != (next_row, pieces[0].dtype, pieces[0].width):
                return False
            next_row += piece.rows
        return next_row == self.executed_rows

    def _read_runs(self) -> npt.NDArray[Any]:
        if self._step.record is None:
            first = next(iter(self._step.layers.values()))[0][0]
            flags = fmt.RUN_COUNTED if int(first["flags"]) & STEP_COUNTED else 0
            return np.array([(fmt.NOBODY, fmt.NOBODY, self.executed_rows, 0, flags)], fmt.TABLES[fmt.RUNS])
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
                    line = fmt.parse_json(bytes(data[at : at + size]))
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
    def stored_rows(self) -> int:
        """As `rows`; a segment's are called so."""
        return self.rows

    @property
    def from_ring(self) -> list[Piece]:
        """Of its columns, the pieces that no segment has yet."""
        return [piece for pieces in self._pieces.values() for piece in pieces if piece not in self._fragments]

    def column(self, field: int, layer: int) -> npt.NDArray[Any]:
        rows = self._executed(field, layer)
        return rows if self._keep is None else rows[self._keep]

    def _executed(self, field: int, layer: int) -> npt.NDArray[Any]:
        parts = [piece.load() for piece in self._pieces[field, layer]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _counted(self) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]]:
        """All executed rows: of each layer classes, ids and weights."""
        runs = self._executed_runs
        classes = np.repeat(runs["cls"], runs["count"]) if self.layers else np.zeros(0, np.uint16)
        for layer in self.layers:
            weights = self._executed(fmt.WEIGHTS, layer) if self.has(fmt.WEIGHTS, layer) else None
            yield layer, classes, self._executed(fmt.IDS, layer), weights

    def add_to(self, sums: Sums) -> None:
        """Add the totals of all executed rows."""
        for counted in self._counted():
            sums.add_rows(*counted)

    def add_statistics(self, into: dict[int, LayerStats], wanted: Callable[[int, int], bool]) -> None:
        for layer, classes, ids, weights in self._counted():
            for cls in np.unique(classes).tolist():
                if wanted(layer, cls):
                    mine = classes == cls
                    into.setdefault(layer, LayerStats()).add_rows(ids[mine], None if weights is None else weights[mine])


def _layer_pieces(step: RingStep, exact_weights: bool) -> Iterator[Piece]:
    """The columns that the trace has of a step's layer records, with the dtypes that a segment would give them."""
    for layer, records in step.layers.items():
        for d, payload in records:
            places, _ = _layer_columns(d)
            for field, dtype_name, width_name in _FIELDS:
                dtype, width, rows = int(d[dtype_name]), int(d[width_name]), int(d["rows"])
                if dtype == 0 or int(d["flags"]) & _CAPTURED_COLUMN.get(field, 0):
                    continue
                stored = _FLOAT16 if field == fmt.WEIGHTS and not exact_weights else dtype

                def load(
                    payload: memoryview = payload, at: int = places[field], dtype: int = dtype, width: int = width,
                    rows: int = rows, stored: int = stored,
                ) -> npt.NDArray[Any]:  # fmt: skip
                    raw = np.frombuffer(payload, np.uint8, rows * width * fmt.ITEM_BYTES[dtype], at)
                    return fmt.widen(raw, dtype).reshape(rows, width).astype(fmt.numpy_dtype(stored), copy=False)

                yield Piece(field, layer, stored, width, int(d["first_row"]), rows, load)
