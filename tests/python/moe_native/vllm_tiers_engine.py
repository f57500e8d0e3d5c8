"""One vLLM engine whose recorder is steered while it serves: python vllm_tiers_engine.py JOB ANSWER.

JOB is JSON: `engine` (arguments of LLM), `trace`, `prompts`, and `do`, a list of
- `["rpc", command, arguments]`: by `collective_rpc`;
- `["generate", max_tokens]`: all prompts at once;
- `["ctl", words, …]`: each by a process of its own (`moe-native ctl TRACE words`), while the engine generates.
What each gave is written to the file ANSWER, in this order.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from vllm_engine import describe


def main() -> None:
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])

    def generate(tokens: int) -> list[dict[str, Any]]:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        outputs = llm.generate(job["prompts"], sampling, use_tqdm=False)
        return [sample for output in outputs for sample in describe(output)]

    def ctl(lines: list[list[str]], done: list[list[Any]]) -> None:
        for words in lines:
            command = [sys.executable, "-m", "moe_trace", "ctl", job["trace"], *words, "--timeout", "120"]
            ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            done.append([ran.returncode, ran.stdout + ran.stderr])

    given: list[Any] = []
    for what, *words in job["do"]:
        if what == "rpc":
            given.append(llm.collective_rpc("moe_native_ctl", args=tuple(words)))
        elif what == "generate":
            given.append(generate(*words))
        else:
            done: list[list[Any]] = []
            other = threading.Thread(target=ctl, args=(words, done))
            other.start()
            while other.is_alive():
                generate(100)
            given.append(done)
    answer.write_text(json.dumps(given))


if __name__ == "__main__":
    main()
