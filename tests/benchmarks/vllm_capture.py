"""What a capture adds to the wall time of `generate`: the same prompts, captured and not, in turn in one engine.

A turn is one capture and two plain `generate`, in any order: the ratio is that of the capture and their (geometric)
mean, and that of the two says how much of it is noise.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medians import median

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="generated, of each")
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128, help="size of the model")
    parser.add_argument("--fields", default="ids,weights,logits")
    arguments = parser.parse_args()
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import moe_native

    moe_native.arm()
    from vllm import LLM, SamplingParams

    sys.path.insert(0, str(EXAMPLES))
    import tiny_moe

    with tempfile.TemporaryDirectory() as directory:
        tiny_moe.make(Path(directory), hidden=arguments.hidden)
        llm = LLM(directory, max_model_len=512, seed=1234, enable_prefix_caching=False, max_num_seqs=arguments.prompts)
        prompts = [[(7 * i + j) % 200 for j in range(16 + i)] for i in range(arguments.prompts)]
        sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
        tokens = [{"prompt_token_ids": prompt} for prompt in prompts]

        def generate() -> Any:
            return llm.generate(tokens, sampling, use_tqdm=False)

        def capture() -> Any:
            return moe_native.capture(llm, prompts, sampling, fields=arguments.fields)

        def seconds(call: Callable[[], Any]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        rows = sum(len(sample) for sample in capture())
        layers = len(capture().layers)
        generate()
        calls = {"one": generate, "captured": capture, "other": generate}
        order, ratios, nulls, plain = random.Random(1), [], [], []
        for _ in range(arguments.turns):
            took = {name: seconds(calls[name]) for name in order.sample(list(calls), len(calls))}
            base = math.sqrt(took["one"] * took["other"])
            plain.append(base)
            ratios.append(took["captured"] / base)
            nulls.append(took["one"] / took["other"])
        print(f"\nvLLM, {arguments.prompts} prompts, {rows:,} rows x {layers} layers, {arguments.fields}")
        base, low, high = median(plain)
        print(f"  generate           {base:.2f} s [{low:.2f}, {high:.2f}]")
        for name, values in (("capture / generate", ratios), ("generate / generate", nulls)):
            ratio, low, high = median(values)
            print(f"  {name:19} {ratio:.3f} [{low:.3f}, {high:.3f}], the median of {len(values)}")


if __name__ == "__main__":
    main()
