"""The demo: record a Mixture-of-Experts model in vLLM while it answers 25 short word problems, then look at what was
recorded.

    python demo.py [--model MODEL] [--out DIRECTORY]

Without `--model` it makes a small checkpoint whose routing is known beforehand (`tiny_moe.py`) and checks the
recording against that. Everything it makes is in the output directory: `model`, `trace`, `expert_hist.png`, and
vLLM's log, `vllm.log`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_TOKENS = 128
SEED = 1234

PROBLEMS = (
    "A baker packs 14 rolls into each of 6 baskets. How many rolls does she pack?",
    "Tom has 45 marbles and loses 17 of them in the grass. How many does he still have?",
    "Three friends share 51 chestnuts evenly. How many does each of them get?",
    "A train has 8 cars with 62 seats each. 400 seats are taken. How many are free?",
    "Lena reads 23 pages a day. How many pages does she read in two weeks?",
    "A crate of 24 bottles costs 36 dollars. What does one bottle cost?",
    "There are 96 chairs in 8 equal rows. How many chairs stand in three rows?",
    "A rope of 75 feet is cut into pieces of 6 feet. How many feet are left over?",
    "Omar earns 18 dollars an hour and works 7 hours. He spends 40 dollars. What is left?",
    "A tank holds 240 gallons and loses 15 gallons an hour. After how many hours is it empty?",
    "Nine buses carry 54 pupils each. How many pupils travel in all?",
    "A shirt costs 32 dollars, and today a quarter less. What does it cost today?",
    "Ida plants 12 rows of 15 onions. 20 onions do not grow. How many grow?",
    "Half of the 84 pages of a book have a picture. How many pages have none?",
    "A shop sells 130 pens on Monday and twice as many on Tuesday. How many on both days?",
    "The sum of two numbers is 63, and one of them is 25. What is the other one?",
    "A film starts at 19:40 and takes 115 minutes. When is it over?",
    "Each of 5 hens lays 6 eggs a week. How many eggs are there after 4 weeks?",
    "A car drives 270 miles in 5 hours. How far does it drive in 2 hours at that speed?",
    "Paul is 9 years old, and his aunt is four times as old. How old are they together?",
    "A field is 35 yards long and 20 yards wide. How long is the fence around it?",
    "Of 150 tickets, 30 percent are sold on the first day. How many are left?",
    "Two candles burn for 90 minutes each, one after the other. How many hours of light is that?",
    "A cook needs 250 grams of flour for a cake. How many kilograms does he need for 14 cakes?",
    "Mia counts 17 sheep and 26 goats, and then 9 animals leave. How many does she see now?",
)


class DemoError(Exception):
    """What went wrong, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Record a Mixture-of-Experts model in vLLM and look at its routing.")
    parser.add_argument("--model", help="any Mixture-of-Experts model that vLLM can load (else a small one is made)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where everything goes (%(default)s)")
    options = parser.parse_args()
    try:
        demo(options.model, options.out)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def demo(model: str | None, out: Path) -> None:
    trace = fresh_trace(out)
    expected: dict[int, list[int]] | None = None
    if model is None:
        model = str(out / "model")
        say(f"Making a small Qwen2-MoE checkpoint in {model}: 24 layers, 60 experts, top-4, skewed gates")
        expected = small_checkpoint(Path(model))

    say(f"Starting vLLM with MOE_NATIVE_TRACE={trace} (its log: {out / 'vllm.log'})")
    started = time.monotonic()
    executed = generate(model, trace, out / "vllm.log", "float32" if expected else "auto")
    say(f"{len(PROBLEMS)} problems, {executed} tokens executed, {time.monotonic() - started:.0f} s with vLLM's start")

    say(f"moe-native summary {trace}")
    summary = command("summary", str(trace))
    if summary not in (0, 3):
        raise DemoError(f"the trace could not be read; vLLM's log is {out / 'vllm.log'}")
    check(trace, executed, expected)
    if summary == 3:
        raise DemoError("the trace has losses or missed layers; the summary above says which")
    picture = out / "expert_hist.png"
    if command("plot", str(trace), "-o", str(picture)) != 0 or not picture.is_file():
        raise DemoError(f"{picture} was not drawn")
    say(f"The histogram is {picture}")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def command(*arguments: str) -> int:
    """Run `moe-native` with these arguments."""
    from moe_trace import cli

    return cli.main(list(arguments))


def fresh_trace(out: Path) -> Path:
    """The trace's directory, without what an earlier demo recorded."""
    trace = out / "trace"
    if trace.is_dir():
        strange = [entry.name for entry in trace.iterdir() if not entry.name.startswith("run-")]
        if strange:
            raise DemoError(f"{trace} holds something that is no recording ({strange[0]}): move it away")
        shutil.rmtree(trace)
    out.mkdir(parents=True, exist_ok=True)
    return trace


def small_checkpoint(directory: Path) -> dict[int, list[int]]:
    with quiet():
        import tiny_moe

        return tiny_moe.expected_top3(directory) or tiny_moe.make(directory, seed=SEED)


def generate(model: str, trace: Path, log: Path, dtype: str) -> int:
    """Let vLLM answer the problems while it is recorded. Returns how many tokens it executed, from what vLLM says of
    its requests."""
    # Read by vLLM and its plugin when they are imported, here and in the processes that vLLM starts.
    os.environ["MOE_NATIVE_TRACE"] = str(trace.resolve())
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    with quiet(log):
        try:
            from vllm import LLM, SamplingParams

            llm = LLM(model=model, dtype=dtype, seed=SEED, max_model_len=1024, enable_prefix_caching=False)
            sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
            outputs = llm.generate(list(PROBLEMS), sampling, use_tqdm=False)
            llm.llm_engine.engine_core.shutdown()  # the engine's processes end, and the trace is closed
        except Exception as error:
            raise DemoError(f"vLLM failed ({type(error).__name__}: {first_line(error)}); its log is {log}") from error
    # The last token of each answer is sampled and never goes through the model.
    return sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in outputs)


def check(trace: Path, executed: int, expected: dict[int, list[int]] | None) -> None:
    """Is every executed token in the trace, at every layer, and is the routing what the checkpoint was made for?"""
    import numpy as np

    import moe_trace

    recorded = moe_trace.open(trace)
    if not recorded.layers:
        raise DemoError("no Mixture-of-Experts layer was recorded; 'moe-native doctor' checks the set-up")
    if recorded.rows != executed:
        raise DemoError(f"{recorded.rows} rows were recorded, but {executed} tokens were executed")
    if expected is None:
        say("This model's skew is not known beforehand, so there is nothing to check it against")
        return
    for layer, best in expected.items():
        counts = recorded.layer(layer).counts()
        top = np.argsort(counts, kind="stable")[::-1][:3]
        if set(top.tolist()) != set(best) or any(counts[expert] != executed for expert in best):
            raise DemoError(f"layer {layer}: the top-3 experts are {top.tolist()}, but {best} were favoured")
    say(
        f"Checked: in each of the {len(expected)} layers the recorded top-3 are the three favoured experts, "
        f"chosen by all {executed} tokens"
    )


@contextlib.contextmanager
def quiet(log: Path | None = None) -> Iterator[None]:
    """Send what this process and its children print to a file, or nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in enumerate(saved, start=1):
            os.dup2(old, descriptor)
            os.close(old)
        os.close(target)


def first_line(error: BaseException) -> Any:
    return next(iter(str(error).splitlines()), "")


if __name__ == "__main__":
    sys.exit(main())
