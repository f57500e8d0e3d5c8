"""Let a Mixture-of-Experts model answer the prompts, with its routing recorded or not, and say what recording costs.

    python run_generate.py                  # as it is: answers, and `no_log` in timing.json
    python run_generate.py --log            # recorded: also moe_routes.jsonl, and `log` in timing.json
    python run_generate.py --compare 8      # both, eight times in turns: `no_log`, `log` and their `ratio`

Everything goes to the directory `--out`. `--log` sets `VLLM_LOG_MOE`; setting it around this script does the same. The
file of routes is written when the program ends.

Two single passes tell nothing of what recording costs: an engine's first pass is slow, and processes differ by more
than recording takes. So `--compare` is the only one that gives a ratio. Its two engines, one that records and one that
does not, live in processes of their own and take turns at all the prompts, each as often first as second; what else the
machine does then meets both alike. A first turn of each warms it up and is not counted. The ratio is the median over
the pairs of turns of seconds per generated token, log over no_log. If the pairs were independent, the true median would
be between the lowest and the highest of them with probability 1 - 2^(1 - pairs). Where two engines do not fit on the
GPU, `--one-at-a-time` builds a new one for each turn; then the luck of each process is in the ratio too.

`tokens` are those generated. Prefix caching is off, or later turns would have less to do.

Without `--model` it is Qwen/Qwen1.5-MoE-A2.7B-Chat where there is a GPU and the model can be had, else the demo's small
random model, which answers in gibberish.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MODEL = "Qwen/Qwen1.5-MoE-A2.7B-Chat"
SEED, MAX_TOKENS = 1234, 128
ROUTES, TIMING = "moe_routes.jsonl", "timing.json"
OURS = ("VLLM_LOG_MOE", "VLLM_LOG_LAYER", "_MOE_NATIVE_", "MOE_NATIVE_")


class Failed(Exception):
    """What went wrong, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate answers, with the routing recorded or not, and time it.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--log", action="store_true", help=f"record the routing into {ROUTES}")
    mode.add_argument("--compare", type=int, metavar="PAIRS", help="what recording costs, from so many pairs of turns")
    mode.add_argument("--serve", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--one-at-a-time", action="store_true", help="of --compare: never two engines at once")
    parser.add_argument("--model", help=f"any MoE model that vLLM can load ({MODEL}, or a small one)")
    parser.add_argument("--prompts", type=Path, help="what make_prompts.py wrote (made if it is not given)")
    parser.add_argument("--out", type=Path, default=Path("gsm8k-out"), help="where everything goes (%(default)s)")
    parser.add_argument("--layers", default="0", help="layers to record, as in 0,4-7 or all (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="of an answer (%(default)s)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, help="share of the GPU for an engine (of two: 0.45)")
    options = parser.parse_args()
    if options.serve:
        serve(json.loads(options.serve))
        return 0
    if options.compare is not None and options.compare < 1:
        parser.error("--compare needs at least one pair")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        settings = settings_of(options)
        if options.compare:
            compare(settings, options)
        else:
            one_pass(settings, options)
    except Failed as error:
        print(f"run_generate: {error}", file=sys.stderr)
        return 1
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What both engines of a comparison have in common, and what is said of it in timing.json."""
    model, dtype = options.model or chosen_model(options.out), "auto"
    if (Path(model) / "expected_top3.json").is_file():  # the small one
        dtype = "float32"
    share = options.gpu_memory_utilization
    if share is None and options.compare and not options.one_at_a_time:
        share = 0.45
    engine = {
        "model": model, "dtype": dtype, "seed": SEED, "max_model_len": 1024, "enable_prefix_caching": False,
        "tensor_parallel_size": options.tensor_parallel_size,
    } | ({} if share is None else {"gpu_memory_utilization": share})  # fmt: skip
    if options.prompts is None:
        options.prompts = options.out / "prompts.json"
        if not options.prompts.is_file():
            import make_prompts

            options.prompts.write_text(json.dumps(make_prompts.make(), indent=1) + "\n", encoding="utf-8")
    try:
        prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
        questions = [problem["question"] for problem in prompts["problems"]]
        source = prompts["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failed(f"{options.prompts} is not what make_prompts.py writes: {error}") from None
    sampling = {"max_tokens": options.max_tokens, "temperature": 0.0}
    return {"engine": engine, "prompts": source, "questions": questions, **sampling}


def chosen_model(out: Path) -> str:
    """The model of the experiment where it can run, else the demo's small one."""
    import torch

    reason = "there is no GPU"
    if torch.cuda.is_available():
        try:
            from huggingface_hub import HfApi, try_to_load_from_cache

            if not isinstance(try_to_load_from_cache(MODEL, "config.json"), str):
                HfApi().model_info(MODEL, timeout=10)
            return MODEL
        except Exception as error:  # of a network that is not there, in any of its ways
            reason = f"{MODEL} cannot be had ({type(error).__name__})"
    import tiny_moe

    directory = out / "model"
    print(f"{reason}: taking a small random model, {directory}", file=sys.stderr)
    if tiny_moe.expected_top3(directory) is None:
        tiny_moe.make(directory, seed=SEED)
    return str(directory)


# One engine, in this process.


class Generator:
    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM, SamplingParams

        self._llm = LLM(**settings["engine"])
        self._sampling = SamplingParams(
            temperature=settings["temperature"], max_tokens=settings["max_tokens"], seed=SEED
        )
        tokenizer = self._llm.get_tokenizer()
        self._prompts = settings["questions"]
        if getattr(tokenizer, "chat_template", None):
            self._prompts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
                )
                for question in self._prompts
            ]

    def turn(self) -> dict[str, Any]:
        """All prompts once: `seconds`, and the `tokens` and `texts` of the answers."""
        start = time.perf_counter()
        outputs = self._llm.generate(self._prompts, self._sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        answers = [output.outputs[0] for output in outputs]
        return {
            "seconds": seconds,
            "tokens": [list(answer.token_ids) for answer in answers],
            "texts": [answer.text for answer in answers],
        }


def one_pass(settings: dict[str, Any], options: argparse.Namespace) -> None:
    if options.log:
        os.environ["VLLM_LOG_MOE"] = str(options.out / ROUTES)
        os.environ["VLLM_LOG_MOE_LAYERS"] = options.layers
    routes = os.environ.get("VLLM_LOG_MOE")
    name, other = ("log", "no_log") if routes else ("no_log", "log")
    turn = Generator(settings).turn()
    timing = read_timing(options.out, settings)
    timing.pop("ratio", None)  # it is of other passes
    timing[name] = measured([turn]) | {"how": "one pass, the engine's first"}
    write_json(options.out / TIMING, timing)
    answers = {"settings": said(settings), "answers": answers_of(settings, turn)}
    write_json(options.out / f"answers_{name}.json", answers)
    print(f"{name}: {describe(timing[name])}")
    before = read_json(options.out / f"answers_{other}.json")
    if before.get("settings") == answers["settings"]:
        print(f"{alike(before['answers'], answers['answers'])} answers have the same tokens as those of {other}")
    if routes:
        print(f"the routes will be in {routes} when this program has ended")


def answers_of(settings: dict[str, Any], turn: dict[str, Any]) -> list[dict[str, Any]]:
    parts = zip(settings["questions"], turn["texts"], turn["tokens"], strict=True)
    return [{"question": question, "answer": text, "tokens": tokens} for question, text, tokens in parts]


def alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    same = sum(a["tokens"] == b["tokens"] for a, b in zip(one, other, strict=True))
    return f"{same} of {len(one)}"


# Two engines, in processes of their own.


def serve(settings: dict[str, Any]) -> None:
    """For each line of the standard input a turn, and a line of JSON on the standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM says goes to the log
    generator = Generator(settings)
    print(json.dumps("ready"), file=answers)
    for _ in sys.stdin:
        print(json.dumps(generator.turn()), file=answers)


class Server:
    """An engine in a process of its own. `routes`: the file it records to, None for not at all."""

    def __init__(self, settings: dict[str, Any], log: Path, routes: Path | None, layers: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        if routes is not None:
            environment |= {"VLLM_LOG_MOE": str(routes), "VLLM_LOG_MOE_LAYERS": layers}
        self._log = log
        with log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--serve", json.dumps(settings)],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
            )  # fmt: skip
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"an engine failed: see {self._log}")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        time.sleep(0.5)  # threads of the other engine that wait for work spin for a while
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = self._answer()
        return answer

    def close(self) -> float:
        """Seconds that it takes to end, the writing of the routes included."""
        start = time.perf_counter()
        self._process.communicate()
        if self._process.returncode != 0:
            raise Failed(f"an engine ended with {self._process.returncode}: see {self._log}")
        return time.perf_counter() - start


def compare(settings: dict[str, Any], options: argparse.Namespace) -> None:
    turns: dict[str, list[dict[str, Any]]] = {"no_log": [], "log": []}
    ends: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=options.out) as temporary:

        def start(name: str) -> Server:
            routes = Path(temporary) / ROUTES if name == "log" else None
            return Server(settings, options.out / f"{name}.vllm.log", routes, options.layers)

        servers = {} if options.one_at_a_time else {name: start(name) for name in turns}
        for server in servers.values():
            server.turn()
        for pair in range(options.compare):
            for name in ("no_log", "log") if pair % 2 == 0 else ("log", "no_log"):
                server = servers.get(name) or start(name)
                if not servers:
                    server.turn()
                turns[name].append(server.turn())
                if not servers:
                    ends[name] = server.close()
            print(f"pair {pair + 1}: {ratio_of(turns, pair):.4f} times the seconds per token with log", flush=True)
        ends |= {name: server.close() for name, server in servers.items()}
    write_json(options.out / TIMING, compared(settings, turns, ends, options.one_at_a_time))
    timing = read_json(options.out / TIMING)
    for name in turns:
        print(f"{name}: {describe(timing[name])}")
    ratio = timing["ratio"]
    print(f"log / no_log: {ratio['median']:.4f} [{ratio['lowest']:.4f}, {ratio['highest']:.4f}] seconds per token")
    print(f"{ratio['same_answers']} answers of the last pair have the same tokens")


def compared(
    settings: dict[str, Any], turns: dict[str, list[dict[str, Any]]], ends: dict[str, float], one_at_a_time: bool
) -> dict[str, Any]:
    """The content of timing.json."""
    pairs = len(turns["log"])
    ratios = [ratio_of(turns, pair) for pair in range(pairs)]
    how = "a new engine for each turn" if one_at_a_time else "two engines side by side"
    last = {name: answers_of(settings, of[-1]) for name, of in turns.items()}
    timing: dict[str, Any] = {"settings": said(settings)}
    for name, of in turns.items():
        timing[name] = measured(of) | {"how": f"median of {pairs} turns, {how}", "seconds_to_end": ends[name]}
    timing["ratio"] = {
        "what": "seconds per generated token, log / no_log, of neighbouring turns",
        "median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        "coverage": 1 - 2.0 ** (1 - pairs),
        "pairs": ratios, "how": how, "same_answers": alike(last["no_log"], last["log"]),
    }  # fmt: skip
    return timing


def ratio_of(turns: dict[str, list[dict[str, Any]]], pair: int) -> float:
    each = {name: of[pair]["seconds"] / sum(map(len, of[pair]["tokens"])) for name, of in turns.items()}
    return each["log"] / each["no_log"]


# timing.json


def measured(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns; `turns` has the seconds of each."""
    tokens = [sum(map(len, turn["tokens"])) for turn in turns]
    rates = [count / turn["seconds"] for count, turn in zip(tokens, turns, strict=True)]
    return {
        "wall_seconds": statistics.median(turn["seconds"] for turn in turns),
        "tokens": int(statistics.median(tokens)),
        "tokens_per_second": statistics.median(rates),
        "turns": [turn["seconds"] for turn in turns],
    }


def describe(of: dict[str, Any]) -> str:
    return f"{of['wall_seconds']:.3f} s, {of['tokens']:,} tokens, {of['tokens_per_second']:,.1f} tokens/s ({of['how']})"


def said(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the questions themselves, and what they ran on."""
    import platform

    import torch
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    more = {"questions": len(settings["questions"]), "device": device, "vllm": vllm.__version__}
    return {**settings, **more}


def read_timing(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What is there already, if it is of the same settings."""
    timing = read_json(out / TIMING)
    if timing and timing.get("settings") != said(settings):
        print(f"{out / TIMING} is of other settings, and written anew", file=sys.stderr)
        timing = {}
    return timing or {"settings": said(settings)}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
