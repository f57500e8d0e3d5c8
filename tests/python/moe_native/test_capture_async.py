"""`acapture` on a stand-in for vLLM's `AsyncLLM`: requests of its own that run beside others."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_llm import LLM, Idle, SamplingParams, Worker, shut_down

import moe_native
from moe_native.captures import call, engine


class AsyncLLM(LLM):
    """A request runs as a whole when it is its turn. `failing`: the number of one that does not."""

    def __init__(self, *workers: Any) -> None:
        super().__init__(*workers)
        self.model_config.get_diff_sampling_param = lambda: {"max_tokens": 3}
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.failing: int | None = None
        self.of_request: dict[str, dict[int, str]] = {}  # internal ids of its samplings
        self.said: list[Any] = []

    async def collective_rpc(self, method: Any, **arguments: Any) -> Any:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().collective_rpc(method, **arguments)

    async def generate(self, prompt: Any, params: Any, name: str, **options: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        self.begun.append(name)
        self.said.append((params.output_kind, options))
        try:
            await asyncio.sleep(0.01 if self.failing is None or name.endswith(f"-{self.failing}") else 60)
            if self.failing is not None:
                raise RuntimeError("refused")
            self._now = name
            (output,) = super().generate([prompt], [params], **options)
            self.of_request[name] = {child: internal for (_, child), internal in self.names.items()}
            self.names = {}
            yield SimpleNamespace(outputs=[])  # not the last
            yield output
        finally:
            self.ended.append(name)

    def _name(self) -> str:
        return self._now


@pytest.fixture(autouse=True)
def workers_end() -> Iterator[None]:
    yield
    shut_down()


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = SimpleNamespace(FINAL_ONLY="final only")
    params = SimpleNamespace(from_optional=lambda **given: SamplingParams(**given))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=params))  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", SimpleNamespace(RequestOutputKind=kinds))  # type: ignore[misc]


def matches(capture: moe_native.Capture, llm: AsyncLLM) -> bool:
    for sample in capture:
        internal = llm.of_request[sample.request_output.request_id][sample.completion_index]
        for layer in capture.layers:
            for field in capture.fields:
                found = getattr(sample, field)[layer]
                expected = llm.workers[0].model.rows(field, layer, internal, range(len(sample))).to(found.dtype)
                assert torch.equal(found, expected), (sample, field, layer)
    return True


def test_samples_are_in_the_order_of_the_prompts() -> None:
    llm = AsyncLLM(Worker(), Idle())
    mine = SamplingParams(3, n=2)
    capture = asyncio.run(moe_native.acapture(llm, ["first", [1, 2], "x"], mine, layers="0,2", priority=5))
    assert [(sample.prompt_index, sample.completion_index) for sample in capture] == [
        (prompt, child) for prompt in range(3) for child in range(2)
    ]
    assert [len(sample) for sample in capture] == [7, 7, 4, 4, 3, 3] and capture.layers == [0, 2]
    assert matches(capture, llm) and llm.calls == ["open", "close"]
    assert llm.said == [("final only", {"priority": 5})] * 3 and mine.output_kind is None
    assert [name.rpartition("-")[2] for name in llm.begun] == ["0", "1", "2"]
    assert [output.request_id for output in capture.outputs] == llm.begun


def test_without_parameters_they_are_the_models_own() -> None:
    llm = AsyncLLM()
    capture = asyncio.run(moe_native.acapture(llm, [[1, 2]]))
    assert len(capture[0]) == 4 and llm.given[0].max_tokens == 3


def test_two_at_a_time_have_each_their_rows() -> None:
    llm = AsyncLLM()

    async def both() -> Any:
        return await asyncio.gather(
            moe_native.acapture(llm, ["one", "two"], fields="logits", layers=[1]),
            moe_native.acapture(llm, ["three"], fields="ids,weights,hidden"),
        )

    first, second = asyncio.run(both())
    assert llm.calls == ["open", "open", "close", "close"]
    assert len({name.rpartition("-")[0] for name in llm.begun}) == 2
    assert matches(first, llm) and matches(second, llm)
    assert (first.fields, first.layers, len(first)) == (("ids", "logits"), [1], 2)
    assert (second.fields, second.layers, len(second)) == (("ids", "weights", "hidden"), [0, 1, 2], 1)


def test_when_one_request_fails_the_others_are_stopped() -> None:
    llm = AsyncLLM()
    llm.failing = 1
    with pytest.raises(RuntimeError, match="refused"):
        asyncio.run(moe_native.acapture(llm, ["a", "b", "c"]))
    assert sorted(llm.ended) == sorted(llm.begun) and len(llm.begun) == 3
    assert llm.calls == ["open", "close"] and len(llm.workers[0].recorder.captures) == 0


def test_a_caller_that_is_cancelled_closes_the_capture() -> None:
    llm = AsyncLLM()
    llm.failing = 99

    async def give_up() -> None:
        task = asyncio.ensure_future(moe_native.acapture(llm, ["a", "b"]))
        while len(llm.begun) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert sorted(llm.ended) == sorted(llm.begun)
    assert llm.calls == ["open", "close"] and len(llm.workers[0].recorder.captures) == 0


def test_a_caller_that_is_cancelled_while_it_is_opened_closes_the_capture() -> None:
    llm = AsyncLLM()
    answer = llm.collective_rpc

    async def slow(method: Any, **arguments: Any) -> Any:
        replies = await answer(method, **arguments)
        if arguments["args"] == ("open",):
            await asyncio.sleep(60)
        return replies

    llm.collective_rpc = slow  # type: ignore[method-assign]

    async def give_up() -> None:
        task = asyncio.ensure_future(moe_native.acapture(llm, "a"))
        while not llm.calls:
            await asyncio.sleep(0.01)
        assert len(llm.workers[0].recorder.captures) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert llm.calls == ["open", "close"] and len(llm.workers[0].recorder.captures) == 0


def test_an_engine_that_does_not_answer_after_an_error_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_PATIENCE", 0.05)
    llm = AsyncLLM()
    llm.failing = 0
    answer = llm.collective_rpc
    asked: list[str] = []

    async def dead(method: Any, **arguments: Any) -> Any:
        asked.extend(arguments["args"])
        if arguments["args"] == ("close",):
            await asyncio.Future()
        return await answer(method, **arguments)

    llm.collective_rpc = dead  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="refused"):
        asyncio.run(asyncio.wait_for(moe_native.acapture(llm, "a"), 60))
    assert asked == ["open", "close"]


def test_what_goes_wrong_is_told() -> None:
    llm = AsyncLLM()
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        asyncio.run(moe_native.acapture(llm, "a", [SamplingParams()] * 2))
    assert llm.calls == []
    with pytest.raises(ValueError, match="no MoE layer 9; it has 0-2"):
        asyncio.run(moe_native.acapture(llm, "a", layers=[9]))
    assert llm.calls == ["open", "close"]
    with pytest.raises(ValueError, match=r"give a vllm\.LLM, or an AsyncLLM to acapture"):
        asyncio.run(moe_native.acapture(None, "a"))


def test_each_kind_of_engine_has_its_own_call() -> None:
    llm, plain = AsyncLLM(), LLM()
    with pytest.raises(ValueError, match=r"^AsyncLLM is asynchronous: capture it with await moe_native\.acapture"):
        moe_native.capture(llm, "a")
    with pytest.raises(ValueError, match=r"^LLM is not asynchronous: capture it with moe_native\.capture\(\.\.\.\)"):
        asyncio.run(moe_native.acapture(plain, "a"))
    assert llm.calls == plain.calls == []


class OfRanks(AsyncLLM):
    """Several data-parallel engines, of which rank 0 is asked."""

    def __init__(self, **parallel: Any) -> None:
        super().__init__()
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel))

    async def generate(  # type: ignore[override]
        self, prompt: Any, params: Any, name: str, *, data_parallel_rank: int | None = None
    ) -> AsyncIterator[Any]:
        async for output in super().generate(prompt, params, name, data_parallel_rank=data_parallel_rank):
            yield output


def test_prompts_that_are_balanced_over_ranks_are_refused() -> None:
    llm = OfRanks(data_parallel_size=2, data_parallel_external_lb=False)
    for rank in ({}, {"data_parallel_rank": 1}, {"data_parallel_rank": None}):
        with pytest.raises(moe_native.CaptureError, match=r"data_parallel_size=2, .*: pass data_parallel_rank=0 to"):
            asyncio.run(moe_native.acapture(llm, ["a", "b"], **rank))
    assert llm.calls == []
    capture = asyncio.run(moe_native.acapture(llm, ["a", "b"], data_parallel_rank=0))
    assert matches(capture, llm) and [options for _, options in llm.said] == [{"data_parallel_rank": 0}] * 2
    older = AsyncLLM()  # whose generate() cannot choose
    older.vllm_config = llm.vllm_config  # type: ignore[attr-defined]
    older.generate = lambda prompt, params, name: None  # type: ignore[assignment, method-assign, misc]
    with pytest.raises(moe_native.CaptureError, match=r"only rank 0 can be captured: build an engine with"):
        asyncio.run(moe_native.acapture(older, "a"))


@pytest.mark.parametrize("size, external", [(1, False), (2, True)])
def test_a_single_engine_needs_no_rank(size: int, external: bool) -> None:
    llm = OfRanks(data_parallel_size=size, data_parallel_external_lb=external)
    assert matches(asyncio.run(moe_native.acapture(llm, ["a", "b"])), llm)


@pytest.mark.parametrize("said", [f"Method '{engine.METHOD}' is not implemented.", "the engine died"])
def test_an_engine_that_was_built_before_arming_cannot_be_bound(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", "1")  # as arm() leaves it
    llm = AsyncLLM(SimpleNamespace())

    async def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(said)

    llm.collective_rpc = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(moe_native.acapture(llm, "a"))
    if engine.METHOD in said:
        assert isinstance(caught.value, moe_native.CaptureError) and "moe_native.arm()" in str(caught.value)
    else:
        assert str(caught.value) == said
