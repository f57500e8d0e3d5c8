"""The captures that are open on a recorder, and what they want of its next steps. The rows themselves go through the
ring to the drain thread, which scatters them into memory that a capture's caller maps (csrc/capture)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from moe_native.config import Config
from moe_native.tier import Tier
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_native import _C

FIELDS = ("ids", "weights", "logits", "hidden")  #: what can be captured
DEFAULT_FIELDS = ("ids", "weights", "logits")


class Closed(NamedTuple):
    """A capture that takes no more rows.

    Attributes:
        index_at: where the index begins in its file.
        bytes: up to where the file is used.
        problem: why rows are missing; empty where this side knows of no reason.
    """

    index_at: int
    bytes: int
    problem: str


def wanted(fields: str | Iterable[str] | None, layers: str | Iterable[int] | None) -> Tier:
    """What a capture is asked for; `ids` are always among the fields. None: `DEFAULT_FIELDS`, and all layers.

    Raises:
        ValueError: a field or a layer is not one that can be captured.
    """
    for argument, given in (("fields", fields), ("layers", layers)):
        if isinstance(given, str) and not given:  # to the settings it would be none at all
            raise ValueError(f"{argument} is '', which names none; leave it out, or name some")
    asked = Config.of_arguments(fields=DEFAULT_FIELDS if fields is None else fields, layers=layers)
    for name in asked.fields:
        if name not in FIELDS:
            raise ValueError(f"{name!r} cannot be captured; use some of {', '.join(FIELDS)}")
    return Tier(asked.fields, Tier.layer_set(asked.layers))


def identity_of(handle: int) -> list[int]:
    """Of an open file, what no other one of this machine has: its device and its inode."""
    status = os.fstat(handle)
    return [status.st_dev, status.st_ino]


class Capturing:
    """Opens and closes captures. All of it belongs to the thread that begins steps.

    Args:
        core: of the recorder.
        bindings: its bindings' layers.

    Attributes:
        changed: whether the next steps are to be recorded otherwise than `adopt` has said last.
        under_way: whether there are requests which a capture wants.
    """

    def __init__(self, core: _C.Recording, bindings: Mapping[int, int]) -> None:
        self._core = core
        self._bindings = bindings
        self._wants: dict[int, Tier] = {}
        self._lost_before: dict[int, int] = {}  # when each was opened
        self._unattributed = 0
        self.under_way = False
        self.changed = False

    def __len__(self) -> int:
        """Number of open captures."""
        return len(self._wants)

    def open(self, wants: Tier) -> tuple[int, int]:
        """A new capture: its number, and the file descriptor of its memory, which stays the recorder's. Its caller
        opens that through /proc, takes a shared lock (flock) on it, and keeps it for as long as it looks at the memory.

        Raises:
            OSError: there is no memory.
        """
        number, handle = self._core.open_capture(wants.bits, None if wants.layers is None else sorted(wants.layers))
        alive = set(self._core.captures())  # one whose caller has died is gone by now
        self._wants = {each: tier for each, tier in self._wants.items() if each in alive} | {number: wants}
        self._lost_before = {each: self._lost_before.get(each, self._lost) for each in self._wants}
        self.changed = True
        return number, handle

    def is_open(self, number: int) -> bool:
        """Whether a capture is; one whose caller has died is closed when another one is opened."""
        return number in self._wants

    def add(self, number: int, request: int, *, sample: int, child: int, capacity: int) -> bool:
        """The rows of a request, by its index, belong to a capture, as its caller's `sample`, and in that the
        `child`-th of its samplings; room for `capacity` positions. False: the capture is closed."""
        if number not in self._wants:
            return False
        try:
            self._core.add_captured(number, request, sample, child, capacity)
        except IndexError:
            return False
        return True

    def close(self, number: int, timeout: float = 60.0) -> Closed:
        """Everything that was committed is in the capture's memory, which stays as it is while its caller holds the
        lock.

        Raises:
            LookupError: it is not open.
            TimeoutError: the drain thread does not come to it.
        """
        if number not in self._wants:
            raise LookupError(f"capture {number} is not open")
        del self._wants[number]
        self.changed = True
        caught_up = self._core.catch_up(timeout)
        closed = Closed(*self._core.close_capture(number))
        lost = self._lost - self._lost_before.pop(number)
        if not caught_up:
            raise TimeoutError(f"what was captured could not be had within {timeout} s")
        if lost and not closed.problem:
            # A gap need not show it: the position of a draft that was rejected has a row all the same.
            return closed._replace(problem=f"{count(lost, 'step or layer')} could not be captured; the log says why")
        return closed

    def lose_step(self) -> None:
        """It is not known whose the rows of a step are."""
        self._unattributed += self.under_way

    @property
    def _lost(self) -> int:
        return int(self._core.counters()["lost_for_captures"]) + self._unattributed

    def follow(self, under_way: bool) -> None:
        """Whether the next step may have rows that a capture wants."""
        if under_way is not self.under_way:
            self.under_way = under_way
            self.changed = True

    def adopt(self) -> None:
        """Between two steps: let the recorder do what is wanted now."""
        self.changed = False
        wants = list(self._wants.values()) if self.under_way else []
        bits = 0
        for tier in wants:
            bits |= tier.bits
        self._core.capture(bits)
        for binding, layer in self._bindings.items():
            self._core.want(binding, any(tier.takes(layer) for tier in wants))
