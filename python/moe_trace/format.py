"""The bytes of segments and rings as numpy types, and checks of what they claim. csrc/FORMAT.md and csrc/RING.md are
the specification.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from moe_trace.errors import DamagedTrace, NotATrace, UnsupportedVersion

Bytes = bytes | memoryview

MAJOR = 1
ALIGN = 64
NO_LAYER = 0xFFFF
NOBODY = 0xFFFFFFFF  # a request; also an unknown position
MOST_ENTRIES = 1 << 20
MOST_BLOCK_BYTES = 1 << 30
MOST_METADATA_BYTES = 64 << 20

SUPERBLOCK = np.dtype(
    [
        ("magic", "S8"), ("header_size", "<u4"), ("major", "<u2"), ("minor", "<u2"), ("incompatible", "<u8"),
        ("compatible", "<u8"), ("run_id", "V16"), ("ring_id", "<u8"), ("number", "<u8"), ("created_ns", "<i8"),
        ("metadata_offset", "<u8"), ("metadata_stored", "<u4"), ("metadata_raw", "<u4"), ("metadata_crc", "<u4"),
        ("metadata_codec", "u1"), ("zero", "V31"), ("crc", "<u4"),
    ]
)  # fmt: skip
TRAILER = np.dtype(
    [("footer_offset", "<u8"), ("file_bytes", "<u8"), ("reserved", "<u4"), ("crc", "<u4"), ("magic", "S8")]
)
BLOCK = np.dtype(
    [
        ("magic", "S4"), ("header_size", "<u4"), ("kind", "u1"), ("directory_codec", "u1"), ("reserved", "<u2"),
        ("entries", "<u4"), ("block_bytes", "<u8"), ("number", "<u8"), ("first_step", "<u8"), ("last_step", "<u8"),
        ("steps", "<u4"), ("rows", "<u4"), ("first_time_ns", "<i8"), ("last_time_ns", "<i8"),
        ("directory_stored", "<u4"), ("directory_raw", "<u4"), ("directory_crc", "<u4"), ("fragments", "<u4"),
        ("executed", "<u8"), ("zero", "V28"), ("crc", "<u4"),
    ]
)  # fmt: skip
ENTRY = np.dtype(
    [
        ("field", "u1"), ("dtype", "u1"), ("byte", "u1"), ("codec", "u1"), ("layer", "<u2"), ("reserved", "<u2"),
        ("width", "<u4"), ("first_row", "<u4"), ("rows", "<u4"), ("crc", "<u4"), ("offset", "<u8"), ("stored", "<u8"),
        ("raw", "<u8"),
    ]
)  # fmt: skip
assert (SUPERBLOCK.itemsize, TRAILER.itemsize, BLOCK.itemsize, ENTRY.itemsize) == (128, 32, 128, 48)

ROWS_BLOCK, FRAGMENT_BLOCK, FOOTER_BLOCK = 1, 2, 3
IDS, WEIGHTS, LOGITS, HIDDEN, TOKENS = 1, 2, 3, 4, 5
STEPS, RUNS, NOTES, STAT_GROUPS, STAT_COUNTS, LANES, LOSSES, INDEX = 16, 17, 18, 19, 20, 21, 22, 23

FIELD_NAMES = {IDS: "ids", WEIGHTS: "weights", LOGITS: "logits", HIDDEN: "hidden", TOKENS: "tokens"}
#: Bytes per element by dtype code.
ITEM_BYTES = {1: 1, 2: 2, 3: 4, 4: 2, 5: 2, 6: 4}
BFLOAT16 = 5
_NUMPY: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    3: np.dtype("<u4"),
    4: np.dtype("<f2"),
    6: np.dtype("<f4"),
}

TABLES: dict[int, np.dtype[Any]] = {
    STEPS: np.dtype([("step", "<u8"), ("time_ns", "<i8"), ("rows", "<u4"), ("runs", "<u4"), ("flags", "<u4")]),
    RUNS: np.dtype([("request", "<u4"), ("position", "<u4"), ("count", "<u4"), ("cls", "<u2"), ("flags", "<u2")]),
    STAT_GROUPS: np.dtype(
        [("layer", "<u2"), ("cls", "<u2"), ("k", "<u2"), ("items", "<u4"), ("rows", "<u8"), ("invalid", "<u8")]
    ),
    STAT_COUNTS: np.dtype([("expert", "<u2"), ("count", "<u8"), ("weight", "<f8")]),
    LANES: np.dtype([("lane", "<u2"), ("first", "<u8"), ("last", "<u8")]),
    LOSSES: np.dtype([("cause", "<u2"), ("steps", "<u8"), ("layers", "<u8"), ("rows", "<u8")]),
    INDEX: np.dtype(
        [
            ("offset", "<u8"), ("bytes", "<u8"), ("kind", "<u2"), ("steps", "<u4"), ("rows", "<u4"),
            ("first_step", "<u8"), ("last_step", "<u8"), ("first_time_ns", "<i8"), ("last_time_ns", "<i8"),
        ]
    ),
}  # fmt: skip

CAUSES = ("ring_full", "too_large", "aborted", "bad_input", "no_lane", "incomplete", "io_error", "paused")
PHASES = ("unknown", "prefill", "decode")
MODALITIES = ("unknown", "text", "image", "video", "audio")
RUN_FLAGS = {"recomputed": 1, "rejected": 2, "superseded": 4, "discarded": 8, "undecided": 16}
CLASS_RECOMPUTED, CLASS_DRAFT = 1 << 7, 1 << 8
RUN_COUNTED = 0x8000  # in a ring only: the rows of this run are counted, and not stored


def parse_json(text: bytes | str) -> Any:
    """JSON as a stranger may have written it. Numbers that JSON does not have (NaN, infinities) become None. Raises
    ValueError, RecursionError.
    """
    return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def align(value: int) -> int:
    """The next multiple of 64."""
    return -(-value // ALIGN) * ALIGN


def struct_at(data: Bytes, offset: int, dtype: np.dtype[Any]) -> Any:
    """One struct of `dtype` at `offset`. Raises DamagedTrace where the data ends before it does."""
    if offset < 0 or offset + dtype.itemsize > len(data):
        raise DamagedTrace("the file ends in the middle of a header")
    return np.frombuffer(data, dtype, 1, offset)[0]


def crc_holds(data: Bytes, offset: int, header: Any) -> bool:
    """Whether the `crc` of a header at `offset`, its last field but for a magic, is that of the bytes before it."""
    end = offset + header.dtype.fields["crc"][1]
    return zlib.crc32(data[offset:end]) == int(header["crc"])


def check_version(major: int, incompatible: int, what: str) -> None:
    """Raises UnsupportedVersion for what a later format brought."""
    if major != MAJOR or incompatible != 0:
        features = f" with features {incompatible:#x}" if incompatible else ""
        raise UnsupportedVersion(
            f"{what} is in format version {major}{features}; this moe_trace reads version {MAJOR}. "
            "Update it: pip install --upgrade moe-native"
        )


def read_superblock(data: Bytes, what: str) -> Any:
    """The superblock of a segment. Raises NotATrace, UnsupportedVersion, DamagedTrace."""
    if bytes(data[:8]) != b"MOETRACE":
        raise NotATrace(f"{what} is not a segment of moe_native. Give a trace directory or a .moe file")
    if len(data) < SUPERBLOCK.itemsize:
        raise DamagedTrace(
            f"{what} ends within its first {SUPERBLOCK.itemsize} bytes: cut off, or nothing was written to it yet. "
            "Nothing can be read from it; restore it or delete it"
        )
    head = struct_at(data, 0, SUPERBLOCK)
    # The version stands where it stands in every version, so that it can be told even where the rest has moved.
    check_version(int(head["major"]), 0, what)
    if not crc_holds(data, 0, head):
        raise DamagedTrace(
            f"the first bytes of {what} are damaged. Nothing in this segment can be trusted; restore it or delete it"
        )
    check_version(int(head["major"]), int(head["incompatible"]), what)
    return head


def decode(stored: Bytes, codec: int, raw: int, crc: int) -> Bytes:
    """Stored bytes to the `raw` bytes they stand for. Raises DamagedTrace; never makes more than `raw` bytes."""
    if zlib.crc32(stored) != crc:
        raise DamagedTrace("a checksum does not match")
    if codec == 0:
        if len(stored) != raw:
            raise DamagedTrace("an entry has the wrong length")
        return stored
    if codec != 1:
        raise DamagedTrace(f"codec {codec} is not known")
    if raw > MOST_BLOCK_BYTES:
        raise DamagedTrace("an entry claims to be larger than any can be")
    try:
        # The frame says its length, or else its output is bounded by `raw`.
        if zstandard.get_frame_parameters(stored).content_size not in (raw, zstandard.CONTENTSIZE_UNKNOWN):
            raise DamagedTrace("a compressed entry has the wrong length")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw)
    except zstandard.ZstdError as error:
        raise DamagedTrace(f"a compressed entry cannot be read: {error}") from None
    if len(data) != raw:
        raise DamagedTrace("a compressed entry has the wrong length")
    return data


def decode_table(data: Bytes, field: int, items: int) -> npt.NDArray[Any]:
    """A table from its byte planes, as a structured array `[items]`."""
    dtype = TABLES[field]
    if len(data) != items * dtype.itemsize:
        raise DamagedTrace("a table has the wrong length")
    table = np.empty(items, dtype)
    at = 0
    for name in dtype.names or ():
        column = dtype[name]
        size = column.itemsize * items
        planes = np.frombuffer(data, np.uint8, size, at).reshape(column.itemsize, items)
        table[name] = np.ascontiguousarray(planes.T).view(column).reshape(items)
        at += size
    return table


def encode_table(table: npt.NDArray[Any]) -> bytes:
    """The inverse of `decode_table`; the array has the dtype of its field in TABLES."""
    parts = []
    for name in table.dtype.names or ():
        column = np.ascontiguousarray(table[name])
        parts.append(column.view(np.uint8).reshape(len(table), column.dtype.itemsize).T.tobytes())
    return b"".join(parts)


def join_planes(planes: list[Bytes], dtype: int, rows: int, width: int) -> npt.NDArray[Any]:
    """A column `[rows, width]` from its byte planes, the least significant first. bfloat16 comes back as float32
    (exactly).
    """
    n = rows * width
    if len(planes) != ITEM_BYTES[dtype] or any(len(plane) != n for plane in planes):
        raise DamagedTrace("a plane is missing or has the wrong length")
    if len(planes) == 1:
        return np.frombuffer(planes[0], np.uint8).reshape(rows, width)
    joined = np.empty((n, len(planes)), np.uint8)
    for byte, plane in enumerate(planes):
        joined[:, byte] = np.frombuffer(plane, np.uint8)
    return widen(joined.reshape(-1), dtype).reshape(rows, width)


def widen(data: npt.NDArray[np.uint8], dtype: int) -> npt.NDArray[Any]:
    """Little-endian elements of a dtype code as a numpy array, bfloat16 as float32."""
    if dtype == BFLOAT16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view(_NUMPY[dtype])


def numpy_dtype(code: int) -> np.dtype[Any]:
    """The dtype in which a column of this code is returned."""
    return np.dtype("<f4") if code == BFLOAT16 else _NUMPY[code]
