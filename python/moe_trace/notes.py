"""What the notes and runs of one rank say of its requests: their names, what became of rows later, what was cached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import Block
from moe_trace.errors import DamagedTrace

Ints = npt.NDArray[np.int64]

_RECOMPUTED = fmt.RUN_FLAGS["recomputed"]


@dataclass(frozen=True)
class Request:
    """A request of the serving engine.

    Attributes:
        id: the name that its user knows.
        prompt_len: tokens of its prompt, or None where nobody said.
        info: everything that was noted of it.
        runs: names of the runs that have a request of this name; the rest is of the last of them.
    """

    id: str
    prompt_len: int | None
    info: dict[str, Any]
    runs: tuple[str, ...] = ()

    @property
    def cached(self) -> tuple[tuple[int, int, int | None], ...]:
        """Prompt positions that were not executed, because the engine had them in its prefix cache: (first position,
        count, index in its rank of the request whose rows they share, None where that is not known). Ascending."""
        spans: list[tuple[int, int, int | None]] = []
        end = 0
        noted = self.info.get("cached")
        for span in noted if isinstance(noted, list) else ():
            if not (isinstance(span, list) and len(span) == 3):
                continue
            first, count, source = span
            if _number(first) and _number(count) and first >= end and (source is None or _number(source)):
                end = first + count
                spans.append((first, count, source))
        return tuple(spans)

    @property
    def cached_tokens(self) -> int:
        """How many of its positions were not executed for that reason."""
        return sum(count for _, count, _ in self.cached)


@dataclass(frozen=True)
class Amendment:
    """A late fact about rows of a step: flags to set for `count` rows from `row` on or, where a request is named, for
    its rows at positions from `position` on."""

    row: int
    count: int
    flags: int
    request: int | None = None
    position: int = 0

    def rows(self, runs: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | slice:
        """Which rows of a step with these runs it is about."""
        if self.request is None:
            return slice(max(self.row, 0), max(self.row + self.count, 0))
        counts = runs["count"].astype(np.int64)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = np.repeat(runs["position"].astype(np.int64), counts) + within
        mine = np.repeat(runs["request"] == self.request, counts)
        asked: npt.NDArray[np.bool_] = mine & (positions >= self.position) & (positions < self.position + self.count)
        return asked


@dataclass(frozen=True)
class Notes:
    """What a rank's notes say: its requests by their index in *runs*, and late facts by step."""

    requests: dict[int, Request]
    amendments: dict[int, list[Amendment]]


def read_notes(blocks: Iterable[Block], run: str, problems: list[str]) -> Notes:
    """The notes of a rank's blocks; what cannot be read is added to `problems`."""
    requests: dict[int, Request] = {}
    amendments: dict[int, list[Amendment]] = {}
    for block in blocks:
        try:
            notes = block.notes
        except DamagedTrace as error:
            if str(error) not in problems:
                problems.append(str(error))
            continue
        for note in notes:
            kind = note.get("type")
            if kind == "request" and isinstance(note.get("index"), int) and isinstance(note.get("id"), str):
                prompt_len = note.get("prompt_len")
                info = {k: v for k, v in note.items() if k not in ("type", "index")}
                known = prompt_len if isinstance(prompt_len, int) else None
                requests[note["index"]] = Request(note["id"], known, info, (run,))
            elif kind == "amend" and all(isinstance(note.get(key), int) for key in ("step", "row", "count")):
                names = note.get("set")
                flags = sum(bit for name, bit in fmt.RUN_FLAGS.items() if isinstance(names, list) and name in names)
                whose = note.get("request"), note.get("position")
                known = all(isinstance(number, int) for number in whose)
                late = Amendment(note["row"], note["count"], flags, *(whose if known else (None, 0)))
                amendments.setdefault(note["step"], []).append(late)
    return Notes(requests, amendments)


class Repeats:
    """Positions that were executed again: of several rows of one position the last counts, the others are superseded.

    Only runs with the flag *recomputed* are remembered, which are few.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        found: dict[int, list[tuple[int, int, int]]] = {}
        for block in blocks:
            try:
                runs = block.runs
                again = np.flatnonzero((runs["flags"] & _RECOMPUTED) != 0) if block.layers else ()
                if len(again):
                    steps = np.repeat(block.steps["step"].astype(np.int64), block.steps["runs"])
                    for (request, position, count, *_), step in zip(
                        runs[again].tolist(), steps[again].tolist(), strict=True
                    ):
                        found.setdefault(request, []).append((position, count, step))
            except DamagedTrace:  # found, and said, by whoever reads the block's rows
                continue
        # By request: the positions, ascending, and of each the last step that repeats it.
        self._last = {request: _last_steps(repeats) for request, repeats in found.items()}

    def superseded(
        self, requests: npt.NDArray[Any], positions: npt.NDArray[np.int64], steps: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Which rows a later one replaces: `[rows]`, of arrays `[rows]` of request indices, positions and steps."""
        found = np.zeros(len(positions), bool)
        for request in set(np.unique(requests).tolist()) & self._last.keys():
            repeated, last = self._last[request]
            rows = np.flatnonzero(requests == request)
            at = np.minimum(np.searchsorted(repeated, positions[rows]), len(repeated) - 1)
            found[rows] = (repeated[at] == positions[rows]) & (last[at] > steps[rows])
        return found


def _last_steps(repeats: list[tuple[int, int, int]]) -> tuple[Ints, Ints]:
    positions = np.concatenate([np.arange(first, first + count) for first, count, _ in repeats])
    steps = np.repeat([step for _, _, step in repeats], [count for _, count, _ in repeats])
    order = np.lexsort((steps, positions))
    positions, steps = positions[order], steps[order]
    is_last = np.append(positions[1:] != positions[:-1], True)
    return positions[is_last], steps[is_last]


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < fmt.NOBODY


def apart(requests: Mapping[int, Request]) -> dict[int, tuple[str, str | int]]:
    """What tells the requests of a rank apart, the same in each rank of an engine: the name, and with it the engine's
    own name or, where there is none, which of that name it is."""
    seen: dict[str, int] = {}
    found: dict[int, tuple[str, str | int]] = {}
    for index, request in sorted(requests.items()):
        number = seen[request.id] = seen.get(request.id, -1) + 1
        internal = request.info.get("internal")
        found[index] = request.id, internal if isinstance(internal, str) else number
    return found


def names(requests: Mapping[int, Request], indices: Iterable[int]) -> list[str | None]:
    """Names of requests by index; None for nobody, `#7` for one that no note names."""
    return [
        None if index == fmt.NOBODY else request.id if (request := requests.get(index)) is not None else f"#{index}"
        for index in indices
    ]
