"""One segment file, mapped: its blocks, its footer's sums, and what is wrong with it."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.errors import DamagedTrace, TraceNotFound
from moe_trace.file_block import FileBlock, read_header
from moe_trace.files import mapped, open_plain
from moe_trace.statistics import LayerStats, add_groups
from moe_trace.units import count

_BLOCK_MAGIC = int.from_bytes(b"MOEB", "little")


class _Place(NamedTuple):
    """Where a block lies: the arguments of a FileBlock."""

    parts: list[tuple[int, Any]]
    complete: bool = True
    lacking: bool = False


class Segment:
    """A segment, closed or being written. Cheap to open: only its superblock and trailer are read until more is asked
    for.

    Args:
        path: of the file.
        live: whether its writer may still be at work, so that an unfinished end is no problem.

    Raises:
        TraceNotFound, NotATrace, UnsupportedVersion, DamagedTrace: the file cannot be read at all.
    """

    def __init__(self, path: Path, live: bool = False) -> None:
        self.path = path
        self.live = live
        self.problems: list[str] = []
        self._has_footer = False
        try:
            with open_plain(path) as handle:
                self._data = mapped(handle)
        except FileNotFoundError:
            raise TraceNotFound(f"there is no {path}") from None
        except OSError as error:
            raise TraceNotFound(f"{path} cannot be read: {error.strerror or error}") from None
        head = fmt.read_superblock(self._data, str(path))
        self.number = int(head["number"])
        self.run_id = head["run_id"].tobytes().hex()
        self._head = head
        self._footer_at = self._find_footer()
        if self._footer_at is None and path.suffix == ".moe":
            there = f"{count(len(self._snapshot[0]), 'block')} readable, up to byte {self.whole_to:,} of {self.size:,}"
            self._say(f"the end of {path} is damaged or cut off; its blocks were read one by one: {there}")

    @property
    def size(self) -> int:
        """Bytes of the file as it was when it was opened."""
        return len(self._data)

    @property
    def closed(self) -> bool:
        """Whether it ends with a trailer: nothing will be added, and its footer has the sums."""
        return self._footer_at is not None

    def _find_footer(self) -> int | None:
        at = len(self._data) - fmt.TRAILER.itemsize
        if at < fmt.SUPERBLOCK.itemsize:
            return None
        trailer = fmt.struct_at(self._data, at, fmt.TRAILER)
        offset = int(trailer["footer_offset"])
        if (
            trailer["magic"] != b"MOEFOOT1"
            or zlib.crc32(self._data[at : at + 20]) != int(trailer["crc"])
            or int(trailer["file_bytes"]) != len(self._data)
            or offset >= at
        ):
            return None
        with contextlib.suppress(DamagedTrace):
            if int(read_header(self._data, offset)["kind"]) == fmt.FOOTER_BLOCK:
                return offset
        return None

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What ran, as it was known when the segment began."""
        head = self._head
        begin, stored, raw = (int(head[f"metadata_{name}"]) for name in ("offset", "stored", "raw"))
        try:
            if raw > fmt.MOST_METADATA_BYTES or begin + stored > len(self._data):
                raise DamagedTrace("it has an impossible length")
            data = fmt.decode(
                self._data[begin : begin + stored], int(head["metadata_codec"]), raw, int(head["metadata_crc"])
            )
            metadata = fmt.parse_json(bytes(data))
            if not isinstance(metadata, dict):
                raise ValueError("it is no object")
            return metadata
        except (DamagedTrace, ValueError, RecursionError) as error:
            self._say(f"the metadata of {self.path} is damaged: {error}")
            return {}

    def _walk(self) -> tuple[list[_Place], int]:
        """The blocks, and where the last whole one ends."""
        head = self._head
        at = fmt.align(int(head["metadata_offset"]) + int(head["metadata_stored"]))
        end = self._footer_at if self._footer_at is not None else len(self._data)
        blocks: list[_Place] = []
        fragments: list[tuple[int, Any]] = []
        whole_to = min(at, end)
        while at + fmt.BLOCK.itemsize <= end:
            try:
                header = read_header(self._data, at)
            except DamagedTrace:
                resume = self._next_block(at, end)
                if resume is None:
                    break
                self._say_damaged(at, resume)
                at = resume
                continue
            kind = int(header["kind"])
            if kind == fmt.FOOTER_BLOCK:  # a trailer was still to come
                self._has_footer = True
                break
            if fragments and int(fragments[-1][1]["first_step"]) != int(header["first_step"]):
                self._say_cut_off(int(fragments[-1][1]["first_step"]))
                self._cut_off(fragments, blocks)
                fragments = []
            if kind == fmt.FRAGMENT_BLOCK:
                fragments.append((at, header))
            elif kind == fmt.ROWS_BLOCK:
                self._add_rows_block(blocks, fragments, (at, header))
                fragments = []
            at += int(header["block_bytes"])
            whole_to = at
        if self.closed and whole_to < end:
            self._say_damaged(whole_to, end)
        if self.closed and fragments:
            self._say_cut_off(int(fragments[-1][1]["first_step"]))
        self._cut_off(fragments, blocks)  # if it is not closed, the ring may have the rest
        return blocks, whole_to

    def _add_rows_block(self, blocks: list[_Place], fragments: list[tuple[int, Any]], block: tuple[int, Any]) -> None:
        header = block[1]
        if not int(header["steps"]):  # nothing, or it takes its fragments back
            blocks.append(_Place([block]))
        elif int(header["fragments"]) == len(fragments):
            blocks.append(_Place([*fragments, block]))
        else:
            # What is left is read as far as it has no gap. Its sums and its step are those of the block, which is
            # whole.
            step = int(header["first_step"])
            self._say(f"{self.path} lacks a part of step {step}: layers with a gap are left out of it")
            blocks.append(_Place([*fragments, block], lacking=True))

    def _cut_off(self, fragments: list[tuple[int, Any]], blocks: list[_Place]) -> None:
        if fragments and not self.live:
            blocks.append(_Place(list(fragments), complete=False))

    def _next_block(self, at: int, end: int) -> int | None:
        """The next valid block header after damage at `at`, or None."""
        magics = np.frombuffer(self._data[: end - end % fmt.ALIGN], "<u4")[:: fmt.ALIGN // 4]
        for place in np.flatnonzero(magics[at // fmt.ALIGN + 1 :] == _BLOCK_MAGIC):
            search = (int(place) + at // fmt.ALIGN + 1) * fmt.ALIGN
            with contextlib.suppress(DamagedTrace):
                read_header(self._data, search)
                return search
        return None

    def _say_cut_off(self, step: int) -> None:
        self._say(f"step {step} in {self.path} was cut off: its whole layers are kept, as nobody's")

    def _say_damaged(self, start: int, end: int) -> None:
        self._say(f"{self.path} is damaged: the blocks in {end - start:,} bytes at byte {start:,} are lost")

    def _say(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    @property
    def torn_bytes(self) -> int:
        """Bytes behind the last whole block that are no block: a write that a crash cut off."""
        if self.closed:
            return 0
        rest = self._data[self.whole_to :]
        return len(rest) if not self._has_footer and bytes(rest).strip(b"\0") else 0

    @cached_property
    def _snapshot(self) -> tuple[list[_Place], int]:
        """The walk through a segment that is not closed. It is kept: another process may go on with the file, and what
        is read of it has to be of one moment.
        """
        return self._walk()

    def blocks(self, newest_first: bool = False) -> Iterator[FileBlock]:
        """Its blocks of rows, in order. Blocks without rows (losses, notes) are among them. Each is made anew, so that
        what was read of it is freed with it.
        """
        places = self._walk()[0] if self.closed else self._snapshot[0]
        for place in reversed(places) if newest_first else places:
            yield FileBlock(self._data, place.parts, place.complete, path=self.path, lacking=place.lacking)

    @property
    def whole_to(self) -> int:
        """Where its last whole block ends."""
        return self._snapshot[1]

    @cached_property
    def _footer(self) -> FileBlock | None:
        if self._footer_at is None:
            return None
        return FileBlock(self._data, [(self._footer_at, read_header(self._data, self._footer_at))], path=self.path)

    @property
    def index(self) -> npt.NDArray[Any]:
        """Table *index* of the footer; for a segment that is not closed, the same from its blocks."""
        if self._footer is not None:
            with contextlib.suppress(DamagedTrace):
                return self._footer.index_table()
        return np.array([item for block in self.blocks() for item in block.index_items], fmt.TABLES[fmt.INDEX])

    @property
    def losses(self) -> npt.NDArray[Any] | None:
        """Table *losses* as last written: totals since the start of the run. None where no block can tell."""
        for block in [self._footer] if self._footer is not None else self.blocks(newest_first=True):
            try:
                return block.losses
            except DamagedTrace as error:
                self._say(str(error))
        return None

    @cached_property
    def layers(self) -> frozenset[int]:
        """The layers that have rows in it."""
        if self._footer is not None:
            with contextlib.suppress(DamagedTrace):
                return self._footer.counted_layers
        found: set[int] = set()
        for block in self.blocks():
            try:
                whole = block.executed_rows == block.rows
                found.update(() if not block.executed_rows else block.layers if whole else block.counted_layers)
            except DamagedTrace as error:
                self._say(str(error))
        return frozenset(found)

    @property
    def stored_rows(self) -> int:
        """Tokens of its whole steps that it stores."""
        index = self.index
        return int(index["rows"][index["kind"] == fmt.ROWS_BLOCK].sum())

    @property
    def executed_rows(self) -> int:
        """Tokens that its statistics count: more than it stores where they were sampled."""
        if self._footer is not None:
            return self._footer.executed_rows or self.stored_rows
        return sum(block.executed_rows for block in self.blocks() if block.complete)

    def add_statistics(self, into: dict[int, LayerStats], wanted: Callable[[int, int], bool]) -> None:
        """Add the totals of the whole segment: from its footer, or block by block."""
        if self._footer is not None:
            try:
                return add_groups(into, *self._footer.statistics_tables(), wanted)
            except DamagedTrace:
                self._say(f"the footer of {self.path} is damaged; its blocks were read one by one")
        for block in self.blocks():
            block.add_statistics(into, wanted)
        return None

    def __repr__(self) -> str:
        return f"<moe_trace segment {self.path}>"


def segment_paths(directory: Path) -> list[Path]:
    """The segments of a rank's directory in the order of writing, open ones included."""
    found: dict[int, str] = {}
    for name in os.listdir(directory):
        stem = name.removesuffix(".open").removesuffix(".moe")
        if stem.isdigit() and name in (f"{stem}.moe", f"{stem}.moe.open"):
            # Both names at once: the file was renamed between two looks at the directory.
            found[int(stem)] = min(name, found.get(int(stem), name), key=len)
    return [directory / found[number] for number in sorted(found)]


def never_begun(path: Path) -> bool:
    """Whether a segment has no superblock yet: its process is in, or died in, the first moments of it."""
    try:
        with open_plain(path) as handle:
            return not os.pread(handle, 8, 0).strip(b"\0")
    except OSError:
        return False
