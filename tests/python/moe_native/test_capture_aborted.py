"""Requests and steps that end early under a capture: it has every row that was executed, or it is an error that says
what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fake_llm import LLM, SamplingParams, shut_down
from test_capture_async import AsyncLLM, without_vllm  # noqa: F401
from test_capture_call import PROMPTS, matches

import moe_native


@pytest.fixture(autouse=True)
def workers_end() -> Iterator[None]:
    yield
    shut_down()


def abort_after(llm: LLM, steps: int) -> None:
    """Somebody else aborts what is under way after so many steps; the output has what was generated up to then."""
    (worker,) = llm.workers
    execute, done = worker.execute, 0

    def counted(output: Any, batch: Any) -> None:
        nonlocal done
        execute(output, batch)
        done += 1
        if done == steps:
            for (_, rows), request in zip(batch, reversed(llm.running), strict=True):
                request.total = rows.stop
                (completion,) = request.output.outputs
                completion.token_ids = completion.token_ids[: max(rows.stop - request.data.prompt_len, 0)]

    worker.execute = counted


def test_a_request_that_is_aborted_leaves_no_output_and_that_is_said() -> None:
    llm = LLM()
    generate, names = llm.generate, {"1"}
    llm.generate = lambda *given, **more: [o for o in generate(*given, **more) if o.request_id not in names]  # type: ignore[method-assign]
    with pytest.raises(moe_native.CaptureError, match=r"returned 2 outputs for 3 prompts: was a request aborted\?"):
        moe_native.capture(llm, PROMPTS)
    # One that an earlier call has left does not stand in for it.
    llm.enqueue(["left over"], [SamplingParams(3)])
    names = {"5"}
    with pytest.raises(moe_native.CaptureError, match=r"returned 2 outputs for 3 prompts: was a request aborted\?"):
        moe_native.capture(llm, PROMPTS)
    assert len(llm.workers[0].recorder.captures) == 0


def test_one_that_is_aborted_within_its_prompt_lacks_rows() -> None:
    llm = LLM(chunk=5)
    abort_after(llm, 1)
    with pytest.raises(moe_native.CaptureError, match="prompt 0 lacks rows from position 5 on, of 12"):
        moe_native.capture(llm, "first prompt", SamplingParams(4))
    assert matches(moe_native.capture(llm, PROMPTS), llm)


@pytest.mark.parametrize(("steps", "rows"), [(4, 12), (6, 14)])
def test_one_that_is_aborted_later_has_the_rows_of_what_it_returned(steps: int, rows: int) -> None:
    llm = LLM(chunk=5)
    abort_after(llm, steps)
    capture = moe_native.capture(llm, "first prompt", SamplingParams(9))
    assert len(capture[0]) == rows and matches(capture, llm)


def test_one_that_is_aborted_before_its_first_output_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM()

    async def none(*_: Any, **__: Any) -> Any:
        for output in ():
            yield output

    monkeypatch.setattr(llm, "generate", none)
    with pytest.raises(moe_native.CaptureError, match=r"no output for prompt 0: was its request aborted\?"):
        asyncio.run(moe_native.acapture(llm, "a"))
    assert llm.calls == ["open", "close"]


def test_a_step_that_raises_and_is_tried_again_is_an_error() -> None:
    """The capture has rows of some layers twice, and from another execution than those of others."""
    llm = LLM()
    (worker,) = llm.workers
    execute, forward = worker.execute, worker.model.forward
    broken = True

    def again(output: Any, batch: Any) -> None:
        nonlocal broken
        if broken and any(rows.start for _, rows in batch):
            broken = False
            worker.model.forward = lambda *_, **__: 1 / 0
            with pytest.raises(ZeroDivisionError):
                execute(output, batch)
            worker.steps.abort()
            worker.model.forward = forward
        execute(output, batch)

    worker.execute = again
    with pytest.raises(moe_native.CaptureError, match="could not keep all that was captured: 1 step or"):
        moe_native.capture(llm, PROMPTS)
    assert matches(moe_native.capture(llm, PROMPTS), llm)
