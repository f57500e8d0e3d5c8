"""One vLLM engine, run by the tests in a process of its own as a user would: python vllm_engine.py JOB ANSWER.

JOB is JSON: `engine` (arguments of LLM) and `calls`, a list of what is asked of it one after the other: `prompts`, and
arguments of SamplingParams; with `abort_after` these requests are aborted after so many steps; with `embed` they are
embedded. What came out is written to the file ANSWER, a list a call.

`faults`, of a job or of a call, names functions of ours (`module:Class.function`) that raise meanwhile, in this
process; `disk` stands for a disk that takes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def hooks_of_worker(worker: Any) -> dict[str, list[str]]:
    """Runs in the worker: what is set on the instances that recording would wrap."""
    worker = getattr(worker, "worker", worker)  # vLLM wraps it
    routers = [module.router for module in worker.get_model().modules() if hasattr(module, "router")]
    wrapped = ("load_model", "compile_or_warm_up_model", "execute_model", "sample_tokens", "shutdown")
    return {
        "worker": [name for name in wrapped if name in vars(worker)],
        "routers": [type(router).__name__ for router in routers if "_compute_routing" in vars(router)],
        "class": [name for name in ("__init__",) if hasattr(type(worker).__mro__[-2].__init__, "__wrapped__")],
        "additional_config": sorted(worker.vllm_config.additional_config),
    }


def describe(output: Any) -> list[dict[str, Any]]:
    """The samples of one request, as the tests look at them. `id` is the name under which a sample is recorded."""
    several = len(output.outputs) > 1
    return [
        {
            "id": f"{completion.index}_{output.request_id}" if several else output.request_id,
            "prompt": list(output.prompt_token_ids),
            "generated": list(completion.token_ids),
            "finished": completion.finish_reason,
            # vLLM's own: [tokens - 1, layers, k]
            "routed": None
            if getattr(completion, "routed_experts", None) is None
            else completion.routed_experts.tolist(),
        }
        for completion in output.outputs
    ]


def generate(llm: Any, prompts: list[Any], sampling: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})
    return [sample for output in llm.generate(prompts, params, use_tqdm=False) for sample in describe(output)]


def embed(llm: Any, prompts: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": output.request_id,
            "prompt": list(output.prompt_token_ids),
            "generated": [],
            "size": len(output.outputs.embedding),
        }
        for output in llm.embed(prompts, use_tqdm=False)
    ]


def abort(llm: Any, prompts: list[Any], sampling: dict[str, Any], abort_after: int) -> list[dict[str, Any]]:
    """All but the first request are aborted after some steps; the first one goes on to its end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.CUMULATIVE
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "output_kind": kind, **sampling})
    engine, latest = llm.llm_engine, {}
    names = [f"abort-{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, params)
    for step in itertools.count(1):
        latest |= {output.request_id: output for output in engine.step()}
        if step == abort_after:
            engine.abort_request(names[1:])
        if not engine.has_unfinished_requests():
            return [sample for name in names if name in latest for sample in describe(latest[name])]
    raise AssertionError


@contextlib.contextmanager
def broken(faults: list[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for fault in faults:
            if fault == "disk":
                limit = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
                stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
                continue
            module, _, path = fault.partition(":")
            *owners, name = path.split(".")
            owner = importlib.import_module(module)
            for each in owners:
                owner = getattr(owner, each)
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, fail)
        yield


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a fault that the test has put in")


def answer_to(llm: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
    sampling = dict(call)
    faults = sampling.pop("faults", [])
    with broken(faults):
        answers = ask(llm, sampling)
        if "disk" in faults:  # the drain thread has met it, however busy the machine is
            with contextlib.suppress(Exception):
                llm.collective_rpc("moe_native_ctl", args=("flush", {"seconds": 10}))
        return answers


def ask(llm: Any, sampling: dict[str, Any]) -> list[dict[str, Any]]:
    prompts = sampling.pop("prompts")
    if sampling.pop("embed", False):
        return embed(llm, prompts)
    abort_after = sampling.pop("abort_after", 0)
    return abort(llm, prompts, sampling, abort_after) if abort_after else generate(llm, prompts, sampling)


def main() -> None:
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    from vllm import LLM

    with contextlib.ExitStack() as whole_life:
        whole_life.enter_context(broken(job.get("faults", [])))
        run(LLM(**job["engine"]), job, answer)


def run(llm: Any, job: dict[str, Any], answer: Path) -> None:
    written: dict[str, Any] = {"calls": [answer_to(llm, call) for call in job["calls"]]}
    if job.get("inspect"):
        written["hooks"] = llm.collective_rpc(hooks_of_worker)
    runner = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)
    written["runner"] = runner[0]
    answer.write_text(json.dumps(written))


if __name__ == "__main__":
    main()
