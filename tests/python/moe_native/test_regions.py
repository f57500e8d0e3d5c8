"""The memory of a capture, made here as csrc/capture/capture.h lays it out: what it becomes, and for how long it is
locked."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from moe_native.captures.errors import CaptureError
from moe_native.captures.regions import Column, Memory, disputed, gap, joined
from moe_native.capturing import identity_of

U8, U16, F16, BF16, F32 = 1, 2, 4, 5, 6  # csrc/core/dtype.h
NOWHERE = (1 << 64) - 1
LENGTH = 4096
INDEX = 3072


def index(layers: list[tuple[int, ...]], requests: list[tuple[int, ...]], plots: list[int], spans: list[Any]) -> bytes:
    """layers: layer, dtypes of ids, weights, logits, hidden, k, widths of logits, hidden; requests: sample, child,
    capacity, number of spans."""
    packed = [struct.pack("<8sIIII", b"MOECAPT1", len(layers), len(requests), len(spans), 0)]
    for layer, ids, weights, logits, hidden, k, logits_width, hidden_width in layers:
        packed.append(
            struct.pack("<HBBBBHIIII", layer, ids, weights, logits, hidden, 0, k, logits_width, hidden_width, 0)
        )
    packed += [struct.pack("<4I", *request) for request in requests]
    packed += [struct.pack("<Q", plot) for plot in plots]
    packed += [struct.pack("<2I", *span) for span in spans]
    return b"".join(packed)


class File:
    """A worker's file without a name, which is this process's."""

    def __init__(self) -> None:
        self.handle = os.memfd_create("capture")
        os.ftruncate(self.handle, LENGTH)

    def put(self, at: int, what: torch.Tensor | bytes) -> None:
        raw = what if isinstance(what, bytes) else what.contiguous().view(torch.uint8).numpy().tobytes()
        os.pwrite(self.handle, raw, at)

    def open(self) -> Memory:
        return Memory(os.getpid(), self.handle, identity_of(self.handle))

    def read(self) -> dict[Any, Any]:
        return self.open().read(INDEX, LENGTH)

    @property
    def locked(self) -> bool:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.handle, fcntl.LOCK_UN)
        return False


@pytest.fixture
def file() -> Iterator[File]:
    made = File()
    yield made
    os.close(made.handle)


@pytest.fixture
def one_layer(file: File) -> File:
    """Four rows of ids at 64."""
    file.put(64, torch.arange(8, dtype=torch.uint8))
    file.put(INDEX, index([(3, U8, 0, 0, 0, 2, 0, 0)], [(0, 0, 4, 1)], [64], [(0, 4)]))
    return file


def test_columns_are_where_the_index_says(file: File) -> None:
    capacity = 9
    # Layer 7 has all columns: 9 rows of 3 ids take 54 bytes, 3 weights 108, 5 logits 90, each up to the next 64.
    ids = torch.randint(0, 300, (capacity, 3), dtype=torch.int16)
    ids[2, 1] = -1
    weights, logits = torch.randn(capacity, 3), torch.randn(capacity, 5).bfloat16()
    hidden = torch.randn(capacity, 4).half()
    for at, column in ((128, ids), (192, weights), (320, logits), (448, hidden)):
        file.put(at, column)
    # Of layer 2 the other request has ids and logits; neither has the other's plot.
    few, wide = torch.randint(0, 255, (2, 1), dtype=torch.uint8), torch.randn(2, 2)
    file.put(1024, few)
    file.put(1088, wide)
    layers = [(7, U16, F32, BF16, F16, 3, 5, 4), (2, U8, 0, F32, 0, 1, 2, 0)]
    requests, plots = [(5, 0, capacity, 2), (5, 1, 2, 0), (0, 0, 2, 1)], [128, NOWHERE, NOWHERE, NOWHERE, NOWHERE, 1024]
    file.put(INDEX, index(layers, requests, plots, [(0, 4), (6, 9), (1, 2)]))
    found = file.read()
    assert set(found) == {(5, 0), (5, 1), (0, 0)} and found[5, 1] == {}
    whole, other = found[5, 0], found[0, 0]
    assert set(whole) == {(field, 7) for field in ("ids", "weights", "logits", "hidden")}
    for field, expected in (("ids", ids), ("weights", weights), ("logits", logits), ("hidden", hidden)):
        column = whole[field, 7]
        assert column.spans == ((0, 4), (6, 9)) and column.capacity == capacity
        assert torch.equal(column.rows(0, capacity), expected) and column.dtype == expected.dtype
        assert torch.equal(column.rows(6, 8), expected[6:8])
        assert column.rows(4, 4).shape == (0, expected.shape[1]) and column.rows(4, 4).dtype == expected.dtype
    assert set(other) == {("ids", 2), ("logits", 2)} and other["ids", 2].spans == ((1, 2),)
    assert torch.equal(other["ids", 2].rows(0, 2), few) and torch.equal(other["logits", 2].rows(0, 2), wide)


def test_an_index_of_nothing(file: File) -> None:
    file.put(INDEX, index([], [], [], []))
    assert file.read() == {}
    file.put(INDEX, index([], [(4, 0, 10, 0)], [], []))  # a request that was never executed
    assert file.read() == {(4, 0): {}}


def test_another_version_is_told(file: File) -> None:
    file.put(INDEX, b"MOECAPT2" + bytes(16))
    with pytest.raises(CaptureError, match="another version of moe_native"):
        file.read()
    assert not file.locked


def test_tensors_are_views_and_copy_what_is_written_to(one_layer: File) -> None:
    column, other = (one_layer.read()[0, 0]["ids", 3] for _ in range(2))
    one, same = column.rows(0, 4), column.rows(1, 3)
    assert one.data_ptr() + 2 == same.data_ptr()
    one[1] = 200
    assert same[0].tolist() == [200, 200]
    assert other.rows(0, 4).flatten().tolist() == list(range(8))
    assert os.pread(one_layer.handle, 8, 64) == bytes(range(8))


def test_the_lock_lives_as_long_as_what_was_mapped(one_layer: File) -> None:
    assert not one_layer.locked
    memory = one_layer.open()
    assert one_layer.locked
    found = memory.read(INDEX, LENGTH)
    memory.release()
    del memory
    assert one_layer.locked
    rows = found[0, 0]["ids", 3].rows(1, 2)
    del found
    assert one_layer.locked
    part = rows[:, :1]
    del rows
    assert one_layer.locked and part.tolist() == [[2]]
    del part
    assert not one_layer.locked


def test_memory_that_is_not_read_is_released(one_layer: File) -> None:
    first, second = one_layer.open(), one_layer.open()
    first.release()
    first.release()
    assert one_layer.locked
    second.release()
    assert not one_layer.locked
    third = one_layer.open()
    third.read(INDEX, LENGTH)
    assert not one_layer.locked  # what was read is gone already
    del third


def test_memory_that_cannot_be_reached(file: File) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for process, handle in ((child.pid, 3), (os.getpid(), 1 << 20)):
        with pytest.raises(FileNotFoundError):
            Memory(process, handle, [0, 0])
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    with pytest.raises(OSError):
        Memory(os.getpid(), reader, [0, 0])


def test_memory_of_another_process_of_that_number_is_not_touched(file: File) -> None:
    other = File()
    with pytest.raises(OSError, match="another one"):
        Memory(os.getpid(), other.handle, identity_of(file.handle))
    assert not other.locked
    os.close(other.handle)


def test_what_was_mapped_takes_no_descriptor(one_layer: File) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = [one_layer.read()[0, 0]["ids", 3].rows(0, 4) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and one_layer.locked
    assert all(rows.flatten().tolist() == list(range(8)) for rows in kept)


def test_an_index_that_would_lie_behind_the_file_is_an_error(one_layer: File) -> None:
    with pytest.raises(ValueError, match="shorter"):
        one_layer.open().read(INDEX, LENGTH + 1)


# Rows that several workers have.


def column(width: int, *spans: tuple[int, int], base: int = 0) -> Column:
    """Row `p` is `base + p`, as often as it is wide. It has room for 20."""
    rows = torch.arange(base, base + 20, dtype=torch.float32).repeat_interleave(width)
    return Column(rows.numpy().view(np.uint8), 0, torch.float32, width, 20, tuple(spans))


@pytest.mark.parametrize(
    ("spans", "rows", "missing"),
    [
        ([[(0, 5)]], 5, None),
        ([[(0, 9)]], 5, None),
        ([[(0, 4)]], 5, 4),
        ([[(1, 5)]], 5, 0),
        ([[]], 5, 0),
        ([[]], 0, None),
        ([[(0, 2), (3, 5)]], 5, 2),
        ([[(0, 2), (3, 5)], [(2, 3)]], 5, None),
        ([[(3, 5)], [(0, 3)]], 5, None),
        ([[(0, 5)], [(1, 2)]], 6, 5),
        ([[(0, 2), (6, 9)], [(2, 4)]], 9, 4),
        ([[(0, 4)], [(2, 6)], [(5, 8)]], 8, None),
    ],
)
def test_the_first_row_that_nobody_has(spans: list[Any], rows: int, missing: int | None) -> None:
    assert gap([column(1, *each) for each in spans], rows) == missing


@pytest.mark.parametrize(
    ("spans", "rows", "first"),
    [
        ([[(0, 5)]], 5, None),
        ([[(0, 2), (3, 5)], [(2, 3)]], 5, None),
        ([[(0, 5)], [(1, 2)]], 6, 1),
        ([[(0, 4)], [(2, 6)], [(6, 8)]], 8, 2),
        ([[(0, 4)], [(4, 9)], [(6, 8)]], 6, None),  # drafts behind the last
        ([[(0, 4)], [(4, 9)], [(6, 8)]], 7, 6),
    ],
)
def test_positions_that_several_workers_have(spans: list[Any], rows: int, first: int | None) -> None:
    assert disputed([column(1, *each) for each in spans], rows) == first


def test_rows_of_one_worker_are_not_copied() -> None:
    parts = [column(2, (0, 3), base=100), column(2, (0, 8))]
    whole = joined(parts, 6)
    assert whole.data_ptr() == parts[1].rows(0, 1).data_ptr()
    assert whole.tolist() == [[p, p] for p in range(6)]


def test_rows_of_several_workers_are_put_together() -> None:
    parts = [column(2, (0, 3), (5, 6), base=100), column(2, (3, 5), (6, 9))]
    assert joined(parts, 8)[:, 1].tolist() == [100, 101, 102, 3, 4, 105, 6, 7]


@pytest.mark.parametrize("beyond", [(6, 7), (7, 9)])
def test_rows_behind_the_last_are_left_out(beyond: tuple[int, int]) -> None:
    """Drafts, and what asynchronous scheduling executes behind the end."""
    parts = [column(2, (0, 3), base=100), column(2, (3, 6), beyond)]
    assert joined(parts, 6)[:, 0].tolist() == [100, 101, 102, 3, 4, 5]


def test_no_rows() -> None:
    assert joined([column(3, (0, 3)), column(3)], 0).shape == (0, 3)
    assert joined([column(3), column(3)], 0).shape == (0, 3)
