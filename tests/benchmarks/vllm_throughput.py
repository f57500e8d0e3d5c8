"""vLLM's throughput with recording on and off: separate processes in interleaved pairs, so that drift of the machine
cancels.

Each process builds an engine, warms it up, and times the same batch of prompts several times; what counts is the ratio
within a pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"


def measure(model: str, requests: int, tokens: int, repeats: int, eager: bool) -> None:
    """In a process of its own: print seconds per repeat as JSON on the last line."""
    import time

    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        max_model_len=512,
        max_num_seqs=requests,
        seed=1234,
        enable_prefix_caching=False,
        enforce_eager=eager,
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 200 for j in range(32)]} for i in range(requests)]
    llm.generate(prompts, sampling, use_tqdm=False)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    print("\n" + json.dumps(seconds))


def run(arguments: argparse.Namespace, trace: str | None) -> float:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MOE_NATIVE_")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    if trace is not None:
        environment["MOE_NATIVE_TRACE"] = trace
    command = [sys.executable, __file__, "--measure", arguments.model, "--requests", str(arguments.requests)]
    command += ["--eager"] if arguments.eager else []
    command += ["--tokens", str(arguments.tokens), "--repeats", str(arguments.repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the engine failed:\n{done.stderr[-3000:]}")
    return statistics.median(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a checkpoint; the demo's small one is made when this is not given")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.requests, arguments.tokens, arguments.repeats, arguments.eager)

    with tempfile.TemporaryDirectory() as directory:
        if arguments.model is None:
            sys.path.insert(0, str(EXAMPLES))
            import tiny_moe

            arguments.model = str(Path(directory) / "model")
            tiny_moe.make(arguments.model)
        off, on = [], []
        for pair in range(arguments.pairs):
            order = [None, str(Path(directory) / "trace")]
            for trace in order if pair % 2 == 0 else order[::-1]:
                (off if trace is None else on).append(run(arguments, trace))
            print(f"pair {pair + 1}: off {off[-1]:.3f} s, on {on[-1]:.3f} s, ratio {on[-1] / off[-1]:.4f}", flush=True)
    steps = arguments.tokens
    print(f"\nvLLM, {arguments.requests} requests of {arguments.tokens} tokens, ids and weights recorded")
    print(f"  recording off  {statistics.median(off) * 1e3 / steps:8.2f} ms a step")
    print(f"  recording on   {statistics.median(on) * 1e3 / steps:8.2f} ms a step")
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    spread = f"median of {len(ratios)} pairs: {min(ratios):.4f} to {max(ratios):.4f}"
    print(f"  ratio on/off   {statistics.median(ratios):8.4f} ({spread})")


if __name__ == "__main__":
    main()
