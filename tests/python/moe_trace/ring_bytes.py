"""Ring files built from the tables of csrc/RING.md with `struct` alone. Imports nothing of moe_trace and nothing of
the recorder.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
from segment_bytes import CAUSES, ITEM, code, dead_owner

PAGE = 4096
RESERVED, COMMITTED, ABORTED = 1, 2, 3
RING_ID = 0x1122334455667788
REQUEST, ENDED, LINE = 1, 2, 3


def owner_of(pid):
    """The owner entry of a living process."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"pid": pid, "start_ticks": ticks, "boot_id": boot}


def finished_process():
    """The owner entry of a process of this boot that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        owner = owner_of(child.pid)
        child.stdin.close()
    return owner


def align(n):
    return -(-n // 64) * 64


def parts(*pieces):
    """Payload parts, each starting at a multiple of 64."""
    return b"".join(piece + bytes(-len(piece) % 64) for piece in pieces)


def note(kind, key, line=None):
    text = b"" if line is None else json.dumps(line).encode()
    return struct.pack("<III", kind, key, len(text)) + text


class RingFile:
    """Reserves and commits as a producer does; `free` is what the consumer would have given back."""

    def __init__(self, lanes=1, descriptors=64, arena_bytes=64 << 10, ring_id=RING_ID, owner=None, directory=""):
        self.lanes, self.count, self.arena_bytes, self.id = lanes, descriptors, arena_bytes, ring_id
        self.owner = owner or dead_owner()
        self.directory = str(directory)
        self.descriptors = [[bytes(128)] * descriptors for _ in range(lanes)]
        self.arenas = [bytearray(arena_bytes) for _ in range(lanes)]
        self.sequence = [0] * lanes
        self.head = [0] * lanes
        self.counters = [0] * 64

    def lose(self, cause, steps=0, layers=0, rows=0):
        at = 8 + 3 * CAUSES.index(cause)
        for i, n in enumerate((steps, layers, rows)):
            self.counters[at + i] += n

    def _place(self, payload, lane, state, fields):
        at = self.head[lane] % self.arena_bytes
        if at + align(len(payload)) > self.arena_bytes:
            self.head[lane] += self.arena_bytes - at
            at = 0
        self.head[lane] += align(len(payload))
        self.arenas[lane][at : at + len(payload)] = payload
        self.sequence[lane] += 1
        s = self.sequence[lane]
        head = struct.pack("<QQQQ", s * 4 + state, fields["step"], at, len(payload))
        head += struct.pack(
            "<6BH", fields["kind"], *fields.get("dtypes", (0, 0, 0, 0)), fields.get("tokens", 0), fields.get("layer", 0)
        )
        names = (
            "rows",
            "first_row",
            "step_rows",
            "k",
            "logits_width",
            "hidden_width",
            "invalid_ids",
            "runs",
            "notes_bytes",
            "flags",
        )
        head += struct.pack("<10I", *(fields.get(name, 0) for name in names))
        head += struct.pack("<qI36x", fields["time_ns"], fields.get("notes", 0))
        assert len(head) == 128
        self.descriptors[lane][(s - 1) % self.count] = head
        return s

    def layer(self, step, layer, first=0, rows=None, lane=0, state=COMMITTED, flags=0):
        """A layer record of rows [first, first + rows) of the step."""
        rows = step.rows - first if rows is None else rows
        dtypes, widths, columns = [], {}, []
        for name in ("ids", "weights", "logits", "hidden"):
            array = step.layers[layer].get(name)
            if array is None:
                dtypes.append(0)
                continue
            dtype, array = code(array[first : first + rows])
            assert array.dtype.itemsize == ITEM[dtype]
            dtypes.append(dtype)
            widths[name] = array.shape[1]
            columns.append(np.ascontiguousarray(array).tobytes())
        invalid = step.layers[layer]["ids"][first : first + rows]
        fields = {
            "step": step.number, "kind": 1, "dtypes": dtypes, "layer": layer, "rows": rows, "first_row": first,
            "step_rows": step.rows, "k": widths["ids"], "logits_width": widths.get("logits", 0),
            "hidden_width": widths.get("hidden", 0), "time_ns": step.time_ns, "flags": flags,
            "invalid_ids": int((invalid == np.iinfo(invalid.dtype).max).sum()),
        }  # fmt: skip
        return self._place(parts(*columns), lane, state, fields)

    def rows(self, step):
        """Whose rows the step will have, for captures."""
        runs = b"".join(struct.pack("<IIIHH", *run) for run in step.runs)
        fields = {"step": step.number, "kind": 3, "rows": step.rows, "step_rows": step.rows, "time_ns": step.time_ns}
        return self._place(runs, 0, COMMITTED, fields | {"runs": len(step.runs), "flags": 16})

    def step(self, step, notes=b"", count=0, state=COMMITTED, aborted=False, flags=0):
        """The step's own record, in lane 0."""
        runs = b"".join(struct.pack("<IIIHH", *run) for run in step.runs)
        tokens = b"" if step.tokens is None else step.tokens.astype("<u4").tobytes()
        fields = {"step": step.number, "kind": 2, "rows": step.rows, "step_rows": step.rows, "time_ns": step.time_ns}
        if aborted:
            return self._place(b"", 0, state, fields | {"flags": flags | 1})
        fields |= {
            "runs": len(step.runs),
            "tokens": int(step.tokens is not None),
            "notes": count,
            "notes_bytes": len(notes),
            "flags": flags,
        }
        return self._place(parts(runs, tokens, notes), 0, state, fields)

    def whole(self, step, notes=b"", count=0, flags=0):
        """All records of a step. Returns the sequence of its last."""
        for layer in step.layers:
            self.layer(step, layer, flags=flags)
        return self.step(step, notes, count, flags=flags)

    def bytes(self):
        at_descriptors = PAGE * (1 + self.lanes)
        at_arena = at_descriptors + 128 * self.count * self.lanes
        size = at_arena + self.arena_bytes * self.lanes
        head = struct.pack(
            "<8sIHHQQIIQQQQIIQ40sq116x",
            b"MOERING1", PAGE, 1, 0, self.id, size, self.lanes, self.count, self.arena_bytes,
            PAGE, at_descriptors, at_arena,
            self.owner["pid"], 0, self.owner["start_ticks"], self.owner["boot_id"].encode(), 1_800_000_000_000_000_000,
        )  # fmt: skip
        head += struct.pack("<I", zlib.crc32(head)) + struct.pack("<64Q", *self.counters)
        head = head.ljust(2048, b"\0") + self.directory.encode()
        # Heads and tails of the lanes are garbage: recovery must not read them.
        lanes = b"".join(
            struct.pack("<QQ", 0xDEAD, 0xBEEF).ljust(64, b"\0").ljust(PAGE, b"\xff") for _ in range(self.lanes)
        )
        descriptors = b"".join(d for lane in self.descriptors for d in lane)
        return head.ljust(PAGE, b"\0") + lanes + descriptors + b"".join(self.arenas)

    def write(self, path):
        """Write the file; returns rank.json's entry for it."""
        path.write_bytes(self.bytes())
        return {"path": str(path), "id": f"{self.id:016x}"}
