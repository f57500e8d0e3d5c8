"""A reader of damaged bytes says so, or returns what is whole: it never crashes, hangs, allocates by what they say,
or is wrong.
"""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_trace

META = {"layers": sb.ledger(layers=(0,), k=2, experts=9)}
STEPS, NOTES = sb.make_steps([3, 4, 2], layers=(0,), k=2, experts=9, tokens=True)
BLOCKS = [sb.rows_block([step], i, notes=NOTES, losses=[]) for i, step in enumerate(STEPS)]
WHOLE = sb.segment(BLOCKS, META)
OPEN = sb.segment(BLOCKS, META, closed=False)
EXPECTED = {step.number: step for step in STEPS}


def everything(trace, counted=True):
    """Reads all there is to read. Returns what one question after the other gave, or the error it raised."""
    found = {}
    questions = {
        "ids": lambda: trace.layer(0).ids,
        "weights": lambda: trace.layer(0).weights,
        "tokens": lambda: trace.tokens,
        "positions": lambda: trace.positions,
        "request_ids": lambda: trace.request_ids,
        "step_numbers": lambda: trace.step_numbers,
        "rows": lambda: trace.rows,
        "stats": lambda: trace.stats(),
        "part": lambda: trace.layer(0).prefill().counts(),
        "times": lambda: (trace.first_time, trace.last_time),
        "layers": lambda: trace.layers,
        "coverage": lambda: trace.coverage,
        "losses": lambda: trace.losses,
        "requests": lambda: trace.requests,
        "metadata": lambda: trace.metadata,
        "repr": lambda: repr(trace),
        "problems": lambda: trace.problems,
        "complete": lambda: trace.complete,
    }
    for name, question in questions.items():
        try:
            found[name] = question()
        except moe_trace.TraceError as error:
            assert str(error)
            found[name] = error
    return found


def verify(path):
    """Nothing that is returned as data differs from what was written, and what is missing is said. Returns whether
    all is there.
    """
    try:
        trace = moe_trace.open(path)
    except moe_trace.TraceError as error:
        assert str(path) in str(error)
        return False
    found = everything(trace)
    said = bool(found["problems"]) or any(isinstance(value, moe_trace.TraceError) for value in found.values())
    numbers = found["step_numbers"]
    if isinstance(numbers, moe_trace.TraceError):
        return False
    kept = [EXPECTED[number] for number in dict.fromkeys(numbers.tolist())]
    assert numbers.tolist() == [step.number for step in kept for _ in range(step.rows)]
    assert said or len(kept) == len(STEPS), "a step is missing and nobody says so"
    for name, expected in (
        ("ids", [step.layers[0]["ids"] for step in kept]),
        ("weights", [step.layers[0]["weights"] for step in kept]),
        ("tokens", [step.tokens for step in kept]),
        ("positions", [sb.per_row([step], "position") for step in kept]),
        ("request_ids", [np.array(["a", "b"], object)[sb.per_row([step], "request")] for step in kept]),
    ):
        if not isinstance(found[name], moe_trace.TraceError) and kept:
            right = np.array_equal(found[name], np.concatenate(expected))
            # Names come from notes: where those are damaged, that is said, and the rows are known by their index.
            assert right or (name == "request_ids" and said), name
    if not isinstance(found["stats"], moe_trace.TraceError) and len(kept) == len(STEPS):
        assert np.array_equal(found["stats"][0].counts, np.bincount(sb.of_rows(STEPS, 0).ravel(), minlength=9))
    return not said


@pytest.mark.parametrize("data", [WHOLE, OPEN], ids=["closed", "open"])
def test_every_byte_flipped(tmp_path, data):
    path = tmp_path / "000000.moe"
    unnoticed = []
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= (0x01, 0x80, 0xFF)[at % 3]
        path.write_bytes(damaged)
        if verify(path):
            unnoticed.append(at)
    assert [at for at in unnoticed if at not in not_read(data)] == []


def not_read(data):
    """Padding, and tables that a closed segment can do without: of blocks, those whose sums the footer has, and of
    the footer, the index.
    """
    used = set()
    stored = struct.unpack_from("<I", data, 80)[0]
    used |= set(range(128 + stored))
    at = (128 + stored + 63) // 64 * 64
    while at + 128 <= len(data) and data[at : at + 4] == b"MOEB":
        entries, size = struct.unpack_from("<IQ", data, at + 12)
        directory = struct.unpack_from("<I", data, at + 72)[0]
        used |= set(range(at, at + 128 + directory))
        for i in range(entries):
            offset, length = struct.unpack_from("<QQ", data, at + 128 + 48 * i + 24)
            summed = (
                (sb.STAT_GROUPS, sb.STAT_COUNTS, sb.LANES, sb.LOSSES) if data[at + 8] == 1 else (sb.INDEX, sb.LANES)
            )
            if data[at + 128 + 48 * i] not in summed:
                used |= set(range(at + offset, at + offset + length))
        at += size
    used |= set(range(at, len(data)))
    return set(range(len(data))) - used


@pytest.mark.parametrize("data", [WHOLE, OPEN], ids=["closed", "open"])
def test_every_cut(tmp_path, data):
    path = tmp_path / "000000.moe"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if verify(path):
            pytest.fail(f"nobody noticed that {len(data) - length} bytes are missing")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ranges_overwritten_or_removed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("d") / "000000.moe"
    damaged = bytearray(data.draw(st.sampled_from([WHOLE, OPEN])))
    at = data.draw(st.integers(0, len(damaged) - 1))
    length = data.draw(st.integers(1, 400))
    kind = data.draw(st.sampled_from(["zero", "noise", "removed", "twice"]))
    piece = bytes(damaged[at : at + length])
    new = {
        "zero": bytes(len(piece)),
        "noise": np.random.default_rng(at).bytes(len(piece)),
        "removed": b"",
        "twice": piece + piece,
    }[kind]
    damaged[at : at + length] = new
    path.write_bytes(damaged)
    verify(path)


def resealed(data, at, form, value, crc_of):
    """A lie with a valid checksum: `value` at `at`, the crc over crc_of (start, end, where) made anew."""
    damaged = bytearray(data)
    struct.pack_into(form, damaged, at, value)
    start, end, where = crc_of
    struct.pack_into("<I", damaged, where, zlib.crc32(damaged[start:end]))
    return bytes(damaged)


FIRST = len(sb.superblock(META))  # the first block
LIES = [
    *(
        (offset, form, value, (0, 124, 124))
        for offset, form in ((72, "<Q"), (80, "<I"), (84, "<I"))
        for value in (0xFFFFFFFF, 0, 1 << 20)
    ),
    *(
        (FIRST + offset, form, value, (FIRST, FIRST + 124, FIRST + 124))
        for offset, form in (
            (4, "<I"),
            (12, "<I"),
            (16, "<Q"),
            (52, "<I"),
            (72, "<I"),
            (76, "<I"),
            (84, "<I"),
            (48, "<I"),
        )
        for value in (0xFFFFFFFF, 0, 64, 0x7FFFFFC0)
    ),
    (FIRST + 16, "<Q", (1 << 64) - 64, (FIRST, FIRST + 124, FIRST + 124)),
    (len(WHOLE) - 32, "<Q", (1 << 64) - 64, (len(WHOLE) - 32, len(WHOLE) - 12, len(WHOLE) - 12)),
    (len(WHOLE) - 32, "<Q", 0, (len(WHOLE) - 32, len(WHOLE) - 12, len(WHOLE) - 12)),
    (len(WHOLE) - 32, "<Q", FIRST, (len(WHOLE) - 32, len(WHOLE) - 12, len(WHOLE) - 12)),
    (len(WHOLE) - 24, "<Q", 1 << 62, (len(WHOLE) - 32, len(WHOLE) - 12, len(WHOLE) - 12)),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: f"{lie[0]}={lie[2]:#x}")
def test_lies_with_valid_checksums(tmp_path, lie):
    path = tmp_path / "000000.moe"
    path.write_bytes(resealed(WHOLE, *lie))
    tracemalloc.start()
    try:
        with contextlib.suppress(moe_trace.TraceError):
            everything(moe_trace.open(path))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20, "allocated what a length said"
    finally:
        tracemalloc.stop()


def hostile_entries():
    """Blocks whose directories are valid and say what cannot be."""
    for change in (
        {"offset": 1 << 63}, {"offset": (1 << 64) - 1, "stored": 8}, {"stored": 1 << 62}, {"raw": 1 << 62},
        {"raw": 1 << 30}, {"rows": 0xFFFFFFFF}, {"rows": 0}, {"rows": 4}, {"width": 0xFFFFFFFF}, {"width": 0},
        {"dtype": 9}, {"dtype": 0}, {"dtype": 6}, {"dtype": 4},
        {"byte": 7}, {"codec": 2}, {"layer": 65535}, {"first_row": 0xFFFFFFFF}, {"first_row": 1},
    ):  # fmt: skip
        for field in (
            sb.IDS,
            sb.WEIGHTS,
            sb.TOKENS,
            sb.STEPS,
            sb.RUNS,
            sb.NOTES,
            sb.STAT_GROUPS,
            sb.STAT_COUNTS,
            sb.LANES,
            sb.LOSSES,
            sb.INDEX,
        ):
            yield field, change


@pytest.mark.parametrize(("field", "change"), list(hostile_entries()), ids=str)
def test_hostile_directories(tmp_path, field, change):
    names = (
        "field",
        "dtype",
        "byte",
        "codec",
        "layer",
        "reserved",
        "width",
        "first_row",
        "rows",
        "crc",
        "offset",
        "stored",
        "raw",
    )
    data = bytearray(WHOLE)
    at, hit = FIRST, False
    while data[at : at + 4] == b"MOEB":
        entries, size = struct.unpack_from("<IQ", data, at + 12)
        for i in range(entries):
            place = at + 128 + 48 * i
            entry = dict(zip(names, struct.unpack_from("<BBBBHHIIIIQQQ", data, place), strict=True))
            if entry["field"] == field:
                hit = True
                struct.pack_into("<BBBBHHIIIIQQQ", data, place, *{**entry, **change}.values())
        struct.pack_into("<I", data, at + 80, zlib.crc32(data[at + 128 : at + 128 + 48 * entries]))
        struct.pack_into("<I", data, at + 124, zlib.crc32(data[at : at + 124]))
        at += size
    assert hit
    path = tmp_path / "000000.moe"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        found = everything(moe_trace.open(path))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20, "allocated what a length said"
    except moe_trace.TraceError:
        return
    finally:
        tracemalloc.stop()
    # What is returned fits together: no question is answered by a part of its rows.
    lengths = {
        len(found[name]) for name in ("ids", "weights", "tokens", "positions") if isinstance(found[name], np.ndarray)
    }
    assert len(lengths) <= 1 or found["problems"]


def test_a_bomb(tmp_path):
    """A small frame that says it is small and unpacks to gigabytes."""
    import zstandard

    bomb = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(512 << 20))
    steps, _ = sb.make_steps([4], layers=(0,), k=2, experts=9)
    block = sb.rows_block(steps)
    for entry in block.entries:
        if entry.head[0] == sb.IDS:
            entry.stored, entry.head[3] = bomb, 1
    path = tmp_path / "000000.moe"
    path.write_bytes(sb.segment([block], META))
    trace = moe_trace.open(path)
    tracemalloc.start()
    with pytest.raises(moe_trace.DamagedTrace):
        _ = trace.layer(0).ids
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_many_false_magics_do_not_hang(tmp_path):
    """After damage every multiple of 64 may look like a block."""
    data = OPEN[: FIRST + 1] + b"x" * 63 + (b"MOEB" + bytes(60)) * 20_000
    path = tmp_path / "000000.moe.open"
    path.write_bytes(data)
    found = everything(moe_trace.open(path))
    assert found["rows"] == 0 and found["problems"]


def test_tables_that_do_not_fit_together(tmp_path):
    """Valid checksums everywhere, but the tables contradict each other."""
    for wrong in ("run counts", "run numbers", "step rows", "steps missing", "groups"):
        block = sb.rows_block(STEPS[:1], notes=NOTES)
        step = STEPS[0]
        for i, entry in enumerate(block.entries):
            if entry.head[0] == sb.RUNS and wrong == "run counts":
                block.entries[i] = sb.table(sb.RUNS, [(0, 0, 0xFFFFFFFF, 69, 0)], "IIIHH")
            if entry.head[0] == sb.STEPS and wrong == "run numbers":
                block.entries[i] = sb.table(sb.STEPS, [(0, step.time_ns, step.rows, 0xFFFFFFFF, 0)], "QqIII")
            if entry.head[0] == sb.STEPS and wrong == "step rows":
                block.entries[i] = sb.table(sb.STEPS, [(0, step.time_ns, 0xFFFFFFFF, len(step.runs), 0)], "QqIII")
            if entry.head[0] == sb.STEPS and wrong == "steps missing":
                block.entries[i] = sb.entry(99, b"")
            if entry.head[0] == sb.STAT_GROUPS and wrong == "groups":
                block.entries[i] = sb.table(sb.STAT_GROUPS, [(0, 69, 2, 0xFFFFFFFF, 3, 0)], "HHHIQQ")
        path = tmp_path / f"{wrong.replace(' ', '')}.moe"
        path.write_bytes(sb.segment([block], META, closed=False))
        found = everything(moe_trace.open(path))
        assert any(isinstance(value, moe_trace.TraceError) for value in found.values()) or found["problems"], wrong
