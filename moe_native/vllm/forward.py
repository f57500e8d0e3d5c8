"""Says, inside each forward pass, where in the routers' tensors this rank's rows lie.

Only vLLM's forward context knows how many rows the other data-parallel ranks have in a step, and in which thread a
microbatch runs. So the loaded model gets a hook that runs before its forward pass, in each of these threads, outside
of what is compiled. Where the layout needs no such thing, there is no hook (`layout.needs_places`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_native.recorder import Recorder
from moe_native.vllm import layout

Guard = Callable[..., Any]


def obstacle(model: torch.nn.Module) -> str:
    """Why `model` cannot have the hook; empty when it can."""
    if getattr(model, "_compiled_call_impl", None) is not None:  # the hook would be a part of its graph
        return "the model is compiled as a whole: which rows are whose cannot be seen in this layout of ranks"
    return ""


class Forward:
    """The places of the open step's rows.

    Args:
        guard: calls `guard(what, action)` so that no failure of the action reaches the model.
    """

    def __init__(self, model: torch.nn.Module, recorder: Recorder, parallel: Mapping[str, Any], guard: Guard) -> None:
        self._recorder = recorder
        self._guard = guard
        self._rank = {
            "dp_rank": parallel["data_parallel_rank"],
            "tp_rank": parallel["tensor_parallel_rank"],
            "tp_size": parallel["tensor_parallel_size"],
            "sequence_parallel": bool(parallel["sequence_parallel"]),
        }
        self._rows = 0
        self._plan: layout.Plan | None = None
        model.register_forward_pre_hook(self._before)

    def begin(self, rows: int) -> bool:
        """Open a step of `rows` real rows. Whether it is recorded."""
        self._rows, self._plan = rows, None
        return self._recorder.begin_step(rows, ())

    def cut(
        self, runs: npt.NDArray[np.void], tokens: npt.NDArray[Any] | None
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[Any] | None]:
        """Runs and token ids of the rows that this rank records, from those of the step."""
        if not self._is_cut:
            return runs, tokens
        return layout.cut_runs(runs, self.kept), None if tokens is None else layout.cut_rows(tokens, self.kept)

    @property
    def kept(self) -> Sequence[layout.Span]:
        """The spans of the step's rows that this rank records."""
        return ((0, self._rows),) if self._plan is None else self._plan.kept

    @property
    def _is_cut(self) -> bool:
        return self._plan is not None and self._plan.rows < self._rows

    def _before(self, *_: Any) -> None:
        if self._recorder.step_open:
            self._guard("placing a step's rows", self._place)

    def _place(self) -> None:
        batches, own = _batches(self._rank["dp_rank"])
        # The first microbatch plans for all: another one may find it gone.
        if self._plan is None:
            made = layout.plan(self._rows, batches, **self._rank)
            if made.rows < self._rows:
                self._recorder.narrow(made.rows)
            self._plan = made
        self._recorder.place(self._plan.places[own])


def _batches(dp_rank: int) -> tuple[list[list[int]], int]:
    """Rows of each data-parallel rank in each microbatch of the step, and the number of this thread's. Without
    microbatches there is one."""
    from vllm import forward_context
    from vllm.v1.worker import ubatching

    if not ubatching.dbo_enabled():
        return [_tokens(forward_context.get_forward_context())], 0
    contexts = ubatching._CURRENT_CONTEXTS[: ubatching._NUM_UBATCHES]
    there = [_tokens(context.forward_context) if context is not None else [] for context in contexts]
    return there, ubatching.dbo_current_ubatch_id()


def _tokens(context: Any) -> list[int]:
    if context.dp_metadata is None:
        raise LookupError("the forward context does not say how many rows the data-parallel ranks have")
    tokens: list[int] = context.dp_metadata.num_tokens_across_dp_cpu.tolist()
    return tokens
