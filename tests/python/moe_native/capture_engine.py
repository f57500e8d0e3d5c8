"""A program that captures, run by the tests as a user would run it: python capture_engine.py JOB ANSWER

JOB is JSON: a list of what is done one after the other, `[what, arguments]`:
- `build`: an `LLM`, in place of the one before; `import`: a module of ours;
- `capture`: arguments of `moe_native.capture`, `sampling` those of SamplingParams; `hs`: those of
  `get_moe_router_logits_generate`;
- `generate`: prompts without a capture; `inputs`: what transformers' own processor makes of prompts.
A prompt `{"text", "images"}` has pictures in the forms that `image` below knows; `shown` says which these are. What
each gave is written to ANSWER, a torch file: a list a step, of samples, or `{"error": [class, text]}`.
"""

from __future__ import annotations

import base64
import gc
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # the examples are on the path then
import torch
import vision
from vllm_engine import describe


def image(form: list[Any]) -> Any:
    """A picture in a form that a user may give it in: `[form, seed, width, height]`, or a string as it is."""
    if isinstance(form, str):
        return form
    kind, *arguments = form
    picture = vision.picture(*arguments)
    if kind == "array":
        import numpy as np

        return np.asarray(picture)
    if kind == "data":
        file = io.BytesIO()
        picture.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return picture


def prompt_of(prompt: Any) -> Any:
    if not isinstance(prompt, dict) or "images" not in prompt:
        return prompt.get("text", prompt) if isinstance(prompt, dict) else prompt
    images = [image(form) for form in prompt["images"]]
    return {"prompt": prompt["text"], "multi_modal_data": {"image": images if len(images) > 1 else images[0]}}


def samples_of(capture: Any) -> list[dict[str, Any]]:
    fields = {field: [getattr(sample, field) for sample in capture] for field in capture.fields}
    return [
        {
            "tokens": sample.token_ids.tolist(),
            "positions": sample.positions.tolist(),
            "modality": sample.modality.tolist(),
            "prompt_len": sample.prompt_len,
            "prompt_index": sample.prompt_index,
            "generated": list(sample.completion.token_ids),
            "request": sample.request_output.request_id,
            "cached": sample.request_output.num_cached_tokens,
            **{field: {layer: rows.clone() for layer, rows in fields[field][number].items()} for field in fields},
        }
        for number, sample in enumerate(capture)
    ]


class Program:
    def __init__(self) -> None:
        self.llm: Any = None

    def do(self, what: str, arguments: Any) -> Any:
        try:
            return getattr(self, what if what != "import" else "load")(arguments)
        except Exception as error:
            return {"error": [type(error).__name__, str(error)]}

    def load(self, module: str) -> None:
        importlib.import_module(module)

    def build(self, engine: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
            cleanup_dist_env_and_memory()
        self.llm = LLM(**engine)

    def capture(self, arguments: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        import moe_native

        arguments = dict(arguments)
        prompts, sampling = arguments.pop("prompts"), arguments.pop("sampling", {})
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})
        prompts = [prompt_of(prompt) for prompt in prompts] if isinstance(prompts, list) else prompt_of(prompts)
        return samples_of(moe_native.capture(self.llm, prompts, params, **arguments))

    def hs(self, arguments: dict[str, Any]) -> Any:
        import moe_native.hidden_states as hs

        arguments = dict(arguments)
        prompts = [prompt_of(prompt) for prompt in arguments.pop("prompts")]
        logits, outputs = hs.get_moe_router_logits_generate(self.llm, prompts, **arguments)
        tokens = [[*output.prompt_token_ids, *each.token_ids] for output in outputs for each in output.outputs]
        usage = hs.analyze_expert_usage(logits[0] if isinstance(logits, list) else logits, top_k=4)
        plain = [dict(each) for each in logits] if isinstance(logits, list) else dict(logits)
        return {"logits": plain, "tokens": tokens, "usage": usage}

    def inputs(self, prompts: list[dict[str, Any]]) -> Any:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.llm.model_config.model)
        given = []
        for prompt in prompts:
            pictures = [vision.picture(*shown) for shown in prompt["shown"]]
            given.append(dict(processor(text=[prompt["text"]], images=pictures, return_tensors="pt")))
        return given

    def generate(self, arguments: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        arguments = dict(arguments)
        prompts = [prompt_of(prompt) for prompt in arguments.pop("prompts")]
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **arguments})
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [{**sample, "cached": output.num_cached_tokens} for output in outputs for sample in describe(output)]


def main() -> None:
    program = Program()
    given = [program.do(what, arguments) for what, arguments in json.loads(sys.argv[1])]
    torch.save(given, sys.argv[2] + ".pt")
    Path(sys.argv[2]).write_text("[]")


if __name__ == "__main__":
    main()
