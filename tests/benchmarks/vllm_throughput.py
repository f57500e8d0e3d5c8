"""vLLM's throughput with recording on and off: separate processes in interleaved pairs, so that drift of the machine
cancels.

Each process builds an engine, warms it up, and times the same batch of prompts several times. Two processes of the same
settings differ by 10 % on a small machine, by luck of cores and memory; so the process that records also pauses its
recorder for every second batch, which tells what the recording itself costs from the luck.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"


def pause(worker: Any, paused: bool) -> None:
    """Runs in the engine's worker."""
    recorder = worker.moe_native.recorder
    (recorder.pause if paused else recorder.resume)()


def measure(arguments: argparse.Namespace) -> None:
    """In a process of its own: print seconds of each batch as JSON on the last line, `{"on": …, "paused": …}` or
    `{"off": …}`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=arguments.measure,
        max_model_len=512,
        max_num_seqs=arguments.requests,
        seed=1234,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
    )
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 200 for j in range(32)]} for i in range(arguments.requests)]
    modes = ["on", "paused"] if "MOE_NATIVE_TRACE" in os.environ else ["off"]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for batch in range(arguments.repeats + 2):
        for mode in modes if batch % 2 == 0 else modes[::-1]:
            if mode != "off":
                llm.collective_rpc(pause, args=(mode == "paused",))
            start = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            if batch >= 2:  # the first ones warm up
                seconds[mode].append(time.perf_counter() - start)
    print("\n" + json.dumps(seconds))


def run(arguments: argparse.Namespace, trace: str | None) -> dict[str, float]:
    """Median seconds of a batch, by mode."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MOE_NATIVE_")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `pause` travels to the worker
    if trace is not None:
        environment |= {"MOE_NATIVE_TRACE": trace, "MOE_NATIVE_FIELDS": arguments.fields}
    command = [sys.executable, __file__, "--measure", arguments.model, "--requests", str(arguments.requests)]
    command += ["--eager"] if arguments.eager else []
    command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the engine failed:\n{done.stderr[-3000:]}")
    seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return {mode: statistics.median(values) for mode, values in seconds.items()}


def describe(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.4f} (median of {len(ratios)}: {min(ratios):.4f} to {max(ratios):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a checkpoint; one like the demo's is made when this is not given")
    parser.add_argument("--hidden", type=int, default=512, help="of that one; 512 makes a step of 20 ms or more")
    parser.add_argument("--fields", default="ids,weights")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments)

    with tempfile.TemporaryDirectory() as directory:
        if arguments.model is None:
            sys.path.insert(0, str(EXAMPLES))
            import tiny_moe

            arguments.model = str(Path(directory) / "model")
            tiny_moe.make(arguments.model, hidden=arguments.hidden)
        batches: dict[str, list[float]] = {"off": [], "on": [], "paused": []}
        for pair in range(arguments.pairs):
            order = [None, str(Path(directory) / "trace")]
            for trace in order if pair % 2 == 0 else order[::-1]:
                for mode, seconds in run(arguments, trace).items():
                    batches[mode].append(seconds)
            off, on, paused = (batches[mode][-1] for mode in ("off", "on", "paused"))
            print(f"pair {pair + 1}: off {off:.3f} s, on {on:.3f} s, paused {paused:.3f} s a batch", flush=True)
    kind = "eager" if arguments.eager else "compiled"
    print(f"\nvLLM, {kind}, {arguments.requests} requests of {arguments.tokens} tokens, {arguments.fields} recorded")
    for mode, name in (("off", "recording off"), ("on", "recording on"), ("paused", "the same, paused")):
        print(f"  {name:18}{statistics.median(batches[mode]) * 1e3 / arguments.tokens:8.2f} ms a step")
    for base, name in (("off", "on / off, processes"), ("paused", "on / paused, within a process")):
        ratios = [a / b for a, b in zip(batches["on"], batches[base], strict=True)]
        print(f"  {name:32}{describe(ratios)}")


if __name__ == "__main__":
    main()
