"""What accumulators are given: the rows of one block, each column decompressed once, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import NOT_CURRENT, Batch
from moe_trace.errors import TraceError
from moe_trace.joined import Joined
from moe_trace.metrics.arrays import Bools, Ints, valid
from moe_trace.notes import apart
from moe_trace.rank import Rank

Whose = tuple[str, str, str, str | int]
"""What tells a request from all others of a trace: its run, the first rank of its engine, its name, and the engine's
own name for it or else which of that name it is. The same in each process that reads the trace."""

_FIELDS = {"ids": fmt.IDS, "weights": fmt.WEIGHTS, "logits": fmt.LOGITS}


class Part:
    """Rows, whole steps of one rank or of ranks that were joined, with the columns that were asked for.

    Everything is read when it is made: damage shows before any accumulator has counted a part of it.

    Attributes:
        rows: how many.
        layers: the layers that have rows here, ascending.
        wanted_layers: those of the selection; a layer may be absent from a part of a trace.
        steps: int64 `[rows]`, if `steps` were asked for.
        times: int64 `[rows]`, Unix nanoseconds of the start of the step, if `times` were asked for.
        phases: int64 `[rows]`, index into `format.PHASES`, if `phases` were asked for.
        tokens: int64 `[rows]`, token ids, -1 where unknown, if `tokens` were asked for.
        requests: who has rows here, if `requests` were asked for; and then
        request: int64 `[rows]`, index into `requests`, -1 for nobody's;
        positions: int64 `[rows]`, -1 where unknown;
        current: bool `[rows]`, which of the rows count: not superseded, rejected, discarded or undecided.
    """

    def __init__(
        self,
        rows: Batch | Joined,
        needs: frozenset[str],
        wanted_layers: tuple[int, ...],
        experts: Mapping[int, int],
        names: Names,
    ) -> None:
        self.rows, self.layers, self.wanted_layers = rows.rows, rows.layers, wanted_layers
        self._columns = {
            (name, layer): rows.column(field, layer)
            for name, field in _FIELDS.items()
            if name in needs
            for layer in self.layers
        }
        self._experts = {
            layer: max(experts.get(layer, 0), _most(self._columns["ids", layer]) + 1)
            for layer in self.layers
            if "ids" in needs
        }
        if "steps" in needs:
            self.steps: Ints = rows.step_numbers
        if "times" in needs:
            self.times: Ints = rows.times.astype(np.int64)
        if "phases" in needs:
            phases = rows.phases.astype(np.int64)
            self.phases: Ints = np.where(phases < len(fmt.PHASES), phases, 0)
        if "tokens" in needs:
            known = rows.column(fmt.TOKENS, fmt.NO_LAYER) is not None
            self.tokens: Ints = rows.tokens if known else np.full(rows.rows, -1)
        if "requests" in needs:
            self.request, self.requests = names.of(rows)
            self.positions: Ints = rows.positions
            self.current: Bools = (rows.flags & NOT_CURRENT) == 0

    def ids(self, layer: int) -> npt.NDArray[Any]:
        """Expert ids, uint8 or uint16 `[rows, k]`; the largest value of the dtype marks an invalid one."""
        ids = self._columns["ids", layer]
        if ids is None:
            raise TraceError(f"layer {layer} has no ids in some of its rows")
        return ids

    def weights(self, layer: int) -> npt.NDArray[Any] | None:
        """Weights `[rows, k]`; None where they were not recorded."""
        return self._columns["weights", layer]

    def logits(self, layer: int) -> npt.NDArray[Any] | None:
        """Router logits `[rows, experts]`; None where they were not recorded."""
        return self._columns["logits", layer]

    def experts(self, layer: int) -> int:
        """Number of experts: what the trace says, or more where an id says so."""
        return self._experts[layer]


class Names:
    """Who the requests of some ranks are. Looked up once for each rank.

    group: the ranks of one engine that record the same steps (`joined.groups`).
    """

    def __init__(self, group: Sequence[Rank]) -> None:
        self._group = {rank.name: rank for rank in group}
        self._engine = group[0].run, group[0].name
        self._known: dict[str, dict[int, tuple[str, str | int]]] = {}

    def of(self, rows: Batch | Joined) -> tuple[Ints, list[Whose]]:
        """(index `[rows]` into what follows, -1 for nobody's; who has rows here)."""
        found: dict[Whose, int] = {}
        if isinstance(rows, Batch):
            return self._indices(rows.rank, rows.request_numbers, found), list(found)
        return rows.by_request(lambda rank, numbers: self._indices(rank.name, numbers, found)), list(found)

    def _indices(self, rank: str, numbers: npt.NDArray[Any], found: dict[Whose, int]) -> Ints:
        if rank not in self._known:
            self._known[rank] = apart(self._group[rank].requests)
        known = self._known[rank]
        there, firsts, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        codes = np.full(len(there), -1, np.int64)
        for at in np.argsort(firsts):  # in the order of appearance, which does not depend on where blocks begin
            if (number := int(there[at])) != fmt.NOBODY:
                whose = (*self._engine, *known.get(number, (f"#{number}", number)))
                codes[at] = found.setdefault(whose, len(found))
        return codes[inverse]


class Slots:
    """Numbers for requests, from 0, in the order of their appearance."""

    def __init__(self) -> None:
        self._found: dict[Whose, int] = {}

    def of(self, requests: Iterable[Whose]) -> Ints:
        """The number of each, new ones included."""
        return np.array([self._found.setdefault(whose, len(self._found)) for whose in requests], np.int64)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def requests(self) -> list[Whose]:
        return list(self._found)


def _most(ids: npt.NDArray[Any] | None) -> int:
    """The largest valid id; -1 without any."""
    if ids is None or not ids.size:
        return -1
    ok = valid(ids)
    return int(ids.max(where=ok, initial=0)) if ok.any() else -1
