"""How long vLLM takes with recording on and off: separate processes in interleaved pairs, so that drift of the machine
cancels.

Each process builds an engine, warms it up, and times the same batch of prompts several times. Two processes of the same
settings differ by up to 10 % on a small machine, by luck of cores and memory, so only many pairs say something about a
difference of 1 %. `vllm_step.py` compares steps within a process, and is free of that luck.
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

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"


def measure(arguments: argparse.Namespace) -> None:
    """In a process of its own: print the seconds of each batch as JSON on the last line."""
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
    seconds = []
    for _ in range(arguments.repeats + 2):
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    print("\n" + json.dumps(seconds[2:]))  # the first ones warm up


def run(arguments: argparse.Namespace, trace: str | None) -> float:
    """Median milliseconds of a step."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MOE_NATIVE_")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    if trace is not None:
        environment |= {"MOE_NATIVE_TRACE": trace, "MOE_NATIVE_FIELDS": arguments.fields}
    command = [sys.executable, __file__, "--measure", arguments.model, "--requests", str(arguments.requests)]
    command += ["--eager"] if arguments.eager else []
    command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the engine failed:\n{done.stderr[-3000:]}")
    return statistics.median(json.loads(done.stdout.strip().splitlines()[-1])) * 1e3 / arguments.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a checkpoint; one like the demo's is made when this is not given")
    parser.add_argument("--hidden", type=int, default=512, help="of that one; 512 makes a step of 20 ms or more")
    parser.add_argument("--fields", default="ids,weights")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments)

    kind = "eager" if arguments.eager else "compiled"
    print(f"\nvLLM, {kind}, {arguments.requests} requests of {arguments.tokens} tokens, {arguments.fields} recorded")
    ratios = []
    with tempfile.TemporaryDirectory() as directory:
        if arguments.model is None:
            sys.path.insert(0, str(EXAMPLES))
            import tiny_moe

            arguments.model = str(Path(directory) / "model")
            tiny_moe.make(arguments.model, hidden=arguments.hidden)
        trace = str(Path(directory) / "trace")
        for pair in range(arguments.pairs):
            if pair % 2 == 0:
                off, on = run(arguments, None), run(arguments, trace)
            else:
                on, off = run(arguments, trace), run(arguments, None)
            ratios.append(on / off)
            print(f"  pair {pair + 1}: off {off:.2f}, on {on:.2f} ms a step, on / off {on / off:.4f}", flush=True)
    print(f"  on / off {statistics.median(ratios):.4f}, the median of {len(ratios)} pairs")


if __name__ == "__main__":
    main()
