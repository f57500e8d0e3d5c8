"""Notes: facts that travel with steps. Which request an index stands for, that one has ended, what became of earlier
rows."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Sequence
from typing import Any

from moe_native.runs import FLAGS
from moe_native.tier import Tier

_HEAD = struct.Struct("<III")  # kind, key, bytes (csrc/RING.md)
_REQUEST, _ENDED, _LINE = 1, 2, 3
#: Requests that nobody declares finished are forgotten beyond this many; one that comes back gets a new index and
#: keeps its name.
MOST_REQUESTS = 1 << 16
#: Indices from here on are of requests whose rows are counted and not stored; nobody's is the last of them.
COUNTED = 1 << 31


class Notes:
    """The requests that are known by index, and the notes that wait for a step to travel with.

    Args:
        limit: bytes of notes that one step may carry. Many requests at once are spread over steps, because a step's own
            record must fit in the ring; of a request whose own note is larger only the name is kept.
        tier: says which of the requests that come from now on are kept. The others get an index, but no note: neither
            their names nor anything else of them is written.

    Attributes:
        waiting: the notes that no step has carried yet.
    """

    def __init__(self, limit: int, tier: Tier) -> None:
        self.tier = tier
        self._limit = limit
        self._requests: dict[str, tuple[int, dict[str, Any]]] = {}  # index and info
        self._next = {True: 0, False: COUNTED}  # by whether the request is kept
        self.waiting: dict[tuple[int, int], bytes] = {}  # by kind and key: a newer definition replaces one that waits
        self._lines = 0
        self._fresh: set[int] = set()  # requests that no step can have rows of yet

    def __len__(self) -> int:
        """Number of requests that are known."""
        return len(self._requests)

    def request(self, id: str, info: dict[str, Any]) -> int:
        """The index of a request. A new one, or new `info`, is noted."""
        if id not in self._requests:
            index = self._new_index(self.tier.keeps(id))
        else:
            index, known = self._requests[id]
            if info.items() <= known.items():
                return index
            info = {**known, **info}
        self._requests[id] = index, info
        if index < COUNTED:
            self._define(id, index, info)
        if len(self._requests) > MOST_REQUESTS:
            self.finish(next(iter(self._requests)))
        return index

    def _new_index(self, kept: bool) -> int:
        index = self._next[kept]
        if kept:
            self._fresh.add(index)
        # They wrap around in two thousand million requests.
        self._next[kept] = (index + 1) % COUNTED if kept else COUNTED + (index + 1 - COUNTED) % (COUNTED - 1)
        return index

    def _define(self, id: str, index: int, info: dict[str, Any]) -> None:
        line = {**info, "type": "request", "index": index, "id": id}
        if not self._add(_REQUEST, index, line):  # it would keep every step out of the ring
            self._add(_REQUEST, index, {"type": "request", "index": index, "id": id[: self._limit // 8]})

    def info(self, id: str) -> dict[str, Any]:
        """What is known of a request that has not ended."""
        return self._requests[id][1]

    def finish(self, id: str) -> None:
        """The request has ended: its index will not be used again."""
        if id not in self._requests:
            return
        index, _ = self._requests.pop(id)
        if index >= COUNTED:
            return
        if index in self._fresh:  # it came and went while nothing was recorded
            self._fresh.remove(index)
            self.waiting.pop((_REQUEST, index), None)
        else:
            self.waiting[_ENDED, index] = _HEAD.pack(_ENDED, index, 0)

    def amend(self, step: int, row: int, count: int, flags: Sequence[str], at: tuple[int, int] | None = None) -> None:
        """A late fact about rows of an earlier step. `at` says whose they are: index of the request and position of the
        first. Where only some rows of a step are stored, it tells which, and without it there is nothing to say.

        Raises:
            ValueError: a flag is not one of `FLAGS`.
        """
        for flag in flags:
            if flag not in FLAGS:
                raise ValueError(f"unknown flag {flag!r}: use some of {', '.join(FLAGS)}")
        line = {"type": "amend", "step": step, "row": row, "count": count, "set": list(flags)}
        if at is not None:
            if at[0] >= COUNTED:
                return
            line = {**line, "request": at[0], "position": at[1]}
        self._lines += 1
        self._add(_LINE, self._lines, line)

    @property
    def amendments_wait(self) -> bool:
        """Whether there are late facts that no step has carried yet."""
        return any(kind == _LINE for kind, _ in self.waiting)

    def _add(self, kind: int, key: int, line: dict[str, Any]) -> bool:
        """False: the line is too long for a step."""
        text = json.dumps(line, separators=(",", ":")).encode()
        if len(text) > self._limit:
            return False
        self.waiting[kind, key] = _HEAD.pack(kind, 0 if kind == _LINE else key, len(text)) + text
        return True

    def next(self) -> list[bytes]:
        """What the next step carries. It waits on until `delivered` says that the step was committed."""
        notes: list[bytes] = []
        size = 0
        for note in self.waiting.values():
            if size + len(note) > self._limit and notes:
                break
            notes.append(note)
            size += len(note)
        return notes

    def delivered(self, count: int) -> None:
        """The first `count` waiting notes are in the ring."""
        for key in list(itertools.islice(self.waiting, count)):
            del self.waiting[key]
        self._fresh.clear()
