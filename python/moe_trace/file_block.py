"""A block in a mapped segment file: directory, planes and tables. What it claims is checked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import DTYPES, Block, Piece, check_runs
from moe_trace.errors import DamagedTrace
from moe_trace.statistics import LayerStats, add_groups

Plane = tuple[int, Any]  # offset of its block, and its directory entry
_Method = TypeVar("_Method", bound=Callable[..., Any])


class _NamedDamage(DamagedTrace):
    """Damage whose message says where it is."""


def _named(read: _Method) -> _Method:
    """Errors of a FileBlock's method say which file and which steps they are about."""

    @wraps(read)
    def method(self: FileBlock, *args: Any, **kwargs: Any) -> Any:
        try:
            return read(self, *args, **kwargs)
        except _NamedDamage:
            raise
        except DamagedTrace as error:
            raise self.damage(str(error)) from None

    return cast(_Method, method)


class FileBlock(Block):
    """A block in a mapped segment, with the fragment blocks before it that belong to it.

    Args:
        data: the whole segment.
        parts: offset and header of each fragment, in order, and of the rows block, last.
        complete: False for fragments that no rows block completes.
        path: of the segment, for messages.
        lacking: whether some of its fragments were damaged and are not among the parts.
    """

    def __init__(
        self,
        data: memoryview,
        parts: list[tuple[int, Any]],
        complete: bool = True,
        *,
        path: Path,
        lacking: bool = False,
    ) -> None:
        self._data = data
        self._parts = parts
        self._path = path
        self._in_pieces = lacking or len(parts) > 1 or not complete
        head = parts[-1][1]
        self.first_step, self.last_step = int(head["first_step"]), int(head["last_step"])
        self.first_time_ns, self.last_time_ns = int(head["first_time_ns"]), int(head["last_time_ns"])
        self.rows = int(head["rows"])
        self.executed_rows = int(head["executed"]) or self.rows
        self.number = int(head["number"])
        self.step_count = int(head["steps"])
        self.complete = complete
        self._columns: dict[tuple[int, int], list[list[Plane]] | None] = {}

    def damage(self, what: str) -> DamagedTrace:
        """The error that says of this block what is wrong with it, and what to do."""
        steps = (
            f"steps {self.first_step} to {self.last_step}"
            if self.last_step > self.first_step
            else f"step {self.first_step}"
        )
        return _NamedDamage(
            f"{self._path} is damaged in the block of {steps}, at byte {self.offset:,}: {what}. "
            "The rest can be read: select around it with .steps(first, end)"
        )

    @cached_property
    @_named
    def _directory(self) -> list[tuple[int, npt.NDArray[Any]]]:
        return [(offset, read_directory(self._data, offset, head)) for offset, head in self._parts]

    def _pieces(self, field: int, layer: int) -> list[list[Plane]]:
        """The planes of a column, those of the same rows together; by row, then byte. Raises DamagedTrace where they
        do not fit.
        """
        planes = [
            (offset, entry)
            for offset, entries in self._directory
            for entry in entries[(entries["field"] == field) & (entries["layer"] == layer)]
        ]
        planes.sort(key=lambda plane: (int(plane[1]["first_row"]), int(plane[1]["byte"])))
        if not planes:
            return []
        dtype, width = int(planes[0][1]["dtype"]), int(planes[0][1]["width"])
        if dtype not in DTYPES[field] or width == 0:
            raise DamagedTrace(f"a column has the impossible dtype {dtype} or width {width}")
        item = fmt.ITEM_BYTES[dtype]
        groups = [planes[at : at + item] for at in range(0, len(planes), item)]
        for group in groups:
            first = group[0][1]
            for byte, (_, entry) in enumerate(group):
                if (int(entry["dtype"]), int(entry["width"]), int(entry["rows"])) != (dtype, width, int(first["rows"])):
                    raise DamagedTrace("the planes of a column do not fit together")
                if (int(entry["byte"]), int(entry["first_row"])) != (byte, int(first["first_row"])):
                    raise DamagedTrace("a plane of a column is missing")
                if int(entry["raw"]) != int(entry["rows"]) * width:
                    raise DamagedTrace("a plane has the wrong length")
            if len(group) != item:
                raise DamagedTrace("a plane of a column is missing")
        return groups

    @_named
    def _column(self, field: int, layer: int) -> list[list[Plane]] | None:
        """The pieces of a column that has all rows of the block; None where there is no such column, or it has a
        gap.
        """
        key = field, layer
        if key not in self._columns:
            groups = self._pieces(field, layer)
            next_row = 0
            for group in groups:
                if int(group[0][1]["first_row"]) != next_row:
                    next_row = -1
                    break
                next_row += int(group[0][1]["rows"])
            if groups and next_row != self.rows and not self._in_pieces:
                raise DamagedTrace("a column has not as many rows as its block")
            self._columns[key] = groups if groups and next_row == self.rows else None
        return self._columns[key]

    @cached_property
    @_named
    def layers(self) -> tuple[int, ...]:
        found = {
            layer for _, entries in self._directory for layer in entries["layer"][entries["field"] == fmt.IDS].tolist()
        }
        if self._in_pieces:
            # A layer counts only if all of its fields have all rows.
            found = {layer for layer in found if all(self._column(field, layer) for field in self._fields(layer))}
        return tuple(sorted(found))

    def _fields(self, layer: int) -> set[int]:
        """The fields that a layer has planes of, whether they have all rows or not."""
        return {
            field
            for _, entries in self._directory
            for field in entries["field"][entries["layer"] == layer].tolist()
            if field in fmt.FIELD_NAMES
        }

    def has(self, field: int, layer: int) -> bool:
        if field == fmt.TOKENS:
            return self._column(field, layer) is not None
        return layer in self.layers and field in self._fields(layer)

    @property
    def columns(self) -> dict[tuple[int, int], tuple[int, int]]:
        keys = [(field, layer) for layer in self.layers for field in sorted(self._fields(layer))]
        if self.has(fmt.TOKENS, fmt.NO_LAYER):
            keys.append((fmt.TOKENS, fmt.NO_LAYER))
        return {key: self.shape(*key) for key in keys}

    def shape(self, field: int, layer: int) -> tuple[int, int]:
        """dtype code and width of a column."""
        groups = self._column(field, layer)
        if groups is None:
            raise KeyError((field, layer))
        return int(groups[0][0][1]["dtype"]), int(groups[0][0][1]["width"])

    @_named
    def column(self, field: int, layer: int) -> npt.NDArray[Any]:
        width = self.shape(field, layer)[1]
        if field == fmt.WEIGHTS and width != self.shape(fmt.IDS, layer)[1]:
            raise DamagedTrace("the weights of a layer have not the shape of its ids")
        parts = [self._load(group) for group in self._column(field, layer) or ()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @_named
    def _load(self, group: list[Plane]) -> npt.NDArray[Any]:
        dtype, width, rows = (int(group[0][1][name]) for name in ("dtype", "width", "rows"))
        return fmt.join_planes([self._stored(*plane) for plane in group], dtype, rows, width)

    @_named
    def pieces(self) -> list[Piece]:
        """All pieces of columns, whether they add up to all rows or not."""
        found = []
        keys = {
            (field, layer)
            for _, entries in self._directory
            for field, layer in zip(entries["field"].tolist(), entries["layer"].tolist(), strict=True)
            if field in fmt.FIELD_NAMES
        }
        for field, layer in sorted(keys):
            for group in self._pieces(field, layer):
                dtype, width, first_row, rows = (
                    int(group[0][1][name]) for name in ("dtype", "width", "first_row", "rows")
                )
                found.append(Piece(field, layer, dtype, width, first_row, rows, partial(self._load, group)))
        return found

    def _stored(self, offset: int, entry: Any) -> fmt.Bytes:
        begin = offset + int(entry["offset"])
        stored = self._data[begin : begin + int(entry["stored"])]
        return fmt.decode(stored, int(entry["codec"]), int(entry["raw"]), int(entry["crc"]))

    def _entry(self, field: int, part: int = -1) -> Plane | None:
        offset, entries = self._directory[part]
        match = entries[entries["field"] == field]
        if len(match) > 1:
            raise DamagedTrace("a block has a table twice")
        return (offset, match[0]) if len(match) else None

    @_named
    def _table(self, field: int, part: int = -1) -> npt.NDArray[Any]:
        found = self._entry(field, part)
        if found is None:
            return np.zeros(0, fmt.TABLES[field])
        return fmt.decode_table(self._stored(*found), field, int(found[1]["rows"]))

    @cached_property
    @_named
    def steps(self) -> npt.NDArray[Any]:
        if not self.complete:
            step = (self.first_step, self.first_time_ns, self.rows, 1, 0)
            return np.array([step], fmt.TABLES[fmt.STEPS])
        steps = self._table(fmt.STEPS)
        if int(steps["rows"].sum(dtype=np.uint64)) != self.rows or len(steps) != int(self._parts[-1][1]["steps"]):
            raise DamagedTrace("the steps of a block do not add up to its rows")
        return steps

    @cached_property
    @_named
    def runs(self) -> npt.NDArray[Any]:
        if not self.complete:
            return np.array([(fmt.NOBODY, fmt.NOBODY, self.rows, 0, 0)], fmt.TABLES[fmt.RUNS])
        runs = self._table(fmt.RUNS)
        check_runs(self.steps, runs)
        return runs

    @cached_property
    @_named
    def notes(self) -> list[dict[str, Any]]:
        found = self._entry(fmt.NOTES)
        if found is None or not self.complete:
            return []
        try:
            lines = [fmt.parse_json(line) for line in bytes(self._stored(*found)).splitlines()]
        except (ValueError, RecursionError) as error:
            raise DamagedTrace(f"its notes are no JSON ({error})") from None
        return [line for line in lines if isinstance(line, dict)]

    @property
    def lanes(self) -> npt.NDArray[Any]:
        """Table *lanes* of every part."""
        return np.concatenate([self._table(fmt.LANES, part) for part in range(len(self._parts))])

    def statistics_tables(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Tables *stat_groups* and *stat_counts*."""
        return self._table(fmt.STAT_GROUPS), self._table(fmt.STAT_COUNTS)

    @property
    def counted_layers(self) -> frozenset[int]:
        if not self.complete:
            return frozenset(self.layers)
        groups = self._table(fmt.STAT_GROUPS)
        return frozenset(groups["layer"][groups["rows"] > 0].tolist())

    @property
    def offset(self) -> int:
        """Where its first part starts in the segment."""
        return self._parts[0][0]

    @property
    def fragments(self) -> int:
        """How many fragment blocks belong to it."""
        return len(self._parts) - int(self.complete)

    @property
    def index_items(self) -> list[tuple[int, ...]]:
        """Its items of table *index*: one a part."""
        names = ("block_bytes", "kind", "steps", "rows", "first_step", "last_step", "first_time_ns", "last_time_ns")
        return [(offset, *(int(head[name]) for name in names)) for offset, head in self._parts]

    def index_table(self) -> npt.NDArray[Any]:
        """Table *index*, where this is a footer."""
        return self._table(fmt.INDEX)

    @property
    def losses(self) -> npt.NDArray[Any]:
        """Table *losses*: totals since the start of the run."""
        return self._table(fmt.LOSSES)

    @_named
    def add_statistics(self, into: dict[int, LayerStats], wanted: Callable[[int, int], bool]) -> None:
        if self.complete:
            return add_groups(into, *self.statistics_tables(), wanted)
        for layer in self.layers:
            if wanted(layer, 0):
                weights = self.column(fmt.WEIGHTS, layer) if self.has(fmt.WEIGHTS, layer) else None
                into.setdefault(layer, LayerStats()).add_rows(self.column(fmt.IDS, layer), weights)
        return None


def read_header(data: memoryview, offset: int) -> Any:
    """The block header at `offset`, checked against the file. Raises DamagedTrace."""
    head = fmt.struct_at(data, offset, fmt.BLOCK)
    if head["magic"] != b"MOEB" or not fmt.crc_holds(data, offset, head):
        raise DamagedTrace("a block header is damaged")
    size = int(head["block_bytes"])
    body = int(head["header_size"]) + int(head["directory_stored"])
    if size % fmt.ALIGN or size < fmt.BLOCK.itemsize or size > fmt.MOST_BLOCK_BYTES or offset + size > len(data):
        raise DamagedTrace("a block has an impossible length")
    if int(head["header_size"]) < fmt.BLOCK.itemsize or body > size or int(head["entries"]) > fmt.MOST_ENTRIES:
        raise DamagedTrace("a block has an impossible directory")
    return head


def read_directory(data: memoryview, offset: int, head: Any) -> npt.NDArray[Any]:
    """The directory of a block as an array of ENTRY. Raises DamagedTrace."""
    entries = int(head["entries"])
    if int(head["directory_raw"]) != entries * fmt.ENTRY.itemsize:
        raise DamagedTrace("a directory has the wrong length")
    begin = offset + int(head["header_size"])
    stored = data[begin : begin + int(head["directory_stored"])]
    raw = fmt.decode(stored, int(head["directory_codec"]), int(head["directory_raw"]), int(head["directory_crc"]))
    directory = np.frombuffer(raw, fmt.ENTRY, entries)
    size = int(head["block_bytes"])
    # One after the other: the sum of two hostile 64-bit numbers could wrap.
    if np.any(directory["offset"] > size) or np.any(directory["stored"] > size - directory["offset"]):
        raise DamagedTrace("an entry lies outside its block")
    column = (directory["field"] >= fmt.IDS) & (directory["field"] <= fmt.TOKENS)
    of_layer = column & (directory["field"] != fmt.TOKENS)
    if np.any((directory["layer"] == fmt.NO_LAYER)[of_layer]) or np.any(
        (directory["layer"] != fmt.NO_LAYER)[column & ~of_layer]
    ):
        raise DamagedTrace("a column belongs to an impossible layer")
    return directory
