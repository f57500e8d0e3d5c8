"""Does a layer use other experts for the prompt than for the answer, and others at the answer's end than at its start?

    python stage_usage.py --model MODEL --layer 12 --out usage.png

The tokens of each request are cut in three: its prompt, the first half of what was generated (early), and the second
half (late). A bar is an expert's share of all the choices that the tokens of one stage made. How to read it: three bars
of equal height belong to an expert that all stages use alike; the dashed line is where they all would be if all experts
were. A model that begins to repeat itself shows it in the late bars: few and high ones. With more than 32 experts, bars
are drawn of the 16 that differ most, those of the prompt first; the map below has all of them.

Without `--model` a small random checkpoint is made. Three of its experts are built to be chosen by every token, so they
do not differ and have no bars; what the others do is random. It shows the mechanics, no specialisation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import moe_native
from moe_trace import metrics, plots

PROMPTS = (
    "A baker packs 14 rolls into each of 6 baskets. How many rolls does she pack?",
    "Write a letter to a friend who has moved to another town.",
    "Explain why the sky is blue, in words that a child understands.",
    "Translate into French: the train leaves at nine and arrives at a quarter past eleven.",
    "Write a Python function that says whether a number is prime.",
    "Name three rivers of Europe and the countries that they flow through.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw which experts the stages of requests are routed to.")
    parser.add_argument("--model", help="a Mixture-of-Experts model that vLLM can load (else a small one is made)")
    parser.add_argument("--layer", type=int, default=1, help="the layer that is looked at (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("stage_usage.png"), help="the picture (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of an answer, at most (%(default)s)")
    parser.add_argument("--max-model-len", type=int, help="longest request; large models may need a bound")
    options = parser.parse_args()
    plots.ending_of(options.out)  # raises now, not after the work
    with tempfile.TemporaryDirectory() as directory:
        if options.model is None:
            import tiny_moe

            tiny_moe.make(directory, layers=4)
        moe_native.arm()  # before the engine is built
        from vllm import LLM, SamplingParams

        llm = LLM(options.model or directory, max_model_len=options.max_model_len, enforce_eager=True)
        sampling = SamplingParams(temperature=0.7, seed=1, max_tokens=options.max_tokens)
        capture = moe_native.capture(llm, list(PROMPTS), sampling, fields="ids", layers=[options.layer])
    counts = usage(capture)
    print("\n" + finding(counts))
    title = f"{options.model or 'a small random model'} · layer {options.layer}"
    plots.save(plots.groups_histogram(counts, title=title, note=f"{len(capture)} requests"), options.out)
    print(options.out)


def usage(capture: moe_native.Capture) -> dict[str, np.ndarray]:
    """For each stage `[experts]`: how often each expert of the captured layer was chosen."""
    (layer,) = capture.geometry
    counts = {stage: np.zeros(layer.experts, np.int64) for stage in ("prompt", "early", "late")}
    for sample in capture:
        half = sample.prompt_len + len(sample.decode) // 2
        early, late = sample.tokens(sample.prompt_len, half), sample.tokens(half, len(sample))
        for stage, part in (("prompt", sample.prefill), ("early", early), ("late", late)):
            ids = part.ids[layer.layer].long()
            ids = ids[(ids >= 0) & (ids < layer.experts)]  # others are no expert's
            counts[stage] += torch.bincount(ids, minlength=layer.experts).numpy()
    return counts


def finding(counts: dict[str, np.ndarray], named: int = 3) -> str:
    """How many experts each stage uses, and those whose shares differ most, in words."""
    shares = {stage: metrics.shares(count) for stage, count in counts.items()}
    lines = []
    for stage, count in counts.items():
        used, alike = np.count_nonzero(count), float(metrics.effective_experts(count))
        lines.append(f"{stage}: {used} of {len(count)} experts chosen, as unevenly as if {alike:.1f} were, all alike")
    spread = np.ptp(np.stack(list(shares.values())), axis=0)
    for expert in metrics.top(spread, named):
        said = [f"{stage} {100 * share[expert]:.2f} %" for stage, share in shares.items()]
        lines.append(f"expert {expert} differs: {', '.join(said)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
