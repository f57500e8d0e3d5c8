"""Segments built from the tables of csrc/FORMAT.md with `struct` alone: what the reader is tested against. Imports
nothing of moe_trace.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zstandard

NOBODY = 0xFFFFFFFF
RUN_ID = bytes(range(16))
CAUSES = ("ring_full", "too_large", "aborted", "bad_input", "no_lane", "incomplete", "io_error")  # 7 is no loss
PAUSED = 7
IDS, WEIGHTS, LOGITS, HIDDEN, TOKENS = 1, 2, 3, 4, 5
STEPS, RUNS, NOTES, STAT_GROUPS, STAT_COUNTS, LANES, LOSSES, INDEX = range(16, 24)
DTYPES = {"uint8": 1, "uint16": 2, "uint32": 3, "float16": 4, "bfloat16": 5, "float32": 6}
ITEM = {1: 1, 2: 2, 3: 4, 4: 2, 5: 2, 6: 4}
FIELDS = {"ids": IDS, "weights": WEIGHTS, "logits": LOGITS, "hidden": HIDDEN}


def cls(phase=0, modality=0, attributed=True):
    return phase | modality << 2 | attributed << 6


PREFILL, DECODE = cls(1, 1), cls(2, 1)


@dataclass
class Step:
    """runs: (request, position, count, class, flags); layers: {layer: {"ids": …, "weights": …, "logits": …}}.

    An array of dtype uint32 in `weights`, `logits` or `hidden` stands for bfloat16: its values are the upper 16 bits
    of a float32.
    """

    number: int
    runs: list[tuple[int, int, int, int, int]]
    layers: dict[int, dict[str, np.ndarray]]
    tokens: np.ndarray | None = None
    time_ns: int = 0

    def __post_init__(self):
        self.time_ns = self.time_ns or 1_800_000_000_000_000_000 + self.number * 1_000_000_000

    @property
    def rows(self):
        return sum(run[2] for run in self.runs)

    @property
    def classes(self):
        return np.concatenate([np.full(run[2], run[3]) for run in self.runs] or [np.zeros(0, int)])


def exact(array):
    """A column as it must come back: what stands for bfloat16, widened."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint32 else array


def code(array, field_=None):
    """Its dtype code, and the array as its little-endian integers or floats."""
    if array.dtype == np.uint32 and field_ != TOKENS:
        return DTYPES["bfloat16"], array.astype("<u2")
    return DTYPES[array.dtype.name], array.astype(array.dtype.newbyteorder("<"))


def pad(data, to=64):
    return data + bytes(-len(data) % to)


@dataclass
class Entry:
    head: list  # field, dtype, byte, codec, layer, reserved, width, first_row, rows
    stored: bytes
    raw: int


def entry(field_, data, *, dtype=0, byte=0, layer=0xFFFF, width=0, first_row=0, rows=0, codec=None):
    packed = zstandard.ZstdCompressor(1).compress(data)
    if codec is None:
        codec = int(len(packed) < len(data))
    return Entry([field_, dtype, byte, codec, layer, 0, width, first_row, rows], packed if codec else data, len(data))


def column(field_, layer, array, first_row=0, codec=None):
    dtype, array = code(array, field_)
    rows, width = array.shape
    bytes_ = np.ascontiguousarray(array).view(np.uint8).reshape(rows * width, ITEM[dtype])
    return [
        entry(
            field_,
            bytes_[:, b].tobytes(),
            dtype=dtype,
            byte=b,
            layer=layer,
            width=width,
            first_row=first_row,
            rows=rows,
            codec=codec,
        )
        for b in range(ITEM[dtype])
    ]


def table(field_, rows, formats):
    """Column by column, each column byte plane by byte plane."""
    data = b""
    for index, form in enumerate(formats):
        packed = np.frombuffer(b"".join(struct.pack("<" + form, row[index]) for row in rows), np.uint8)
        data += packed.reshape(len(rows), -1).T.tobytes() if rows else b""
    return entry(field_, data, rows=len(rows))


def statistics(steps, only=None):
    """Groups and counts of steps, row by row: [(layer, class, k, items, rows, invalid)], [(expert, count, weight)]."""
    groups = {}
    for step in steps:
        for layer, fields in step.layers.items():
            ids, weights = fields["ids"], exact(fields["weights"]) if "weights" in fields else None
            for row, c in enumerate(step.classes.tolist()):
                group = groups.setdefault((layer, c), {"k": ids.shape[1], "rows": 0, "invalid": 0, "counts": {}})
                group["rows"] += 1
                for at, expert in enumerate(ids[row].tolist()):
                    if expert == np.iinfo(ids.dtype).max:
                        group["invalid"] += 1
                        continue
                    count = group["counts"].setdefault(expert, [0, 0.0])
                    count[0] += 1
                    count[1] += 0.0 if weights is None else float(weights[row, at])
    heads = [(*key, g["k"], len(g["counts"]), g["rows"], g["invalid"]) for key, g in sorted(groups.items())]
    items = [(e, *g["counts"][e]) for _, g in sorted(groups.items()) for e in sorted(g["counts"])]
    return [table(STAT_GROUPS, heads, "HHHIQQ"), table(STAT_COUNTS, items, "HQd")]


@dataclass
class Block:
    kind: int
    entries: list[Entry]
    number: int = 0
    steps: list[Step] = field(default_factory=list)
    fragments: int = 0
    count_steps: int | None = None  # header's, where it differs from len(steps)
    losses: tuple = ()  # totals up to here
    counted: list[Step] | None = None  # what its statistics are of, where that is not `steps`
    executed: int = 0  # rows that the statistics are of, where these are more than are stored

    def header(self, block_bytes, stored, raw, crc, codec):
        first, last = (self.steps[0], self.steps[-1]) if self.steps else (None, None)
        times = [step.time_ns for step in self.steps] if self.kind != 3 else []
        head = struct.pack(
            "<4sIBBHIQQQQIIqqIIIIQ28x",
            b"MOEB", 128, self.kind, codec, 0, len(self.entries), block_bytes, self.number,
            first.number if first else 0, last.number if last else 0,
            len(self.steps) if self.count_steps is None else self.count_steps,
            0 if self.count_steps == 0 else sum(step.rows for step in self.steps),
            min(times, default=0), max(times, default=0),
            stored, raw, crc, self.fragments, self.executed,
        )  # fmt: skip
        return head + struct.pack("<I", zlib.crc32(head))

    def pack(self, directory_codec=0):
        # A raw directory: its length, and so every offset, is known beforehand.
        at = -(-(128 + 48 * len(self.entries)) // 64) * 64
        directory, body = b"", b""
        for e in self.entries:
            directory += struct.pack(
                "<BBBBHHIIIIQQQ", *e.head, zlib.crc32(e.stored), at + len(body), len(e.stored), e.raw
            )
            body += e.stored
        stored = zstandard.ZstdCompressor(1).compress(directory) if directory_codec else directory
        assert len(stored) <= len(directory)
        whole = pad(bytes(at) + body)
        head = self.header(len(whole), len(stored), len(directory), zlib.crc32(stored), directory_codec)
        return head + stored + whole[128 + len(stored) :]


def tables_of(steps, tokens=True):
    entries = []
    if steps and steps[0].tokens is not None and tokens:
        joined = np.concatenate([step.tokens for step in steps]).astype(np.uint32).reshape(-1, 1)
        entries += column(TOKENS, 0xFFFF, joined)
    entries.append(table(STEPS, [(s.number, s.time_ns, s.rows, len(s.runs), 0) for s in steps], "QqIII"))
    entries.append(table(RUNS, [run for s in steps for run in s.runs], "IIIHH"))
    return entries


def bookkeeping(notes=(), lanes=(), losses=()):
    entries = []
    if notes:
        lines = "".join(json.dumps(note) + "\n" for note in notes).encode()
        entries.append(entry(NOTES, lines, rows=len(notes)))
    entries.append(table(LANES, list(lanes), "HQQ"))
    entries.append(table(LOSSES, list(losses), "HQQQ"))
    return entries


def rows_block(steps, number=0, *, notes=(), lanes=(), losses=(), codec=None):
    """A rows block of whole steps, all of the same layers and fields."""
    entries = []
    for layer in sorted(steps[0].layers) if steps else []:
        for name in sorted(steps[0].layers[layer], key=lambda name: FIELDS[name], reverse=True):
            entries += column(FIELDS[name], layer, np.concatenate([s.layers[layer][name] for s in steps]), codec=codec)
    entries += tables_of(steps) + statistics(steps) + bookkeeping(notes, lanes, losses)
    return Block(1, entries, number, list(steps), losses=losses)


def stored_of(step, requests):
    """The step as it is stored where only the rows of some requests are."""
    keep = [run[0] in requests for run in step.runs]
    rows = np.repeat(keep, [run[2] for run in step.runs])
    layers = {n: {name: array[rows] for name, array in of.items()} for n, of in step.layers.items()}
    runs = [run for run, kept in zip(step.runs, keep, strict=True) if kept]
    return Step(step.number, runs, layers, None if step.tokens is None else step.tokens[rows], step.time_ns)


def sampled_block(steps, requests, number=0, *, notes=(), lanes=(), losses=()):
    """A rows block that stores the rows of these requests and counts all."""
    kept = [stored_of(step, requests) for step in steps]
    entries = rows_block(kept).entries if any(step.rows for step in kept) else tables_of(kept)
    entries = [e for e in entries if e.head[0] <= RUNS] + statistics(steps) + bookkeeping(notes, lanes, losses)
    executed = sum(step.rows for step in steps)
    return Block(1, entries, number, kept, losses=losses, counted=list(steps), executed=executed)


def fragment(step, ranges, number=0, lanes=()):
    """A fragment block: `ranges` is [(layer, first_row, rows)]."""
    entries = []
    for layer, first, rows in ranges:
        for name, array in step.layers[layer].items():
            entries += column(FIELDS[name], layer, array[first : first + rows], first)
    return Block(2, entries + bookkeeping(lanes=lanes), number, [step])


def completing(step, ranges, fragments, number=0, *, whole=None, notes=(), lanes=(), losses=()):
    """The rows block that completes a step of which `fragments` fragment blocks are there. `whole`: the layers
    without a gap; all unless given.
    """
    counted = Step(step.number, step.runs, {layer: step.layers[layer] for layer in whole or step.layers})
    entries = fragment(step, ranges).entries[: -len(bookkeeping())]
    entries += tables_of([step]) + statistics([counted]) + bookkeeping(notes, lanes, losses)
    return Block(1, entries, number, [step], fragments, losses=losses, counted=[counted])


def takes_back(step, fragments, number=0, losses=()):
    """The rows block of no steps that takes back the fragments of an aborted step."""
    entries = tables_of([]) + statistics([]) + bookkeeping(losses=losses)
    return Block(1, entries, number, [step], fragments, count_steps=0, losses=losses, counted=[])


def superblock(
    metadata, *, run_id=RUN_ID, ring_id=0, number=0, major=1, minor=0, incompatible=0, compatible=0, codec=0
):
    raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    stored = zstandard.ZstdCompressor(1).compress(raw) if codec else raw
    head = struct.pack(
        "<8sIHHQQ16sQQqQIIIB31x",
        b"MOETRACE", 128, major, minor, incompatible, compatible, run_id, ring_id, number,
        1_800_000_000_000_000_000, 128, len(stored), len(raw), zlib.crc32(stored), codec,
    )  # fmt: skip
    return pad(head + struct.pack("<I", zlib.crc32(head)) + stored)


def segment(blocks, metadata=None, *, closed=True, directory_codec=0, **identity):
    """The bytes of a segment file."""
    data = superblock(metadata or {}, **identity)
    index = []
    for block in blocks:
        packed = block.pack(directory_codec)
        head = struct.unpack_from("<4sIBBHIQQQQIIqq", packed)
        index.append((len(data), len(packed), head[2], head[10], head[11], head[8], head[9], head[12], head[13]))
        data += packed
    if not closed:
        return data
    rows_blocks = [block for block in blocks if block.kind == 1]
    whole = [step for block in rows_blocks for step in (block.steps if block.counted is None else block.counted)]
    number = blocks[-1].number + 1 if blocks else 0
    losses = rows_blocks[-1].losses if rows_blocks else ()
    entries = [*statistics(whole), table(INDEX, index, "QQHIIQQqq"), *bookkeeping(losses=losses)]
    ends = [step for block in (blocks[:1] + blocks[-1:]) for step in block.steps[:: max(len(block.steps) - 1, 1)]]
    executed = sum(block.executed or sum(step.rows for step in block.steps) for block in rows_blocks)
    widened = executed if any(block.executed for block in rows_blocks) else 0
    footer = Block(3, entries, number, ends[:1] + ends[-1:], count_steps=0, executed=widened).pack()
    trailer = struct.pack("<QQI", len(data), len(data) + len(footer) + 32, 0)
    return data + footer + trailer + struct.pack("<I", zlib.crc32(trailer)) + b"MOEFOOT1"


def dead_owner():
    """The rank.json entry of a process that has ended on another boot of the machine."""
    return {"pid": 1, "start_ticks": 1, "boot_id": "00000000-0000-0000-0000-000000000000"}


def write_rank(directory: Path, segments, *, metadata=None, owner=None, ring=None, closed=True, run_id=RUN_ID):
    """A rank directory: `segments` are bytes; the last one is still `.open` unless `closed`."""
    directory.mkdir(parents=True)
    for number, data in enumerate(segments):
        is_open = not closed and number == len(segments) - 1
        (directory / f"{number:06d}.moe{'.open' if is_open else ''}").write_bytes(data)
    rank = {
        "format": "moe-native rank",
        "version": 1,
        "run_id": run_id.hex(),
        "rank": directory.name,
        "owner": owner or dead_owner(),
        "ring": ring,
        "closed": closed,
        "metadata": metadata or {},
    }
    (directory / "rank.json").write_text(json.dumps(rank))
    return directory


def make_steps(
    sizes,
    layers=(0, 3),
    k=4,
    experts=60,
    *,
    first=0,
    seed=0,
    weights=True,
    logits=False,
    tokens=False,
    requests=("a", "b"),
):
    """Steps with random rows of alternating requests: whole prompts first, then decode rows. Returns the steps and
    the notes.
    """
    rng = np.random.default_rng(seed)
    narrow = np.uint8 if experts <= 255 else np.uint16
    steps, position = [], dict.fromkeys(range(len(requests)), 0)
    for number, size in enumerate(sizes, first):
        runs, left, request = [], size, number % len(requests)
        while left:
            count = min(left, int(rng.integers(1, left + 1)))
            c = PREFILL if position[request] == 0 else DECODE
            runs.append((request, position[request], count, c, 0))
            position[request] += count
            left -= count
            request = (request + 1) % len(requests)
        of_layers = {}
        for layer in layers:
            ids = np.argsort(rng.random((size, experts)), axis=1)[:, :k].astype(narrow)
            fields = {"ids": ids}
            if weights:
                fields["weights"] = rng.random((size, k)).astype(np.float16)
            if logits:
                fields["logits"] = rng.standard_normal((size, experts)).astype(np.float32)
            of_layers[layer] = fields
        steps.append(
            Step(number, runs, of_layers, rng.integers(0, 1 << 20, size).astype(np.uint32) if tokens else None)
        )
    notes = [{"type": "request", "index": i, "id": name, "prompt_len": 5 + i} for i, name in enumerate(requests)]
    return steps, notes


def ledger(layers=(0, 3), k=4, experts=60):
    return [
        {"layer": layer, "name": f"layers.{layer}", "experts": experts, "top_k": k, "status": "exact", "detail": ""}
        for layer in layers
    ]


def of_rows(steps, layer, name="ids"):
    """A field of one layer over all rows of the steps."""
    return np.concatenate([step.layers[layer][name] for step in steps])


def per_row(steps, what):
    """request, position, class or flags of every row."""
    index = ("request", "position", "count", "class", "flags").index(what)
    values = []
    for step in steps:
        for run in step.runs:
            unknown = what == "position" and run[1] == NOBODY
            start = -1 if unknown else run[index]
            values += [start + i if what == "position" and not unknown else start for i in range(run[2])]
    return np.array(values, np.int64)
