"""The selected rows of one block, and what a selection asks for."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.block import Block
from moe_trace.errors import TraceError
from moe_trace.notes import names
from moe_trace.rank import Rank

SUPERSEDED = fmt.RUN_FLAGS["superseded"]
NOT_CURRENT = SUPERSEDED | sum(fmt.RUN_FLAGS[name] for name in ("rejected", "discarded", "undecided"))


@dataclass(frozen=True)
class Filter:
    """What a selection asks for. None: anything."""

    layers: tuple[int, ...] | None = None
    one_layer: bool = False  # `layer(3)` drops the layer axis of results, `layer([3])` keeps it
    phases: frozenset[int] | None = None
    modalities: frozenset[int] | None = None
    requests: frozenset[str] | None = None
    runs: frozenset[str] | None = None  # their names
    current: bool = False  # only the rows that count
    first_ns: int | None = None  # included
    end_ns: int | None = None  # not included
    first_step: int | None = None
    end_step: int | None = None

    def takes_class(self, cls: int) -> bool:
        phase, modality = cls & 3, cls >> 2 & 15
        return (self.phases is None or phase in self.phases) and (
            self.modalities is None or modality in self.modalities
        )

    @property
    def by_class(self) -> bool:
        """Whether a row's class and time say if it is asked for: then statistics can answer."""
        return self.requests is None and not self.current

    @property
    def any_time(self) -> bool:
        return self.first_ns is None and self.end_ns is None and self.first_step is None and self.end_step is None

    def covers(self, first_ns: int, last_ns: int, first_step: int, last_step: int) -> bool:
        """Whether steps in these ranges are all asked for."""
        return (
            (self.first_ns is None or first_ns >= self.first_ns)
            and (self.end_ns is None or last_ns < self.end_ns)
            and (self.first_step is None or first_step >= self.first_step)
            and (self.end_step is None or last_step < self.end_step)
        )

    def misses(self, first_ns: int, last_ns: int, first_step: int, last_step: int) -> bool:
        """Whether none of the steps in these ranges is asked for."""
        return (
            (self.first_ns is not None and last_ns < self.first_ns)
            or (self.end_ns is not None and first_ns >= self.end_ns)
            or (self.first_step is not None and last_step < self.first_step)
            or (self.end_step is not None and first_step >= self.end_step)
        )


class Rows(abc.ABC):
    """Selected rows, with what they have a column of. Attributes are read when they are first asked for, and have the
    shapes of `Selection`'s.

    Attributes:
        layers: the layers that have rows here, of those asked for.
    """

    _asked: Filter
    layers: tuple[int, ...]

    @abc.abstractmethod
    def column(self, field: int, layer: int) -> npt.NDArray[Any] | None:
        """One column of one layer, `[rows, width]`; None where it is not here."""

    def _layers(self, field: int) -> npt.NDArray[Any]:
        columns = [self.column(field, layer) for layer in self.layers]
        if any(column is None for column in columns) or not columns:
            name = fmt.FIELD_NAMES[field]
            fields = ",".join(dict.fromkeys(("ids", "weights", name)))
            was = "was" if field == fmt.HIDDEN else "were"
            raise TraceError(f"{name} {was} not recorded for {these(self.layers)}. {_how_to_record(fields)}")
        found = [column for column in columns if column is not None]
        if self._asked.one_layer:
            return found[0]
        if len({column.shape[1] for column in found}) > 1:
            raise TraceError("these layers have rows of different widths: select one layer, as in trace.layer(0)")
        return np.stack(promote(found), axis=1)

    @cached_property
    def ids(self) -> npt.NDArray[Any]:
        """Expert ids, uint8 or uint16, `[rows, k]` or `[rows, layers, k]`."""
        return self._layers(fmt.IDS)

    @cached_property
    def weights(self) -> npt.NDArray[Any]:
        """Weights, of the shape of `ids`."""
        return self._layers(fmt.WEIGHTS)

    @cached_property
    def logits(self) -> npt.NDArray[Any]:
        """Router logits, `[rows, experts]` or `[rows, layers, experts]`."""
        return self._layers(fmt.LOGITS)

    @cached_property
    def hidden(self) -> npt.NDArray[Any]:
        """The routers' inputs, `[rows, width]` or `[rows, layers, width]`."""
        return self._layers(fmt.HIDDEN)

    @cached_property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token ids, int64 `[rows]`, -1 where unknown."""
        column = self.column(fmt.TOKENS, fmt.NO_LAYER)
        if column is None:
            raise TraceError(f"token ids were not recorded. {_how_to_record('ids,weights,tokens')}")
        return _unknown_to_minus_one(column[:, 0])


class Batch(Rows):
    """The selected rows of one block.

    Attributes are read when they are first asked for, and have the shapes of `Selection`'s.

    Attributes:
        layers: the layers that have rows here, of those asked for.
        run, rank: names of the run and the rank that recorded them. Requests of one name in two runs are two requests.
    """

    def __init__(
        self, rank: Rank, block: Block, asked: Filter, layers: tuple[int, ...], keep: npt.NDArray[np.bool_] | None
    ) -> None:
        self._rank = rank
        self._block = block
        self._asked = asked
        self._keep = keep  # of the block's runs; None: all
        self.layers = layers
        self.run, self.rank = rank.run, rank.name

    @cached_property
    def _mask(self) -> npt.NDArray[np.bool_] | None:
        mask = None if self._keep is None else np.repeat(self._keep, self._block.runs["count"])
        if self._asked.current:
            counts = (self._all_flags & NOT_CURRENT) == 0
            mask = counts if mask is None else mask & counts
        return mask

    def _rows(self, per_row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return per_row if self._mask is None else per_row[self._mask]

    def _per_run(self, per_run: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return self._rows(np.repeat(per_run, self._block.runs["count"]))

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        if self._asked.current and self._mask is not None:
            return int(self._mask.sum())
        return self._block.rows if self._keep is None else int(self._block.runs["count"][self._keep].sum())

    def column(self, field: int, layer: int) -> npt.NDArray[Any] | None:
        """One column of one layer, `[rows, width]`; None where this block does not have it."""
        if not self._block.has(field, layer):
            return None
        return self._rows(self._block.column(field, layer))

    def has(self, field: int, layer: int) -> bool:
        """Whether `column` would have it. Reads no plane."""
        return self._block.has(field, layer)

    @cached_property
    def positions(self) -> npt.NDArray[np.int64]:
        """Absolute positions in the requests, int64 `[rows]`, -1 where unknown."""
        return self._rows(self._all_positions)

    @cached_property
    def _all_positions(self) -> npt.NDArray[np.int64]:
        runs = self._block.runs
        counts = runs["count"].astype(np.int64)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(_unknown_to_minus_one(runs["position"]), counts)
        return np.where(first < 0, -1, first + within)

    @cached_property
    def request_ids(self) -> npt.NDArray[np.object_]:
        """Names of the requests, object `[rows]`; None for a row that is nobody's."""
        return self._per_run(request_names(self._rank, self._block))

    @cached_property
    def request_numbers(self) -> npt.NDArray[np.uint32]:
        """Indices of the requests in their rank, uint32 `[rows]`; 4294967295 for a row that is nobody's."""
        return self._per_run(self._block.runs["request"])

    @cached_property
    def phases(self) -> npt.NDArray[np.uint8]:
        """0 unknown, 1 prefill, 2 decode; `[rows]`."""
        return self._per_run((self._block.runs["cls"] & 3).astype(np.uint8))

    @cached_property
    def modalities(self) -> npt.NDArray[np.uint8]:
        """0 unknown, 1 text, 2 image, 3 video, 4 audio; `[rows]`."""
        return self._per_run((self._block.runs["cls"] >> 2 & 15).astype(np.uint8))

    @cached_property
    def flags(self) -> npt.NDArray[np.uint16]:
        """What became of the rows (`Selection.flags`); `[rows]`."""
        return self._rows(self._all_flags)

    @cached_property
    def _all_flags(self) -> npt.NDArray[np.uint16]:
        runs = self._block.runs
        flags = np.repeat(runs["flags"], runs["count"])
        amendments = self._rank.amendments
        if amendments:
            steps = self._block.steps
            ends, run_ends = (np.cumsum(steps[name].astype(np.int64)) for name in ("rows", "runs"))
            for step, end, run_end in zip(steps, ends, run_ends, strict=True):
                of_step = flags[int(end) - int(step["rows"]) : int(end)]
                for late in amendments.get(int(step["step"]), ()):
                    of_step[late.rows(runs[int(run_end) - int(step["runs"]) : int(run_end)])] |= np.uint16(late.flags)
        requests = np.repeat(runs["request"], runs["count"])
        superseded = self._rank.repeats.superseded(requests, self._all_positions, self._all_steps)
        flags[superseded] |= SUPERSEDED
        return flags

    @cached_property
    def step_numbers(self) -> npt.NDArray[np.int64]:
        """Number of each row's step in its run, int64 `[rows]`."""
        return self._rows(self._all_steps)

    @cached_property
    def _all_steps(self) -> npt.NDArray[np.int64]:
        return np.repeat(self._block.steps["step"].astype(np.int64), self._block.steps["rows"])

    @cached_property
    def row_numbers(self) -> npt.NDArray[np.int64]:
        """Which row of its step each row is, int64 `[rows]`."""
        counts = self._block.steps["rows"].astype(np.int64)
        return self._rows(np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))

    @cached_property
    def times(self) -> npt.NDArray[np.datetime64]:
        """Start of each row's step, UTC, datetime64[ns] `[rows]`; NaT where it is not known (imports)."""
        times = self._block.steps["time_ns"].view("datetime64[ns]")
        known = np.where(self._block.steps["time_ns"] == 0, np.datetime64("NaT", "ns"), times)
        return self._rows(np.repeat(known, self._block.steps["rows"]))


OTHER_ROWS = "not all of these layers have the same rows: select one layer, as in trace.layer(0), or read by batches()"


def other_widths(name: str) -> str:
    return f"the {name} of this selection have different widths over time: read them by batches()"


def promote(parts: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Arrays of one dtype; where uint8 and uint16 ids meet, the mark of an invalid id stays one."""
    if len({part.dtype for part in parts}) == 1:
        return parts
    dtype = np.result_type(*parts)
    return [
        np.where(p == 255, np.uint16(65535), p).astype(dtype)
        if p.dtype == np.uint8 and dtype == np.uint16
        else p.astype(dtype)
        for p in parts
    ]


def request_names(rank: Rank, block: Block) -> npt.NDArray[np.object_]:
    """Request names of the runs of a block; None for nobody's."""
    indices, inverse = np.unique(block.runs["request"], return_inverse=True)
    return np.array([*names(rank.requests, indices.tolist()), None], object)[inverse]


def _unknown_to_minus_one(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    wide = values.astype(np.int64)
    wide[wide == fmt.NOBODY] = -1
    return wide


def _how_to_record(fields: str) -> str:
    return f'To record this, set MOE_NATIVE_FIELDS={fields} or Recorder(fields="{fields}")'


def these(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if not layers:
        return "no layers"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + ", ".join(map(str, layers))
