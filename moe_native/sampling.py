"""What is stored of each step while a recorder's tier may change: which rows are only counted, and where the row is of
which a late fact is said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from moe_native.config import Config
from moe_native.notes import COUNTED
from moe_native.runs import COUNTED_FLAG, UNKNOWN
from moe_native.tier import Tier

MOST_SAMPLED_STEPS = 1024
Place = tuple[int, int, int]  # request, first position, how many


class Sampling:
    """The tier of a recorder, and the one that is wanted from the next step on.

    `want` may be called by any thread; everything else belongs to the model's thread.

    Attributes:
        may_leave_out: whether a row may be counted and not stored: by this tier, or by one from before, of which there
            may be requests left.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self._wanted: Tier | None = None
        self._lock = threading.Lock()
        self.may_leave_out = tier.sample < 1 or tier.counted
        self._steps = _SampledSteps()

    @property
    def changes(self) -> bool:
        """Whether another tier is wanted."""
        return self._wanted is not None

    @property
    def next(self) -> Tier:
        """The tier from the next step on."""
        return self._wanted or self.tier

    def want(
        self,
        fields: str | Iterable[str] | None,
        layers: str | Iterable[int] | None,
        sample: float | str | None,
    ) -> None:
        """Change some settings from the next step on; None leaves one as it is.

        Raises:
            ValueError: a value is not usable; nothing is changed.
        """
        asked = Config.of_arguments(fields=fields, layers=layers, sample=sample)
        with self._lock:
            old = self._wanted or self.tier
            self._wanted = Tier(
                old.fields if fields is None else asked.fields,
                old.layers if layers is None else Tier.layer_set(asked.layers),
                old.sample if sample is None else asked.sample,
            )

    def adopt(self, take: Callable[[Tier], None]) -> None:
        """Between two steps: make the wanted tier, if there is one, that of the steps to come, and tell `take`."""
        with self._lock:
            tier, self._wanted = self._wanted, None
            if tier is None:
                return
            self.tier = tier
        self.may_leave_out = self.may_leave_out or tier.sample < 1 or tier.counted
        take(tier)

    def mark(self, step: int, runs: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """The runs of a step, those marked whose rows are counted and not stored."""
        if not self.may_leave_out:
            return runs
        counted = runs["request"] >= COUNTED  # nobody's too
        if self.tier.counted:
            counted[:] = True
        elif self.tier.sample >= 1:
            counted &= runs["request"] != UNKNOWN
        if counted.any():
            runs = runs.copy()
            runs["flags"][counted] |= COUNTED_FLAG
            self._steps.add(step, runs)
        return runs

    def places(self, step: int, row: int, count: int) -> list[Place] | None:
        """Where the rows [row, row + count) of a step are, if not all of its rows are stored; None if they are."""
        return self._steps.find(step, row, count) if self.may_leave_out else None


class _SampledSteps:
    """Whose rows the latest steps had of which only some are stored: a late fact about such a step says its row by
    request and position, because where it is stored depends on the rows before it."""

    def __init__(self) -> None:
        self._runs: dict[int, npt.NDArray[np.void]] = {}
        self._forgotten = -1

    def add(self, step: int, runs: npt.NDArray[np.void]) -> None:
        """A step that has rows which are not stored."""
        self._runs[step] = runs
        if len(self._runs) > MOST_SAMPLED_STEPS:
            self._forgotten = next(iter(self._runs))
            del self._runs[self._forgotten]

    def find(self, step: int, row: int, count: int) -> list[Place] | None:
        """Rows [row, row + count) of a step as (request, first position, how many), those left out that are not known;
        None for a step of which all rows are stored."""
        runs = self._runs.get(step)
        if runs is None:
            return [] if step <= self._forgotten else None
        ends = np.cumsum(runs["count"].astype(np.int64))
        found: list[Place] = []
        for run, end in zip(runs.tolist(), ends.tolist(), strict=True):
            request, position, rows = run[:3]
            first, last = max(row, end - rows), min(row + count, end)
            if first < last and position != UNKNOWN:
                found.append((request, position + first - (end - rows), last - first))
        return found
