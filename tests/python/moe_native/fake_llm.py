"""A stand-in for vLLM's `LLM`, whose workers have the captures of real recorders and whose steps are driven by `Steps`:
prompts in chunks, batches, `n` > 1, pipeline stages, and workers that have a part of the rows each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from capture_program import Model

import moe_native
from moe_native.vllm import layout
from moe_native.vllm.captures import Captures
from moe_native.vllm.steps import Steps

MOST_POSITIONS = 200


class SamplingParams:
    """As far as captures look at them. The tokens that are generated follow from the prompt and the sampling."""

    def __init__(self, max_tokens: int | None = 4, n: int = 1, extra_args: dict[str, Any] | None = None) -> None:
        self.max_tokens, self.n, self.extra_args = max_tokens, n, extra_args
        self.skip_reading_prefix_cache: bool | None = None
        self.output_kind: Any = None

    def clone(self) -> SamplingParams:
        return copy.deepcopy(self)


class Shard:
    """As `moe_native.vllm.forward.Forward`, where each rank has a part of a step's rows."""

    def __init__(self, recorder: moe_native.Recorder, rank: int, ranks: int) -> None:
        self.recorder, self.rank, self.ranks = recorder, rank, ranks
        self.kept: list[tuple[int, int]] = []

    def begin(self, rows: int) -> bool:
        first, end = rows * self.rank // self.ranks, rows * (self.rank + 1) // self.ranks
        self.kept = [(first, end - first)]
        return self.recorder.begin_step(end - first)

    def cut(self, runs: np.ndarray, tokens: Any) -> tuple[np.ndarray, Any]:
        return layout.cut_runs(runs, self.kept), tokens

    @property
    def rows(self) -> slice:
        ((first, count),) = self.kept
        return slice(first, first + count)


_recorders: list[moe_native.Recorder] = []


def shut_down() -> None:
    """The recorders of all workers are closed: bindings that they would keep are another test's."""
    while _recorders:
        _recorders.pop().close()


class Worker:
    """One that records some layers, and all rows of a step or one of `parts`."""

    def __init__(
        self,
        layers: Sequence[int] = (0, 1, 2),
        *,
        part: tuple[int, int] | None = None,
        missed: dict[int, str] | None = None,
        **model: Any,
    ) -> None:
        self.recorder = moe_native.Recorder(None, ring_bytes="256KiB")
        _recorders.append(self.recorder)
        self.model = Model(self.recorder, layers, **model)
        seen = [(layer, self.model.experts, self.model.k, f"layers.{layer}") for layer in layers]
        self.captures = Captures(self.recorder, MOST_POSITIONS, layers=seen, missed=missed or {})
        self.shard = None if part is None else Shard(self.recorder, *part)
        self.runner = SimpleNamespace(execute_model_state=None)
        self.steps = Steps(self.recorder, self.runner, captures=self.captures, forward=self.shard)  # type: ignore[arg-type]
        self.lost_step: int | None = None  # a step that the model forgets to record

    def moe_native_capture(self, command: str, **arguments: Any) -> Any:
        return self.captures.obey(command, **arguments)

    def execute(self, output: Any, batch: list[tuple[str, range]]) -> None:
        positions = [position for _, part in batch for position in part]
        self.runner.input_batch = SimpleNamespace(req_ids=[name for name, _ in batch], num_reqs=len(batch))
        self.runner.positions, self.runner.input_ids = torch.tensor(positions), torch.zeros(len(positions))
        if not self.steps.begin(output):
            return
        self.steps.announce()
        if self.steps.number != self.lost_step:
            self.model.forward(batch, kept=slice(None) if self.shard is None else self.shard.rows)
        assert self.steps.end(output)


class Idle:
    """A worker that leaves recording to another one."""

    def moe_native_capture(self, command: str, **arguments: Any) -> None:
        return None

    def execute(self, output: Any, batch: list[tuple[str, range]]) -> None:
        pass


class LLM:
    """Like vLLM's, it finishes and returns whatever is under way, also what an earlier call has left.

    Attributes:
        names: vLLM's internal id of each prompt's samplings.
        calls, replies: what the workers were asked, and what they said.
        given, options: sampling parameters and other arguments of the last `generate`.
        error: what `generate` raises before its second step.
        running: the samplings that are under way.
    """

    def __init__(self, *workers: Any, chunk: int = 5) -> None:
        self.workers = list(workers) or [Worker()]
        self.chunk = chunk
        self.model_config = SimpleNamespace(model="fake/model", is_multimodal_model=False)
        self.llm_engine = SimpleNamespace(abort_request=self._abort)
        self.request_counter = SimpleNamespace(counter=0)
        self.names: dict[tuple[int, int], str] = {}
        self.calls: list[str] = []
        self.replies: list[list[Any]] = []
        self.given: list[Any] = []
        self.options: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.running: list[Any] = []
        self._ended: set[str] = set()  # of which the workers are to be told

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(max_tokens=2)

    def collective_rpc(self, method: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> list[Any]:
        self.calls.append(args[0] if args else getattr(method, "__name__", method))
        if callable(method):
            return [method(worker) for worker in self.workers]
        self.replies.append([getattr(worker, method)(*args, **(kwargs or {})) for worker in self.workers])
        return self.replies[-1]

    def generate(self, prompts: list[Any], params: list[Any], **options: Any) -> list[Any]:
        self.given, self.options = params, options
        self.enqueue(prompts, params)
        outputs = {request.output.request_id: request.output for request in self.running}
        self._run()
        return list(outputs.values())

    def enqueue(self, prompts: list[Any], params: list[Any]) -> None:
        for number, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            given = prompt if isinstance(prompt, dict) else {"prompt_token_ids": [ord(letter) for letter in prompt]}
            tokens, embeddings = given.get("prompt_token_ids"), given.get("prompt_embeds")
            name = self._name()
            length = len(tokens if embeddings is None else embeddings)
            completions = [
                [100 * number + 10 * child + i for i in range(sampling.max_tokens)] for child in range(sampling.n)
            ]
            output = SimpleNamespace(
                request_id=name,
                prompt_token_ids=[0] * length if tokens is None else tokens,  # as vLLM does for embeddings
                outputs=[SimpleNamespace(index=n, token_ids=ids, text=str(ids)) for n, ids in enumerate(completions)],
            )
            for child in range(sampling.n):
                internal = f"{child}_{name}-0123abcd" if sampling.n > 1 else f"{name}-0123abcd"
                self.names[number, child] = internal
                data = SimpleNamespace(
                    req_id=internal,
                    prompt_len=length,
                    prompt_token_ids=tokens,
                    mm_features=given.get("features", []),
                    sampling_params=sampling,
                    num_computed_tokens=0,
                    block_ids=([],),
                )
                total = length + sampling.max_tokens - 1
                self.running.append(SimpleNamespace(data=data, done=0, total=total, output=output))

    def _name(self) -> str:
        self.request_counter.counter += 1
        return str(self.request_counter.counter - 1)

    def _abort(self, names: list[str]) -> None:
        aborted = [request for request in self.running if request.output.request_id in names]
        self.running = [request for request in self.running if request not in aborted]
        self._ended |= {request.data.req_id for request in aborted}

    def _run(self) -> None:
        while self.running or self._ended:
            running = self.running
            batch = [(r.data.req_id, range(r.done, min(r.done + self.chunk, self._end(r)))) for r in reversed(running)]
            output = scheduled(batch, [r.data for r in running if r.done == 0], self._ended)
            if self.error is not None and any(r.done for r in running):
                raise self.error
            for worker in self.workers:
                worker.execute(output, batch)
            for (_, rows), request in zip(batch, reversed(running), strict=True):
                request.done = rows.stop
            self._ended = {r.data.req_id for r in running if r.done == r.total}
            self.running = [r for r in running if r.done < r.total]

    def _end(self, request: Any) -> int:
        """A prompt is executed in chunks, what follows token by token."""
        return int(request.data.prompt_len if request.done < request.data.prompt_len else request.done + 1)


def scheduled(batch: Sequence[tuple[str, range]], new: Sequence[Any], finished: set[str]) -> Any:
    """What the scheduler says of a step."""
    names = {data.req_id for data in new}
    going_on = [name for name, _ in batch if name not in names]
    return SimpleNamespace(
        finished_req_ids=finished,
        scheduled_new_reqs=list(new),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=going_on,
            new_block_ids=[None] * len(going_on),
            num_computed_tokens=[0] * len(going_on),
            resumed_req_ids=set(),
        ),
        num_scheduled_tokens={name: len(rows) for name, rows in batch},
        scheduled_spec_decode_tokens={},
        total_num_scheduled_tokens=sum(len(rows) for _, rows in batch),
    )
