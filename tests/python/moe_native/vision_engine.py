"""One vLLM engine that is shown pictures: python vision_engine.py JOB ANSWER

As `vllm_engine.py`, but a call's prompts are `{"text", "images", "videos"}`, the latter two lists of arguments of
`vision.picture` and `vision.film`. What transformers' own processor makes of a prompt is in ANSWER.<call>.<prompt>.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # the examples are on the path then
import torch
import vision
from vllm_engine import generate


def for_vllm(prompt: dict[str, Any]) -> dict[str, Any]:
    shown = {
        "image": [vision.picture(*image) for image in prompt.get("images", ())],
        "video": [vision.film(*video) for video in prompt.get("videos", ())],
    }
    data = {modality: items for modality, items in shown.items() if items}
    return {"prompt": prompt["text"], **({"multi_modal_data": data} if data else {})}


def for_transformers(processor: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    films = [vision.film(*video) for video in prompt.get("videos", ())]
    said = [{name: about[name] for name in about if name != "do_sample_frames"} for _, about in films]
    inputs = processor(
        text=[prompt["text"]],
        images=[vision.picture(*image) for image in prompt.get("images", ())] or None,
        videos=[pixels for pixels, _ in films] or None,
        **({"video_metadata": said, "do_sample_frames": False} if films else {}),
        return_tensors="pt",
    )
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def main() -> None:
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    from transformers import AutoProcessor
    from vllm import LLM

    llm = LLM(**job["engine"])
    calls = []
    for call in job["calls"]:
        sampling = {name: value for name, value in call.items() if name != "prompts"}
        calls.append(generate(llm, [for_vllm(prompt) for prompt in call["prompts"]], sampling))
    processor = AutoProcessor.from_pretrained(job["engine"]["model"])
    for number, call in enumerate(job["calls"]):
        for place, prompt in enumerate(call["prompts"]):
            torch.save(for_transformers(processor, prompt), f"{answer}.{number}.{place}.pt")
    answer.write_text(json.dumps({"calls": calls, "inputs": str(answer)}))


if __name__ == "__main__":
    main()
