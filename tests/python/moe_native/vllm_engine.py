"""One vLLM engine, run by the tests in a process of its own as a user would: python vllm_engine.py JOB ANSWER.

JOB is JSON: `engine` (arguments of LLM), `prompts`, `max_tokens`. What was generated is written to the file ANSWER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def hooks_of_worker(worker: Any) -> dict[str, list[str]]:
    """Runs in the worker: what is set on the instances that recording would wrap."""
    worker = getattr(worker, "worker", worker)  # vLLM wraps it
    routers = [module.router for module in worker.get_model().modules() if hasattr(module, "router")]
    wrapped = ("load_model", "compile_or_warm_up_model", "execute_model", "shutdown")
    return {
        "worker": [name for name in wrapped if name in vars(worker)],
        "routers": [type(router).__name__ for router in routers if "_compute_routing" in vars(router)],
        "class": [name for name in ("__init__",) if hasattr(type(worker).__mro__[-2].__init__, "__wrapped__")],
        "additional_config": sorted(worker.vllm_config.additional_config),
    }


def describe(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    routed = getattr(completion, "routed_experts", None)
    return {
        "id": output.request_id,
        "prompt": list(output.prompt_token_ids),
        "generated": list(completion.token_ids),
        "routed": None if routed is None else routed.tolist(),  # vLLM's own: [tokens - 1, layers, k]
    }


def main() -> None:
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    sampling = SamplingParams(max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True)
    outputs = llm.generate(job["prompts"], sampling, use_tqdm=False)
    written: dict[str, Any] = {"requests": [describe(output) for output in outputs]}
    if job.get("inspect"):
        written["hooks"] = llm.collective_rpc(hooks_of_worker)
    runner = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)
    written["runner"] = runner[0]
    answer.write_text(json.dumps(written))


if __name__ == "__main__":
    main()
