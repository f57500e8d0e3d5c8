"""Where the time of a recorded vLLM step goes: microseconds in the op, in our Python and in the drain thread.

One engine, eager and in this process, so that each call of ours can be timed where it is made; the clock's own time is
taken off. The drain thread's is its CPU time. How much all of it slows an engine down is for `vllm_throughput.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512, help="of the model; 512 makes steps of 20 ms or more")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fields", default="ids,weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {
            "MOE_NATIVE_TRACE": str(Path(directory) / "trace"),
            "MOE_NATIVE_FIELDS": arguments.fields,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        measure(arguments, Path(directory) / "model")


def measure(arguments: argparse.Namespace, model: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    import tiny_moe
    from vllm import LLM, SamplingParams

    tiny_moe.make(model, hidden=arguments.hidden)
    from moe_native import ops
    from moe_native.vllm.steps import Steps

    record = ops.op = Timed(ops.op)
    python = []
    for name in ("begin", "end", "sampled"):
        python.append(Timed(getattr(Steps, name)))
        setattr(Steps, name, python[-1].method())
    llm = LLM(
        str(model), max_model_len=512, max_num_seqs=arguments.requests, seed=1234, enforce_eager=True,
        enable_prefix_caching=False, distributed_executor_backend="uni",
    )  # fmt: skip
    worker = llm.llm_engine.model_executor.driver_worker.worker
    recorder = worker.moe_native.recorder
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 200 for j in range(32)]} for i in range(arguments.requests)]
    llm.generate(prompts, sampling, use_tqdm=False)  # warms up
    recorder.flush()
    for timed in (record, *python):
        timed.ns = timed.calls = 0
    before, start = recorder.counters(), time.perf_counter()
    for _ in range(arguments.repeats):
        llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    recorder.flush()
    after = recorder.counters()
    steps = after["steps_committed"] - before["steps_committed"]
    drain = after["drain_cpu_seconds"] - before["drain_cpu_seconds"]
    clock = clock_ns()
    layers = record.calls / steps

    print(f"\na step of vLLM, {arguments.requests} requests, {layers:.0f} layers, {arguments.fields} recorded, eager")
    print(f"  the step               {seconds / steps * 1e6:10,.0f} us")
    parts = {
        f"the op, {layers:.0f} calls": (record.ns - record.calls * clock) / steps,
        "our Python": sum(timed.ns - timed.calls * clock for timed in python) / steps,
        "the drain thread's CPU": drain / steps * 1e9,
    }
    for name, ns in parts.items():
        print(f"  {name:22} {ns / 1e3:10.1f} us {ns / 1e9 / (seconds / steps):8.2%}")


if __name__ == "__main__":
    main()
