"""Which experts of a layer take the text of a prompt, and which take its images?

    python text_image_usage.py --model MODEL --layer 12 --out usage.png --images cat.jpg dog.jpg

Each prompt is an image and a question about it. A bar is an expert's share of all the choices that the tokens of one
modality made, so that many image tokens and few text tokens compare. How to read it: bars of equal height belong to an
expert that does not care; one that is far above the dashed line (all experts alike) for one modality, and below it for
the other, is that modality's. With more than 32 experts, bars are drawn of the 16 that differ most, those of text
first; the map below has all of them. What is printed says how far the two are apart as a whole.

Without `--model` a small random checkpoint is made. It has learned nothing: it shows the mechanics, no specialisation.
Text and images part in it all the same, so do not take a gap by itself for something learned: compare layers, models.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_native
from moe_trace import metrics, plots

QUESTIONS = (
    "What is in this picture? Describe it in one sentence.",
    "Which colours does it have, and which of them takes the largest part?",
    "If a child of five asked you what this is, what would you answer?",
    "How many things can you count here, and where are they?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw which experts text and images of prompts are routed to.")
    parser.add_argument("--model", help="a vision model with experts that vLLM can load (else a small one is made)")
    parser.add_argument("--layer", type=int, default=1, help="the layer that is looked at (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("text_image_usage.png"), help="the picture (%(default)s)")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="what is shown (else drawn pictures)")
    parser.add_argument("--max-model-len", type=int, help="longest prompt; large models may need a bound")
    options = parser.parse_args()
    plots.ending_of(options.out)  # raises now, not after the work
    with tempfile.TemporaryDirectory() as directory:
        model, images = options.model, options.images
        if model is None or images is None:
            import tiny_vision

            if model is None:
                tiny_vision.make(Path(directory))
            images = images or [tiny_vision.picture(seed, 256, 160) for seed in range(8)]
        moe_native.arm()  # before the engine is built
        from vllm import LLM, SamplingParams

        llm = LLM(model or directory, max_model_len=options.max_model_len, enforce_eager=True)
        prompts = prompts_of(model or directory, images)
        # With one token to generate, only the prompts go through the model.
        capture = moe_native.capture(llm, prompts, SamplingParams(max_tokens=1), fields="ids", layers=[options.layer])
    counts = usage(capture)
    print("\n" + finding(counts))
    title = f"{options.model or 'a small random model'} · layer {options.layer}"
    plots.save(plots.groups_histogram(counts, title=title, note=f"{len(capture)} prompts with an image"), options.out)
    print(options.out)


def prompts_of(model: str, images: list[Any]) -> list[dict[str, Any]]:
    """A question about each image (a file or a PIL image), as the model's chat template asks it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    prompts = []
    for number, image in enumerate(images):
        question = {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}
        chat = [{"role": "user", "content": [{"type": "image"}, question]}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append({"prompt": text, "multi_modal_data": {"image": image}})
    return prompts


def usage(capture: moe_native.Capture) -> dict[str, np.ndarray]:
    """For text and for images `[experts]`: how often each expert of the captured layer was chosen."""
    (layer,) = capture.geometry
    counts = {modality: np.zeros(layer.experts, np.int64) for modality in ("text", "image")}
    for sample in capture:
        for modality, count in counts.items():
            ids = sample.ids[layer.layer][torch.from_numpy(sample.modality == modality)].long()
            ids = ids[(ids >= 0) & (ids < layer.experts)]  # others are no expert's
            count += torch.bincount(ids, minlength=layer.experts).numpy()
    return counts


def finding(counts: dict[str, np.ndarray], named: int = 3) -> str:
    """How far text and images are apart, and the experts that differ most, in words."""
    text, image = metrics.shares(counts["text"]), metrics.shares(counts["image"])
    apart = np.abs(text - image).sum() / 2
    lines = [f"{100 * apart:.1f} % of the choices would have to change for text and images to use the experts alike"]
    for name, more in (("text", text - image), ("images", image - text)):
        best = [e for e in metrics.top(np.maximum(more, 0), named) if more[e] > 0]
        said = [f"expert {e} ({100 * text[e]:.2f} % of text, {100 * image[e]:.2f} % of images)" for e in best]
        lines.append(f"chosen more by {name}: {', '.join(said) or 'none'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
