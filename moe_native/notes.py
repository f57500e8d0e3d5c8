"""Notes: facts that travel with steps. Which request an index stands for, that one has ended, what became of earlier
rows."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from moe_native.runs import UNKNOWN

_HEAD = struct.Struct("<III")  # kind, key, bytes (csrc/RING.md)
_REQUEST, _ENDED, _LINE = 1, 2, 3
#: Requests that nobody declares finished are forgotten beyond this many; one that comes back gets a new index and
#: keeps its name.
MOST_REQUESTS = 1 << 16


class Notes:
    """The requests that are known by index, and the notes that wait for a step to travel with.

    Args:
        limit: bytes of notes that one step may carry. Many requests at once are spread over steps, because a step's own
            record must fit in the ring; a note that is larger alone still goes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._index: dict[str, int] = {}
        self._next = 0
        self._waiting: list[bytes] = []

    def __len__(self) -> int:
        """Number of requests that are known."""
        return len(self._index)

    def known(self, id: str) -> int | None:
        """The index of a request that was named before and has not ended."""
        return self._index.get(id)

    def request(self, id: str, info: dict[str, Any]) -> int:
        """The index of a request. A new one, or new `info`, is noted."""
        index = self._index.get(id)
        if index is None:
            index = self._next
            self._next = (index + 1) % UNKNOWN
            self._index[id] = index
            if len(self._index) > MOST_REQUESTS:
                self.finish(next(iter(self._index)))
        elif not info:
            return index
        self._add(_REQUEST, index, {"type": "request", "index": index, "id": id, **info})
        return index

    def finish(self, id: str) -> None:
        """The request has ended: its index will not be used again."""
        index = self._index.pop(id, None)
        if index is not None:
            self._waiting.append(_HEAD.pack(_ENDED, index, 0))

    def amend(self, step: int, row: int, count: int, flags: Sequence[str]) -> None:
        """A late fact about rows of an earlier step."""
        self._add(_LINE, 0, {"type": "amend", "step": step, "row": row, "count": count, "set": list(flags)})

    def _add(self, kind: int, key: int, line: dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")).encode()
        self._waiting.append(_HEAD.pack(kind, key, len(text)) + text)

    def next(self) -> list[bytes]:
        """What the next step carries. It waits on until `delivered` says that the step was committed."""
        notes: list[bytes] = []
        size = 0
        for note in self._waiting:
            if size + len(note) > self._limit and notes:
                break
            notes.append(note)
            size += len(note)
        return notes

    def delivered(self, count: int) -> None:
        """The first `count` waiting notes are in the ring."""
        del self._waiting[:count]
