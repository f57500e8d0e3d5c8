"""Many small vLLM engines, one after the other in one process: python architecture_engines.py JOBS DIRECTORY

JOBS is JSON, a list: `name`, `engine` (arguments of LLM), `prompts` (token ids), `max_tokens`. Each job writes
DIRECTORY/<name>.pt: what was generated and what vLLM's routers did; or the error that ended it. Then the process ends
too: what a failed engine leaves behind would spoil the next one.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import randomise


class Witness:
    """What each router of a model was given and what it returned, seen from outside of the recorder: the arguments and
    results of `select_experts`, and the ids that vLLM's own capture sees."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers: dict[str, dict[str, Any]] = {}
        for path, module in model.named_modules():
            router = getattr(module, "router", None)
            if hasattr(router, "select_experts") and hasattr(router, "set_capture_fn"):
                name = str(getattr(module, "layer_name", "") or path)
                bias = getattr(router, "e_score_correction_bias", None)
                self.layers[name] = {"logits": [], "weights": [], "ids": [], "bias": None if bias is None else [bias]}
                self._watch(router, self.layers[name])

    def _watch(self, router: Any, seen: dict[str, Any]) -> None:
        select = router.select_experts

        def select_experts(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen["logits"].append(router_logits.clone())
            weights, ids = select(hidden_states, router_logits, *args, **kwargs)
            seen["weights"].append(weights.clone())
            return weights, ids

        router.select_experts = select_experts
        router.set_capture_fn(lambda ids: seen["ids"].append(ids.clone()))

    def result(self) -> dict[str, dict[str, torch.Tensor | None]]:
        return {
            name: {what: torch.cat(parts).detach() if parts else None for what, parts in seen.items()}
            for name, seen in self.layers.items()
        }


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    try:
        model = llm.collective_rpc(lambda worker: worker.get_model())[0]
        if job["engine"].get("load_format") == "dummy":
            randomise(model.named_parameters())
        witness = Witness(model)
        sampling = SamplingParams(max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        requests = [
            {"id": o.request_id, "prompt": list(o.prompt_token_ids), "generated": list(o.outputs[0].token_ids)}
            for o in outputs
        ]
        return {"model": type(model).__name__, "requests": requests, "routers": witness.result()}
    finally:
        llm.llm_engine.engine_core.shutdown()


def in_a_fork(function: Callable[[], Any]) -> Any:
    """In the place of vLLM's `_run_in_subprocess`, which looks at each new class of model in a process of its own and
    would need ten seconds to start it."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = pickle.dumps((function(), ""))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        with os.fdopen(there, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        result, error = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    if error:
        raise RuntimeError(error)
    return result


def main() -> None:
    jobs, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = in_a_fork
    for job in jobs:
        print(f"== {job['name']}", flush=True)
        start = time.monotonic()
        try:
            answer = run(job)
        except Exception as error:
            traceback.print_exc()
            raised_by = traceback.extract_tb(error.__traceback__)[-1].line  # says what a bare assertion does not
            answer = {"error": f"{type(error).__name__}: {str(error) or raised_by}"}
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.save({**answer, "seconds": time.monotonic() - start}, directory / f"{job['name']}.pt")
        if "error" in answer:
            return


if __name__ == "__main__":
    main()
