"""How much slower vLLM's steps are with recording on: pairs of separate processes, one with and one without.

The two engines of a pair live side by side and take turns of a few steps, while the other one waits, so that what else
the machine does meets both alike. What is left is the luck of a process, such as the pages that its weights lie in. So
each pair is new, and `--null` shows what pairs of equals do.

`vllm_step.py` compares steps within a process, and says which part of us takes how long.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medians import median

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"
TURN = 6  # steps
PROMPT = 32  # tokens


def serve(arguments: argparse.Namespace) -> None:
    """In a process of its own: for each line of the standard input, `prompts` or `turn`, what it took in seconds, step
    by step."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the engine's own words go to the log
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=arguments.serve,
        max_model_len=512,
        max_num_seqs=arguments.requests,
        seed=1234,
        enable_prefix_caching=False,
        enforce_eager=arguments.eager,
        distributed_executor_backend="uni",
    ).llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    numbers = itertools.count()
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        seconds = []
        if line.strip() == "prompts":
            while engine.has_unfinished_requests():
                engine.step()
            for i in range(arguments.requests):
                prompt = {"prompt_token_ids": [(7 * i + j) % 200 for j in range(PROMPT)]}
                engine.add_request(f"request-{next(numbers)}", prompt, sampling)
        for _ in range(TURN):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), file=answers)


class Engine:
    """An engine in a process of its own. `trace`: where it records to, None for not at all."""

    def __init__(self, arguments: argparse.Namespace, directory: Path, name: str, trace: str | None) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOE_NATIVE_")}
        environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Both models on one and the same core: the engine that waits must not spin on the other one's.
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")
        if trace is not None:
            environment |= {"MOE_NATIVE_TRACE": trace, "MOE_NATIVE_FIELDS": arguments.fields}
        command = [sys.executable, __file__, "--serve", arguments.model, "--requests", str(arguments.requests)]
        command += ["--tokens", str(arguments.tokens)] + (["--eager"] if arguments.eager else [])
        self._log = directory / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the engine failed:\n{self._log.read_text()[-3000:]}")
        answer: list[float] = json.loads(line)
        return answer

    def ask(self, what: str) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self._process.communicate()


def pair(arguments: argparse.Namespace, directory: Path, number: int) -> tuple[float, float]:
    """Seconds of a step without recording, and the median ratio of neighbouring turns."""
    traces = {"off": None, "on": None if arguments.null else str(directory / "trace")}
    # The one that starts first may be slower or faster by itself, so it is another one in each pair.
    names = ["off", "on"] if number % 2 == 0 else ["on", "off"]
    started = {name: Engine(arguments, directory, name, traces[name]) for name in names}
    engines = [started["off"], started["on"]]
    for engine in engines:
        engine.answer()
    order = random.Random(number)
    plain, ratios = [], []
    for repeat in range(arguments.repeats + 1):
        for engine in engines:
            engine.ask("prompts")
        for _ in range(arguments.tokens // TURN - 2):
            seconds = {}
            for which in order.sample([0, 1], 2):
                # The first steps find the other engine's data in the caches.
                seconds[which] = statistics.median(engines[which].ask("turn")[2:])
            if repeat > 0:  # the first one warms up
                plain.append(seconds[0])
                ratios.append(seconds[1] / seconds[0])
    for engine in engines:
        engine.close()
    return statistics.median(plain), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a checkpoint; one like the demo's is made when this is not given")
    parser.add_argument("--hidden", type=int, default=512, help="of that one; 512 makes a step of 20 ms or more")
    parser.add_argument("--fields", default="ids,weights")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--null", action="store_true", help="neither process of a pair records")
    parser.add_argument("--couples", type=int, default=4, help="of pairs; in the second, the other engine starts first")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2, help="times that the requests are served, of each process")
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments)

    kind = "eager" if arguments.eager else "compiled"
    what = "nothing" if arguments.null else arguments.fields
    print(f"\nvLLM, {kind}, a decode step of {arguments.requests} requests, {what} recorded")
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        if arguments.model is None:
            sys.path.insert(0, str(EXAMPLES))
            import tiny_moe

            arguments.model = str(directory / "model")
            tiny_moe.make(arguments.model, hidden=arguments.hidden)
        for number in range(2 * arguments.couples):
            step, ratio = pair(arguments, directory, number)
            ratios.append(ratio)
            print(f"  pair {number + 1}: a step of {step * 1e3:.2f} ms, on / off {ratio:.4f}", flush=True)
    # What starting first does cancels where two pairs differ in that alone.
    couples = [math.sqrt(one * other) for one, other in zip(ratios[::2], ratios[1::2], strict=True)]
    ratio, low, high = median(couples)
    print(f"  on / off {ratio:.4f} [{low:.4f}, {high:.4f}], the median of {len(couples)} couples of pairs")


if __name__ == "__main__":
    main()
