"""`capture` and `acapture`: the routing of given prompts, as tensors in the caller's process."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from moe_native.captures.engine import METHOD, Exchange, built_before_arming, not_armed
from moe_native.captures.errors import CaptureError, NotArmedError
from moe_native.captures.prompts import resolve
from moe_native.captures.result import Capture
from moe_native.capturing import DEFAULT_FIELDS

_PATIENCE = 5.0  # seconds, for an engine to close a capture after an error


def capture(
    llm: Any,
    prompts: Any,
    sampling_params: Any = None,
    *,
    fields: str | Iterable[str] | None = DEFAULT_FIELDS,
    layers: str | Iterable[int] | None = None,
    **options: Any,
) -> Capture:
    """Generate from prompts with a vLLM `LLM`, and return how each token was routed.

        moe_native.arm()                            # before the engine is built
        llm = LLM(model)
        capture = moe_native.capture(llm, ["Hello"], SamplingParams(max_tokens=20))
        capture[0].logits[12]                       # [rows, experts]

    Exact under batching, chunked prefill, preemption and `n` > 1. The prompts do not read the prefix cache, because a
    cached token is not executed; other requests do. A trace that is being recorded meanwhile goes on as it is. While
    prompts are captured the model waits for room in the ring rather than lose a row.

    Args:
        llm: vLLM's `LLM`.
        prompts: one, or a list: strings, lists of token ids, or dicts as vLLM takes them. `multi_modal_data` may hold
            PIL images, arrays, paths, URLs and base64 data URLs, or lists of them.
        sampling_params: vLLM's, one for all or one a prompt; None for the model's own defaults.
        fields: of `ids`, `weights`, `logits` and `hidden` (the router's input), also as `"ids,logits"`; None for the
            first three. `ids` are always captured.
        layers: the layers, also as `"0,4-7"` or an array; None for all whose routing is seen.
        options: more arguments for `LLM.generate`, such as `lora_request`.

    Returns:
        A `Capture`, a `Sample` for each prompt and sampling in their order. A sample has a row for each token but the
        last one that was generated.

    Raises:
        ValueError: an argument is not usable; the message says which and why.
        FileNotFoundError: an image is not there.
        CaptureError: the engine cannot be captured, a row is missing, or a worker tells of a problem.
    """
    exchange = Exchange(fields, layers)
    config = _model_config(llm, for_async=False)
    asked = resolve(prompts, model=config.model, takes_images=_takes_images(config))
    params = _params(sampling_params, len(asked), llm.get_default_sampling_params)
    try:
        try:
            exchange.opened(_open(llm, exchange))
            _warn_of(exchange)
            marked = [exchange.mark(each, number) for number, each in enumerate(params)]
            outputs = _generate(llm, asked, marked, options)
        except NotArmedError:  # nothing that could be closed
            raise
        except BaseException:
            _give_up(llm, exchange)
            raise
        found = exchange.closed(_close(llm, exchange))
        return Capture(outputs, asked, exchange, found, config.model)
    finally:
        exchange.release()


async def acapture(
    llm: Any,
    prompts: Any,
    sampling_params: Any = None,
    *,
    fields: str | Iterable[str] | None = DEFAULT_FIELDS,
    layers: str | Iterable[int] | None = None,
    **options: Any,
) -> Capture:
    """`capture` for vLLM's `AsyncLLM`: several may run at a time, among other requests. `options`: more arguments for
    `AsyncLLM.generate`; with a data_parallel_size above 1, `data_parallel_rank=0` is needed."""
    exchange = Exchange(fields, layers)
    config = _model_config(llm, for_async=True)
    asked = await asyncio.to_thread(resolve, prompts, model=config.model, takes_images=_takes_images(config))
    params = _params(sampling_params, len(asked), lambda: _default_params(config))
    _check_ranks(llm, options)
    try:
        try:
            exchange.opened(await _aopen(llm, exchange))
            _warn_of(exchange)
            marked = [exchange.mark(each, number) for number, each in enumerate(params)]
            outputs = await _agenerate(llm, asked, marked, exchange.name, options)
        except NotArmedError:
            raise
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                await asyncio.wait_for(_close(llm, exchange), _PATIENCE)
            raise
        found = exchange.closed(await _close(llm, exchange))
        return Capture(outputs, asked, exchange, found, config.model)
    finally:
        exchange.release()


def _open(llm: Any, exchange: Exchange) -> list[Any]:
    arguments, keywords = exchange.open_arguments
    try:
        return list(llm.collective_rpc(METHOD, args=arguments, kwargs=keywords))
    except Exception as error:
        if not not_armed(error):
            raise
    _bind_late(llm)
    return list(llm.collective_rpc(METHOD, args=arguments, kwargs=keywords))


async def _aopen(llm: Any, exchange: Exchange) -> list[Any]:
    arguments, keywords = exchange.open_arguments
    try:
        return list(await llm.collective_rpc(METHOD, args=arguments, kwargs=keywords))
    except Exception as error:
        if not_armed(error):
            raise built_before_arming() from error
        raise


def _close(llm: Any, exchange: Exchange) -> Any:
    """The workers' answers, of an AsyncLLM to be awaited. One that has not opened the capture answers with an error."""
    arguments, keywords = exchange.close_arguments
    return llm.collective_rpc(METHOD, args=arguments, kwargs=keywords)


def _give_up(llm: Any, exchange: Exchange) -> None:
    """Close the capture after an error, which is the one to tell. Control-C reaches the engine's process as well, so
    that it may never answer: then nobody waits for it."""

    def close() -> None:
        with contextlib.suppress(Exception):
            _close(llm, exchange)

    thread = threading.Thread(target=close, name="moe_native close", daemon=True)
    thread.start()
    thread.join(_PATIENCE)


def _generate(llm: Any, prompts: list[Any], params: list[Any], options: dict[str, Any]) -> list[Any]:
    first = _next_number(llm)
    try:
        outputs = llm.generate(prompts, params, **{"use_tqdm": False, **options})
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            llm.llm_engine.abort_request([str(number) for number in range(first, _next_number(llm))])
        raise
    # Whatever else the engine had under way is finished and returned as well, sorted by number: ours are the newest.
    ours = list(outputs[-len(prompts) :])
    earlier = {str(number) for number in range(first)}
    returned = sum(output.request_id not in earlier for output in ours)
    if returned < len(prompts):
        raise CaptureError(f"vLLM returned {returned} outputs for {len(prompts)} prompts: was a request aborted?")
    return ours


def _next_number(llm: Any) -> int:
    """By which vLLM will name the next request of an `LLM`."""
    return int(getattr(getattr(llm, "request_counter", None), "counter", 0))


async def _agenerate(llm: Any, prompts: list[Any], params: list[Any], name: str, options: dict[str, Any]) -> list[Any]:
    from vllm.sampling_params import RequestOutputKind

    async def one(number: int) -> Any:
        params[number].output_kind = RequestOutputKind.FINAL_ONLY
        stream = llm.generate(prompts[number], params[number], f"{name}-{number}", **options)
        outputs = [output async for output in stream]
        if not outputs:
            raise CaptureError(f"vLLM returned no output for prompt {number}: was its request aborted?")
        return outputs[-1]

    tasks = [asyncio.ensure_future(one(number)) for number in range(len(prompts))]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _bind_late(llm: Any) -> None:
    """Raises CaptureError where the engine cannot be bound any more."""
    from moe_native.vllm.worker import follow_loaded

    try:
        replies = llm.collective_rpc(follow_loaded)
    except Exception as error:  # vLLM sends no functions to other processes, unless it is told to
        raise built_before_arming() from error
    for reply in replies:
        if reply is not None:
            raise built_before_arming(reply["error"])


def _warn_of(exchange: Exchange) -> None:
    if exchange.missed:
        layer, why = next(iter(exchange.missed.items()))
        warnings.warn(
            f"{len(exchange.missed)} MoE layers of this model are not captured, such as layer {layer}: {why}",
            stacklevel=3,
        )


def _params(given: Any, prompts: int, default: Any) -> list[Any]:
    """One a prompt."""
    if given is None:
        given = default()
    several = isinstance(given, Sequence) and not isinstance(given, str)
    for each in given if several else [given]:
        if not all(hasattr(each, name) for name in ("clone", "extra_args", "n")):  # as only SamplingParams have them
            where = f"a {type(given).__name__} with a {type(each).__name__}" if several else f"a {type(each).__name__}"
            raise ValueError(f"sampling_params is {where}: give vLLM's SamplingParams, or a list of them, one a prompt")
    if not several:
        return [given] * prompts
    if len(given) != prompts:
        raise ValueError(f"{len(given)} sampling_params for {prompts} prompts: give one, or one a prompt")
    return list(given)


def _default_params(config: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams.from_optional(**(config.get_diff_sampling_param() or {}))


def _model_config(llm: Any, *, for_async: bool) -> Any:
    config = getattr(llm, "model_config", None) or getattr(getattr(llm, "llm_engine", None), "model_config", None)
    if config is None or not hasattr(llm, "collective_rpc"):
        raise ValueError(f"{type(llm).__name__} is no vLLM engine: give a vllm.LLM, or an AsyncLLM to acapture")
    if inspect.iscoroutinefunction(llm.collective_rpc) is not for_async:
        name = type(llm).__name__
        if for_async:
            raise ValueError(f"{name} is not asynchronous: capture it with moe_native.capture(...), without await")
        raise ValueError(f"{name} is asynchronous: capture it with await moe_native.acapture(...)")
    return config


def _check_ranks(llm: Any, options: dict[str, Any]) -> None:
    """An `AsyncLLM` balances its prompts over its data-parallel engines, and hands on what the first one's workers
    answer. One behind an external balancer has a single engine."""
    parallel = getattr(getattr(llm, "vllm_config", None), "parallel_config", None)
    size = getattr(parallel, "data_parallel_size", 1)
    if size <= 1 or getattr(parallel, "data_parallel_external_lb", False) or options.get("data_parallel_rank") == 0:
        return
    hint = "build an engine with data_parallel_size=1 to capture from"
    if "data_parallel_rank" in inspect.signature(llm.generate).parameters:
        hint = f"pass data_parallel_rank=0 to acapture, or {hint}"
    raise CaptureError(f"this engine has data_parallel_size={size}, of which only rank 0 can be captured: {hint}")


def _takes_images(config: Any) -> bool:
    return bool(getattr(config, "is_multimodal_model", False))
