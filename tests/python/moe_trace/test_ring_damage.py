"""A ring is a stranger's memory: whatever is in it, the reader says one error or whole steps."""

from __future__ import annotations

import struct
import zlib

import segment_bytes as sb
from crashes import Crash, request_notes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_trace


def damaged(crash, data):
    crash.path.write_bytes(data)
    trace = moe_trace.open(crash.trace)
    found = {}
    try:
        numbers = trace.layer(0).step_numbers
        ids, problems = trace.layer(0).ids, trace.problems
        for number in set(numbers.tolist()):
            found[number] = ids[numbers == number]
        counted = trace.layer(0).counts().sum() + trace.stats()[0].invalid
        if trace.executed_rows == trace.rows:  # else the damage says that rows are not to be stored
            assert counted == ids.size
        assert counted >= ids.size
        repr(trace), problems, trace.losses, trace.request_ids, trace.positions, trace.requests
    except moe_trace.TraceError as error:
        return {}, str(error)
    return found, None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_of_a_descriptor(tmp_path_factory, data):
    steps, notes = sb.make_steps([5, 6, 7])
    crash = Crash(tmp_path_factory.mktemp("d"), descriptors=16, arena_bytes=4096)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    crash.write()
    content = bytearray(crash.ring.bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = 8192 + data.draw(st.integers(0, 9 * 128 - 9))
        value = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 63)])
            )
        )
        content[at : at + len(value)] = value
    damaged(crash, bytes(content))


def test_every_cut_of_a_ring_file(tmp_path):
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path, descriptors=16, arena_bytes=4096)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []))
    crash.write()
    whole = crash.ring.bytes()
    for cut in [0, 1, 7, 8, 255, 256, 4095, 4096, 8191, 8192, 8192 + 128, len(whole) - 1]:
        crash.path.write_bytes(whole[:cut])
        trace = moe_trace.open(crash.trace)
        assert trace.rows == 0 and not trace.complete
    for at in range(256):
        content = bytearray(whole)
        content[at] ^= 0x55
        crash.path.write_bytes(content)
        trace = moe_trace.open(crash.trace)
        assert trace.rows == 0 and not trace.complete, at


def test_a_hostile_header(tmp_path):
    """Valid checksums, absurd sizes."""
    crash = Crash(tmp_path)
    crash.write()
    whole = crash.ring.bytes()
    for at, form, value in (
        (32, "<I", 0), (32, "<I", 0xFFFFFFFF), (36, "<I", 0), (36, "<I", 3), (36, "<I", 0x80000000),
        (40, "<Q", 1 << 63), (40, "<Q", 0), (48, "<Q", 1), (56, "<Q", 1 << 63), (64, "<Q", 1 << 63), (12, "<H", 2),
    ):  # fmt: skip
        content = bytearray(whole)
        struct.pack_into(form, content, at, value)
        struct.pack_into("<I", content, 252, zlib.crc32(content[:252]))
        crash.path.write_bytes(content)
        trace = moe_trace.open(crash.trace)
        assert trace.rows == 0 and not trace.complete, (at, value)
