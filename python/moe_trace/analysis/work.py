"""How the rows of a selection are divided: into windows of steps that fit into memory, and those among processes.

A window is the steps of a block of one rank. Ranks that have to be joined, pipeline stages and sequence-parallel
shards, are joined window by window (`moe_trace.joined`), so that of them too only a block's worth is in memory. Steps
tell windows apart in each process alike, also where a live trace has grown meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from moe_trace import joined
from moe_trace.batch import Batch, Filter
from moe_trace.block import Block
from moe_trace.errors import DamagedTrace
from moe_trace.joined import Group, Joined
from moe_trace.rank import Rank
from moe_trace.select import Selection


@dataclass(frozen=True)
class Window:
    """Steps [first, end) of one group of ranks, and about how many rows they have."""

    group: tuple[str, ...]  # names of its run and its ranks
    first: int
    end: int
    rows: int


def windows(selection: Selection) -> list[Window]:
    """All windows of a selection, those of a group together and in order. Only headers of blocks are read."""
    return [window for group in joined.groups(selection._ranks) for window in _of_group(selection, group)]


def split(all_windows: Sequence[Window], parts: int) -> list[list[Window]]:
    """At most `parts` consecutive lists of about as many rows each, none of them empty."""
    ends = np.cumsum([window.rows for window in all_windows])
    if not len(ends):
        return []
    middles = ends - np.array([window.rows for window in all_windows]) / 2
    of = np.minimum(middles * parts // max(int(ends[-1]), 1), parts - 1)
    found = [[window for window, part in zip(all_windows, of, strict=True) if part == n] for n in range(parts)]
    return [share for share in found if share]


class Reader:
    """Reads windows, those of a group in order.

    Attributes:
        left_out: sentences that say what could not be read.
        lacking: how many rows were left out because not all stages of a pipeline have them.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._groups = {_name(group): group for group in joined.groups(selection._ranks)}
        self._ahead: dict[tuple[str, str], _Ahead] = {}
        self.left_out: list[str] = []
        self.lacking = 0

    def group(self, window: Window) -> list[Rank]:
        """The ranks of a window; none where they are gone."""
        return [rank for shard in self._groups.get(window.group, ()) for rank in shard]

    def read(self, window: Window) -> Iterator[Batch | Joined]:
        """The selected rows of a window."""
        asked, ranks = _within(self._selection._asked, window), self.group(window)
        if not ranks:
            self.left_out.append(f"{'/'.join(window.group)} is gone since the trace was opened: its rows are left out")
        blocks = {rank.name: self._blocks(rank, window) for rank in ranks}

        def batches(rank: Rank, asked: Filter) -> Iterator[Batch]:
            for block in blocks[rank.name]:
                try:
                    batch = self._selection._batch(rank, block, asked)
                except DamagedTrace as error:
                    self.leave_out(block.first_step, block.last_step, error)
                    continue
                if batch is not None:
                    yield batch

        try:
            for rows in joined.parts(ranks, asked, batches):
                self.lacking += rows.left_out if isinstance(rows, Joined) else 0
                if rows.rows:
                    yield rows
        except DamagedTrace as error:
            self.leave_out(window.first, window.end - 1, error)

    def leave_out(self, first: int, last: int, error: DamagedTrace) -> None:
        """Say that the rows of these steps are left out."""
        self.left_out.append(f"the rows of steps {first:,} to {last:,} are left out: {error}")

    def _blocks(self, rank: Rank, window: Window) -> list[Block]:
        key = rank.run, rank.name
        if key not in self._ahead:
            self._ahead[key] = _Ahead(rank.blocks())
        return self._ahead[key].of(window)


class _Ahead:
    """The blocks of a rank, each made once, in the order of their steps."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._coming = blocks
        self._here: list[Block] = []

    def of(self, window: Window) -> list[Block]:
        """The blocks that have steps of a window; windows ascend."""
        while not (self._here and self._here[-1].first_step >= window.end):
            block = next(self._coming, None)
            if block is None:
                break
            if block.rows and block.last_step >= window.first:
                self._here.append(block)
        found = [block for block in self._here if block.first_step < window.end]
        self._here = [block for block in self._here if block.last_step >= window.end]
        return found


def _name(group: Group) -> tuple[str, ...]:
    ranks = [rank for shard in group for rank in shard]
    return (ranks[0].run, *(rank.name for rank in ranks))


def _of_group(selection: Selection, group: Group) -> list[Window]:
    asked = selection._asked
    ranks = [rank for shard in group for rank in shard if _has_layers(rank, asked)]
    blocks = [[(b.first_step, b.last_step, b.rows) for b in rank.blocks() if b.rows] for rank in ranks]
    blocks = [of_rank for of_rank in blocks if of_rank]
    if not blocks:
        return []
    first, last = min(b[0] for of in blocks for b in of), max(b[1] for of in blocks for b in of)
    if len(ranks) > 1 and not (asked.first_ns is None and asked.end_ns is None):
        # Of joined ranks the first stage's times count. Without its steps, the others' would seem to lack their rows.
        span = _steps_in_time([shard[0] for shard in group], asked)
        if span is None:
            return []
        first, last = max(first, span[0]), min(last, span[1])
    finest = max(blocks, key=len)
    rows = dict.fromkeys(sorted({first, *(step for step, _, _ in finest if first < step <= last)}), 0)
    starts = np.array(list(rows), np.uint64)
    for step, _, n in finest:
        rows[int(starts[max(int(np.searchsorted(starts, step, "right")) - 1, 0)])] += n
    edges = [*rows, last + 1]
    name = _name(group)
    found = [Window(name, a, b, n) for (a, b), n in zip(pairwise(edges), rows.values(), strict=True)]
    return [window for window in found if _some(_within(asked, window))]


def _has_layers(rank: Rank, asked: Filter) -> bool:
    return bool(rank.layers if asked.layers is None else rank.layers.intersection(asked.layers))


def _steps_in_time(ranks: Sequence[Rank], asked: Filter) -> tuple[int, int] | None:
    """The first and last step that these ranks began within the time asked for."""
    found: list[int] = []
    for rank in ranks:
        for block in rank.blocks():
            if not block.rows or asked.misses(block.first_time_ns, block.last_time_ns, 0, 0):
                continue
            try:
                times, numbers = block.steps["time_ns"], block.steps["step"]
            except DamagedTrace:  # said when its rows are read
                continue
            inside = np.ones(len(times), bool)
            if asked.first_ns is not None:
                inside &= times >= asked.first_ns
            if asked.end_ns is not None:
                inside &= times < asked.end_ns
            found += [int(numbers[inside].min()), int(numbers[inside].max())] if inside.any() else []
    return (min(found), max(found)) if found else None


def _within(asked: Filter, window: Window) -> Filter:
    end = window.end if asked.end_step is None else min(asked.end_step, window.end)
    return replace(asked, first_step=max(asked.first_step or 0, window.first), end_step=end)


def _some(asked: Filter) -> bool:
    return asked.first_step is None or asked.end_step is None or asked.first_step < asked.end_step
