"""The writer in Python: what it writes reads back, and follows the tables of csrc/FORMAT.md."""

from __future__ import annotations

import stat
import struct
import zlib

import numpy as np
import pytest
import segment_bytes as sb
from test_trace import META

import moe_trace
from moe_trace import format as fmt
from moe_trace.segment import Segment
from moe_trace.writer import SegmentWriter

STEPS, NOTES = sb.make_steps([5, 3, 8], tokens=True, logits=True)


def tables(steps):
    rows = [(s.number, s.time_ns, s.rows, len(s.runs), 0) for s in steps]
    return np.array(rows, fmt.TABLES[fmt.STEPS]), np.array([run for s in steps for run in s.runs], fmt.TABLES[fmt.RUNS])


def columns(steps):
    found = {
        (sb.FIELDS[name], layer): sb.of_rows(steps, layer, name)
        for layer in (0, 3)
        for name in ("ids", "weights", "logits")
    }
    return found | {(sb.TOKENS, 65535): np.concatenate([s.tokens for s in steps]).reshape(-1, 1)}


def write(directory, metadata=META, **identity):
    writer = SegmentWriter(directory, metadata=metadata, **identity)
    writer.add(columns(STEPS[:2]), *tables(STEPS[:2]), notes=NOTES)
    writer.add(columns(STEPS[2:]), *tables(STEPS[2:]), losses=np.array([(0, 1, 2, 3)], fmt.TABLES[fmt.LOSSES]))
    return writer.close()


def test_what_is_written_reads_back(tmp_path):
    path = write(tmp_path, run_id="ab" * 16, ring_id=7)
    assert path == tmp_path / "000000.moe" and stat.S_IMODE(path.stat().st_mode) == 0o600
    trace = moe_trace.open(path)
    for layer in (0, 3):
        for name in ("ids", "weights", "logits"):
            found, expected = getattr(trace.layer(layer), name), sb.of_rows(STEPS, layer, name)
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
        assert np.array_equal(trace.layer(layer).counts(), np.bincount(sb.of_rows(STEPS, layer).ravel(), minlength=60))
    assert np.array_equal(trace.tokens, np.concatenate([s.tokens for s in STEPS]))
    assert trace.losses["ring_full"].rows == 3 and set(trace.requests) == {"a", "b"}
    assert Segment(path).run_id == "ab" * 16 and struct.unpack_from("<Q", path.read_bytes(), 48) == (7,)


def test_a_block_spans_its_times_when_the_clock_is_set_back(tmp_path):
    steps, runs = tables(STEPS)
    steps["time_ns"] = np.array([100, 300, 200]) * 10**9
    writer = SegmentWriter(tmp_path, metadata=META)
    writer.add(columns(STEPS), steps, runs)
    trace = moe_trace.open(writer.close())
    assert (trace.first_time.timestamp(), trace.last_time.timestamp()) == (100, 300)
    assert trace.layer(0).between(150, 250).step_numbers.tolist() == [2] * 8
    assert trace.layer(0).between(250, None).step_numbers.tolist() == [1] * 3
    assert trace.layer(0).between(250, None).stats()[0].rows == 3


def test_it_is_the_same_as_what_the_tables_say(tmp_path):
    """Entry by entry, what the writer made and what the independent builder made hold the same decoded bytes."""
    ours = decoded(write(tmp_path).read_bytes())
    blocks = [sb.rows_block(STEPS[:2], notes=NOTES), sb.rows_block(STEPS[2:], 1, losses=[(0, 1, 2, 3)])]
    theirs = decoded(sb.segment(blocks, META))
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key[1] != sb.INDEX:  # places in the file
            assert ours[key] == theirs[key], key


def decoded(data):
    """The entries of each block by (block, field, layer, byte), and its header's numbers, read with struct and zlib
    alone.
    """
    import zstandard

    stored = struct.unpack_from("<I", data, 80)[0]
    at, block, found = (128 + stored + 63) // 64 * 64, 0, {}
    while data[at : at + 4] == b"MOEB":
        entries, size = struct.unpack_from("<IQ", data, at + 12)
        assert struct.unpack_from("<I", data, at + 124)[0] == zlib.crc32(data[at : at + 124])
        found[block, "header", 0, 0] = (data[at + 8], *struct.unpack_from("<QQQII", data, at + 24))
        for i in range(entries):
            head = struct.unpack_from("<BBBBHHIIIIQQQ", data, at + 128 + 48 * i)
            body = data[at + head[10] : at + head[10] + head[11]]
            assert zlib.crc32(body) == head[9]
            raw = zstandard.ZstdDecompressor().decompress(body) if head[3] else body
            assert len(raw) == head[12]
            rows = raw.splitlines() if head[0] == sb.NOTES else raw
            found[block, head[0], head[4], head[2]] = (head[1], head[6], head[8], rows)
        at, block = at + size, block + 1
    return found


def test_it_is_open_until_it_is_closed(tmp_path):
    writer = SegmentWriter(tmp_path, 3, metadata=META)
    writer.add(columns(STEPS), *tables(STEPS), notes=NOTES)
    assert [p.name for p in tmp_path.iterdir()] == ["000003.moe.open"]
    assert moe_trace.open(tmp_path / "000003.moe.open").rows == 16
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["000003.moe"]


def test_parts_that_do_not_fit_are_refused(tmp_path):
    writer = SegmentWriter(tmp_path)
    steps, runs = tables(STEPS)
    with pytest.raises(ValueError, match="runs"):
        writer.add(columns(STEPS), steps, runs[:-1])
    with pytest.raises(ValueError, match=r"ids of layer 0.*16 rows"):
        writer.add({(sb.IDS, 0): np.zeros((3, 4), np.uint8)}, steps, runs)
    with pytest.raises(FileExistsError):
        SegmentWriter(tmp_path)
