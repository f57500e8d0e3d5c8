"""What a process that died left behind the last whole block of its segments: fragments of a step, and what is in its
ring."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from moe_trace.errors import DamagedTrace
from moe_trace.file_block import FileBlock
from moe_trace.ring import Ring
from moe_trace.ring_block import RingBlock
from moe_trace.segment import Segment


class Tail:
    """Of one rank. Where nothing was left, as of a closed one, it is empty.

    Args:
        segments: the rank's, in order.
        ring: of the process that died; None where there is none to be read.
        exact: whether the ring's weights are to be kept as they are.
        noted: gets a sentence for each block of the segments that cannot be read.
    """

    def __init__(self, segments: Sequence[Segment], ring: Ring | None, exact: bool, noted: list[str]) -> None:
        self._segments, self._ring, self._exact, self._noted = segments, ring, exact, noted

    @cached_property
    def cut_step(self) -> FileBlock | None:
        """The fragments with which the last segment ends, of a step that no block completes."""
        if not self._segments or self._segments[-1].closed:
            return None
        last = next(self._segments[-1].blocks(newest_first=True), None)
        return last if last is not None and not last.complete else None

    @property
    def cut_step_was_aborted(self) -> bool:
        """Whether the ring says that the program gave that step up, or that it was lost and is counted."""
        if self.cut_step is None or self._ring is None:
            return False
        _ = self.blocks  # by which the ring learns what was aborted
        return self.cut_step.first_step in self._ring.aborted

    @property
    def cut_step_was_counted(self) -> bool:
        """Whether no row of that step was to be stored: its fragments have none, and its counts died with the
        process."""
        return self.cut_step is not None and not self.cut_step.pieces()

    @property
    def empty(self) -> bool:
        """Whether the blocks of the segments are all there is, and count."""
        return self.cut_step is None and not self.blocks

    @property
    def blocks(self) -> list[RingBlock]:
        """The steps that were committed but had not reached a segment when the process died."""
        return self._read[0]

    @property
    def records(self) -> dict[int, tuple[int, int]]:
        """Of each lane of the ring, the first and the last record that `blocks` account for."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[list[RingBlock], dict[int, tuple[int, int]]]:
        ring = self._ring
        if ring is None:
            return [], {}
        written: dict[int, int] = {}
        after_step = -1
        for block in (block for segment in reversed(self._segments) for block in segment.blocks(newest_first=True)):
            try:
                for lane in block.lanes:
                    written[int(lane["lane"])] = max(written.get(int(lane["lane"]), 0), int(lane["last"]))
            except DamagedTrace as error:  # its steps are known all the same
                self._noted.append(str(error))
            if block.complete and block.step_count:
                after_step = max(after_step, block.last_step)
            if len(written) == ring.lanes and after_step >= 0:
                break
        cut = self.cut_step
        blocks = ring.blocks(written, after_step, self._exact, (cut.first_step, cut.pieces()) if cut else (-1, ()))
        if cut is not None and self.cut_step_was_counted:
            blocks = [block for block in blocks if block.first_step != cut.first_step]
        chains = {lane: ring.chain(lane, written.get(lane, 0)) for lane in range(ring.lanes)}
        return blocks, {lane: (chain[0].sequence, chain[-1].sequence) for lane, chain in chains.items() if chain}

    def replaces(self, block: FileBlock) -> bool:
        """Whether `block`, of the last segment, is fragments whose step was given up, or is in `blocks` as a whole."""
        cut = self.cut_step
        if cut is None or block.offset != cut.offset:
            return False
        return self.cut_step_was_aborted or bool(self.blocks and self.blocks[0].first_step == cut.first_step)

    @property
    def _only_in_fragments(self) -> FileBlock | None:
        """`cut_step`, where the process died in it and no ring has more of it."""
        return self.cut_step if self.cut_step is not None and not self.replaces(self.cut_step) else None

    @property
    def incomplete(self) -> list[tuple[int, int, int]]:
        """What no segment and no counter of the ring says is lost: steps, layers, rows."""
        found = []
        cut = self._only_in_fragments
        if cut is not None and self.cut_step_was_counted:
            found.append((1, 0, cut.executed_rows))
        elif cut is not None and (gaps := {piece.layer for piece in cut.pieces()} - set(cut.layers)):
            found.append((0, len(gaps), len(gaps) * cut.executed_rows))
        for block in self.blocks:
            if block.incomplete_layers:
                found.append((0, block.incomplete_layers, block.incomplete_layers * block.executed_rows))
        return found

    def problems(self, directory: Path) -> list[str]:
        """A sentence for each step in which the process died."""
        problems = []
        cut = [block.first_step for block in self.blocks if not block.complete]
        if self._only_in_fragments is not None and self.cut_step_was_counted:
            problems.append(
                f"the process died in {directory} while step {self._only_in_fragments.first_step} left its ring, "
                "of which no row was to be stored: its counts are lost"
            )
        elif self._only_in_fragments is not None:
            cut.append(self._only_in_fragments.first_step)
        problems += self._ring.problems if self._ring is not None else []
        return problems + [
            f"the process died inside step {n} in {directory}: its whole layers are kept, as nobody's" for n in cut
        ]
