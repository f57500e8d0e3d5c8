"""The memory that a worker has scattered captured rows into, mapped copy-on-write: what is in it becomes tensors
without a copy. csrc/capture/capture.h has the layout."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_native import _C
from moe_native.captures.errors import CaptureError
from moe_native.capturing import identity_of

FIELDS = ("ids", "weights", "logits", "hidden")  # the columns of a plot, in their order

_HEAD = np.dtype([("magic", "S8"), ("layers", "<u4"), ("requests", "<u4"), ("spans", "<u4"), ("zero", "<u4")])
_LAYER = np.dtype(
    [
        ("layer", "<u2"), ("ids_dtype", "u1"), ("weights_dtype", "u1"), ("logits_dtype", "u1"), ("hidden_dtype", "u1"),
        ("zero", "<u2"), ("k", "<u4"), ("logits_width", "<u4"), ("hidden_width", "<u4"), ("zero2", "<u4"),
    ]
)  # fmt: skip
_REQUEST = np.dtype([("sample", "<u4"), ("child", "<u4"), ("capacity", "<u4"), ("spans", "<u4")])
_SPAN = np.dtype([("first", "<u4"), ("end", "<u4")])
_NO_PLOT = (1 << 64) - 1
_WIDTHS = {"ids": "k", "weights": "k", "logits": "logits_width", "hidden": "hidden_width"}
# By csrc/core/dtype.h. Two bytes of an id are int16, with which torch can do everything: no model has as many experts
# as would make one negative, and what marks an invalid id, 65535, becomes -1.
_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.float16, 5: torch.bfloat16, 6: torch.float32}

Key = tuple[int, int]  # the caller's number of a sample, and which of its `n`


@dataclass(frozen=True)
class Column:
    """One field of one layer of one request.

    Attributes:
        offset: where it begins in the mapping.
        spans: the positions that have rows, as (first, end), ascending and apart.
    """

    memory: npt.NDArray[np.uint8]
    offset: int
    dtype: torch.dtype
    width: int
    capacity: int
    spans: tuple[tuple[int, int], ...]

    def rows(self, first: int, end: int) -> torch.Tensor:
        """`[end - first, width]`, a view of the mapping."""
        if first == end:
            return torch.zeros((0, self.width), dtype=self.dtype)
        start = self.offset + first * self.width * self.dtype.itemsize
        count = (end - first) * self.width
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=start).view(-1, self.width)


class Memory:
    """A worker's memory for one capture. It holds a lock on it, so that the worker does not use it again.

    Args:
        process, handle: the worker's process id, and its file descriptor.
        identity: of the file, as the worker sees it (`identity_of`).

    Raises:
        OSError: the worker's memory cannot be reached from here.
    """

    def __init__(self, process: int, handle: int, identity: Sequence[int]) -> None:
        self._file = os.open(f"/proc/{process}/fd/{handle}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if identity_of(self._file) != list(identity):
                raise OSError("that process here is another one")
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except BaseException:
            os.close(self._file)
            raise

    def release(self) -> None:
        """The lock goes, unless what was mapped is still in use."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, index_at: int, size: int) -> dict[Key, dict[tuple[str, int], Column]]:
        """What is in the first `size` bytes, whose index begins at `index_at`: columns by field and layer, of each
        sample. The lock lives as long as the columns and the tensors made of them."""
        memory = _C.map_private(self._file, size)
        self.release()  # the mapping has the file as well, and needs no descriptor for it
        index = _Index(memory, index_at)
        return {key: index.columns(number) for number, key in enumerate(index.keys)}


class _Index:
    def __init__(self, memory: npt.NDArray[np.uint8], at: int) -> None:
        self._memory = memory
        head = np.frombuffer(memory, _HEAD, 1, at)[0]
        if head["magic"] != b"MOECAPT1":
            raise CaptureError("this is not the memory of a capture: the worker has another version of moe_native")
        at += _HEAD.itemsize

        def table(dtype: npt.DTypeLike, items: int) -> npt.NDArray[Any]:
            nonlocal at
            rows = np.frombuffer(memory, dtype, items, at).copy() if items else np.zeros(0, dtype)
            at += rows.nbytes
            return rows

        self._layers = table(_LAYER, int(head["layers"]))
        self._requests = table(_REQUEST, int(head["requests"]))
        plots = table("<u8", int(head["requests"]) * int(head["layers"]))
        self._plots = plots.reshape(len(self._requests), len(self._layers))
        self._spans = table(_SPAN, int(head["spans"]))
        self._ends = np.cumsum(self._requests["spans"])
        self.keys: list[Key] = [(int(r["sample"]), int(r["child"])) for r in self._requests]
        # What a row of each column takes, [layers, fields].
        self._row_bytes = (
            np.stack(
                [
                    np.array([_size(code) for code in self._layers[f"{field}_dtype"]], np.int64)
                    * self._layers[_WIDTHS[field]]
                    for field in FIELDS
                ],
                axis=1,
            )
            if len(self._layers)
            else np.zeros((0, len(FIELDS)), np.int64)
        )

    def columns(self, number: int) -> dict[tuple[str, int], Column]:
        """Those of one request, by field and layer."""
        request = self._requests[number]
        capacity = int(request["capacity"])
        end = int(self._ends[number])
        spans = tuple((int(s["first"]), int(s["end"])) for s in self._spans[end - int(request["spans"]) : end])
        sizes = -(-self._row_bytes * capacity // 64) * 64
        starts = np.cumsum(sizes, axis=1) - sizes
        found: dict[tuple[str, int], Column] = {}
        for place, layer in enumerate(self._layers):
            plot = int(self._plots[number, place])
            if plot == _NO_PLOT:
                continue
            for column, field in enumerate(FIELDS):
                code = int(layer[f"{field}_dtype"])
                if code:
                    found[field, int(layer["layer"])] = Column(
                        self._memory,
                        plot + int(starts[place, column]),
                        _DTYPES[code],
                        int(layer[_WIDTHS[field]]),
                        capacity,
                        spans,
                    )
        return found


def _size(code: int) -> int:
    return _DTYPES[int(code)].itemsize if code else 0


def gap(columns: list[Column], rows: int) -> int | None:
    """The first of `rows` positions that none of the workers has; None where they have all."""
    have = 0
    for first, end in sorted(span for column in columns for span in column.spans):
        if first > have:
            break
        have = max(have, end)
    return have if have < rows else None


def disputed(columns: list[Column], rows: int) -> int | None:
    """The first of `rows` positions that several workers have: which of them executed it last is not known."""
    end = 0
    for first, last in sorted(span for column in columns for span in column.spans):
        if first < min(end, rows):
            return first
        end = max(end, last)
    return None


def joined(columns: list[Column], rows: int) -> torch.Tensor:
    """The first `rows` rows of a column without a gap, `[rows, width]`: a view where one worker has them all, else a
    copy of the parts that several have."""
    for column in columns:
        if any(first == 0 and end >= rows for first, end in column.spans):
            return column.rows(0, rows)
    whole = torch.empty((rows, columns[0].width), dtype=columns[0].dtype)
    for column in columns:
        for first, end in column.spans:
            if first < rows:  # drafts may lie behind the last
                whole[first:end] = column.rows(first, min(end, rows))
    return whole
