"""Do different kinds of images go to different experts?

    python image_kind_usage.py --model MODEL --layer 12 --out usage.png \\
        --kind photos=holiday/ --kind scans='letters/*.png' old/page1.png

Each image is shown by itself, and the tokens of images are counted, not those of the text around them. A bar is an
expert's share of all the choices that the images of one kind made. How to read it: bars of equal height belong to an
expert that all kinds use alike; one high bar among low ones is an expert of that kind; the dashed line is where they
all would be if all experts were. With more than 32 experts, bars are drawn of the 16 that differ most, those of the
first kind first; the map below has all of them. A large image has more tokens than a small one, and weighs more.

Without `--kind` the images are drawn: smooth gradients, text and lines, noise. Without `--model` a small random
checkpoint is made. It has learned nothing: it shows the mechanics, no specialisation.
"""

from __future__ import annotations

import argparse
import glob
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_native
from moe_trace import metrics, plots

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw which experts the kinds of images are routed to.")
    parser.add_argument("--model", help="a vision model with experts that vLLM can load (else a small one is made)")
    parser.add_argument("--layer", type=int, default=1, help="the layer that is looked at (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("image_kind_usage.png"), help="the picture (%(default)s)")
    help_kind = "a kind, and its images: files, folders, or patterns of names; again for each kind"
    parser.add_argument("--kind", nargs="+", action="append", metavar=("NAME=PATH", "PATH"), help=help_kind)
    parser.add_argument("--max-model-len", type=int, help="longest prompt; large models may need a bound")
    options = parser.parse_args()
    plots.ending_of(options.out)  # raises now, not after the work
    images: dict[str, list[Any]] = {} if options.kind else drawn()
    try:
        for kind, files in map(named, options.kind or ()):
            images.setdefault(kind, []).extend(files)
    except ValueError as error:
        parser.error(str(error))
    if len(images) > len(plots.GROUPS):
        parser.error(f"{len(images)} kinds: at most {len(plots.GROUPS)} can be drawn")
    shown = [(kind, image) for kind, of_kind in images.items() for image in of_kind]
    with tempfile.TemporaryDirectory() as directory:
        if options.model is None:
            import tiny_vision

            tiny_vision.make(Path(directory))
        model = options.model or directory
        moe_native.arm()  # before the engine is built
        from transformers import AutoProcessor
        from vllm import LLM, SamplingParams

        llm = LLM(model, max_model_len=options.max_model_len, enforce_eager=True)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]}]
        processor = AutoProcessor.from_pretrained(model)
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts = [{"prompt": text, "multi_modal_data": {"image": image}} for _, image in shown]
        # With one token to generate, only the prompts go through the model.
        capture = moe_native.capture(llm, prompts, SamplingParams(max_tokens=1), fields="ids", layers=[options.layer])
    counts = usage(capture, [kind for kind, _ in shown])
    print("\n" + finding(counts))
    title = f"{options.model or 'a small random model'} · layer {options.layer}"
    note = ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in images.items())
    plots.save(plots.groups_histogram(counts, title=title, note=note), options.out)
    print(options.out)


def named(arguments: Sequence[str]) -> tuple[str, list[Any]]:
    """The kind and its images, of `NAME=PATH PATH …`."""
    kind, separator, first = arguments[0].partition("=")
    if not (kind and separator and first):
        raise ValueError(f"--kind is NAME=PATH, not {arguments[0]!r}")
    found: list[Any] = []
    for place in (first, *arguments[1:]):
        pattern = f"{glob.escape(place)}/*" if Path(place).is_dir() else place
        files = [place] if Path(place).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [file for file in files if file.lower().endswith(ENDINGS)]
        if not files:
            raise ValueError(f"no image for {kind} at {place}: give a file, a folder or a pattern such as 'dir/*.png'")
        found += files
    return kind, found


def drawn() -> dict[str, list[Any]]:
    """Pictures of three kinds."""
    import tiny_vision

    makers = {"gradients": tiny_vision.gradient, "drawings": tiny_vision.drawing, "noise": tiny_vision.noise}
    return {kind: [make(seed, 256, 160) for seed in range(6)] for kind, make in makers.items()}


def usage(capture: moe_native.Capture, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """For each kind `[experts]`: how often each expert of the captured layer was chosen. `kinds` has one a sample."""
    (layer,) = capture.geometry
    counts = {kind: np.zeros(layer.experts, np.int64) for kind in kinds}
    for sample, kind in zip(capture, kinds, strict=True):
        ids = sample.ids[layer.layer][torch.from_numpy(sample.modality == "image")].long()
        ids = ids[(ids >= 0) & (ids < layer.experts)]  # others are no expert's
        counts[kind] += torch.bincount(ids, minlength=layer.experts).numpy()
    return counts


def finding(counts: dict[str, np.ndarray]) -> str:
    """Of each kind the expert that it chooses most beyond the others, in words."""
    shares = {kind: metrics.shares(count) for kind, count in counts.items()}
    lines = []
    for kind, share in shares.items():
        others = np.max([other for name, other in shares.items() if name != kind] or [np.zeros_like(share)], axis=0)
        best = int((share - others).argmax())
        said = f"{100 * share[best]:.2f} % of its choices, at most {100 * others[best]:.2f} % of another kind's"
        lines.append(f"{kind}: most its own is expert {best}, {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
