"""The C++ half of `Recorder` and of the attribution of rows (csrc/python)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class Recording:
    def __init__(
        self,
        *,
        trace: str,
        rank_directory: str,
        run_id: bytes,
        ring_directory: str,
        ring_bytes: int,
        lanes: int,
        block: bool,
        fields: int,
        exact_weights: bool,
        segment_bytes: int,
        max_bytes: int,
        flush_seconds: float,
    ) -> None: ...
    def bind(self, layer: int, experts: int, k: int, enabled: bool, every_step: bool, logits_width: int) -> int: ...
    def begin_step(self, rows: int, spans: Any = None) -> int: ...
    def place(self, places: list[tuple[int, int, int, int]]) -> None: ...
    def narrow(self, rows: int) -> None: ...
    def end_step(
        self, runs: npt.NDArray[np.void], tokens: npt.NDArray[np.uint32] | None, notes: bytes, note_count: int
    ) -> bool: ...
    def abort_step(self) -> None: ...
    def pause(self, paused: bool) -> None: ...
    def configure(self, fields: int, counted: bool) -> None: ...
    def enable(self, binding: int, enabled: bool) -> None: ...
    def set_metadata(self, json: str) -> None: ...
    def flush(self, seconds: float) -> bool: ...
    def close(self) -> None: ...
    def counters(self) -> dict[str, Any]: ...
    def take_messages(self) -> list[str]: ...
    @property
    def has_messages(self) -> bool: ...
    @property
    def here(self) -> bool: ...
    @property
    def paused(self) -> bool: ...
    @property
    def ring_id(self) -> int: ...
    @property
    def ring_path(self) -> str: ...
    @property
    def step_number(self) -> int: ...
    @property
    def step_open(self) -> bool: ...

class RequestRows:
    """A request under way (csrc/core/request_rows.h)."""

    def __init__(self, index: int, prompt: int) -> None: ...
    def set_media(self, media: list[tuple[int, int, int]]) -> None: ...
    prompt: int
    @property
    def index(self) -> int: ...
    @property
    def executed(self) -> int: ...

def attribute(
    batch: Sequence[str],
    batch_size: int,
    scheduled: Mapping[str, int],
    speculated: Mapping[str, Any],
    requests: Mapping[str, RequestRows],
    positions: npt.NDArray[Any],
    rows: int,
) -> npt.NDArray[np.void] | None:
    """The runs of a step (csrc/python/request_rows.cc): its rows are those of the first `batch_size` requests of
    `batch`, one after the other, as many of each as `scheduled` says; the last ones of them are its drafts in
    `speculated`. `positions` has one item a row, or more. None, and nothing is changed, where `requests` lacks one.

    Raises:
        KeyError: one is not scheduled.
        ValueError: they do not have `rows` rows, or a position is impossible.
    """

def direct(dispatched: Callable[..., None], tensor: type, exchange: object) -> Callable[..., None] | None:
    """A function with the arguments of the op, whose tensors it reads past torch's dispatcher (csrc/python/direct.cc);
    what it cannot, it hands to `dispatched`. None where this torch's DLPack is not known."""

def owner() -> dict[str, Any]: ...
