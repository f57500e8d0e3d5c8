"""Every MoE architecture that vLLM's CPU build runs, recorded and judged: by vLLM's own capture of expert ids and what
its routers were given and returned, by the family's published formula, and by transformers with the same checkpoint."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architecture_table
import numpy as np
import numpy.typing as npt
import pytest
import torch
from architecture_table import HOLES, NOT_RUN, RUN
from architectures import VOCABULARY, Architecture, make
from routing_formulas import Choice, choose, weights

import moe_trace
from moe_native.modules import layer_number

pytestmark = pytest.mark.vllm

MAX_TOKENS = 5
SECONDS = 900  # for one engine on a machine that has other things to do
NEAR_TIE = 1e-5  # two float32 implementations may order experts closer than this differently
SAME_LOGITS = 1e-6  # …and this close if they start from the same logits


def prompts() -> list[list[int]]:
    tokens = random.Random(1234)
    return [[tokens.randrange(1, VOCABULARY) for _ in range(length)] for length in (23, 9, 31, 14)]


@dataclass
class Run:
    """One architecture's engine: its checkpoint, its trace and what it said of itself."""

    architecture: Architecture
    checkpoint: Path
    path: Path
    answer: dict[str, Any]

    @property
    def trace(self) -> moe_trace.Trace:
        return moe_trace.open(self.path)

    @property
    def error(self) -> str:
        return str(self.answer.get("error", ""))

    @property
    def witnessed(self) -> dict[int, dict[str, torch.Tensor]]:
        """What vLLM's routers said, by layer."""
        return {layer_number(name, -1): seen for name, seen in self.answer["routers"].items()}


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Engines of all architectures that the selected tests ask for, as few processes as possible."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    root = tmp_path_factory.mktemp("architectures")
    asked = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    chosen = [architecture for architecture in (*RUN, *HOLES, *NOT_RUN) if architecture.name in asked]
    for architecture in chosen:
        make(architecture, root / architecture.name / "checkpoint")
    left = [job(architecture, root / architecture.name) for architecture in chosen]
    answers: dict[str, dict[str, Any]] = {}
    while left:
        code, log = run_engines(left, root)
        done = [work for work in left if (root / f"{work['name']}.pt").is_file()]
        for work in done:
            answers[work["name"]] = torch.load(root / f"{work['name']}.pt")
        if not done:  # the process died
            done = left[:1]
            answers[left[0]["name"]] = {"error": f"the process ended with {code}:\n{log[-4000:]}"}
        left = left[len(done) :]
    return {
        it.name: Run(it, root / it.name / "checkpoint", root / it.name / "trace", answers[it.name]) for it in chosen
    }


def job(architecture: Architecture, directory: Path) -> dict[str, Any]:
    settings = {
        "trace": str(directory / "trace"),
        "fields": ["ids", "weights", "logits"],
        "weights_dtype": "exact",
    }
    return {
        "name": architecture.name,
        "engine": {
            "model": str(directory / "checkpoint"),
            "dtype": "float32",
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "max_model_len": 64,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "additional_config": {"moe_native": settings},
            **({} if architecture.config else {"load_format": "dummy", "trust_remote_code": True}),
            **architecture.engine,
        },
        "prompts": prompts(),
        "max_tokens": MAX_TOKENS,
    }


def run_engines(jobs: list[dict[str, Any]], directory: Path) -> tuple[int, str]:
    """The process's exit status, which is minus the signal that killed it, and its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_NATIVE_")}
    env |= {
        "VLLM_CACHE_ROOT": str(directory / "cache"),
        "HF_HOME": str(directory / "huggingface"),  # where the configurations that come with a checkpoint are copied to
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("architecture_engines.py")), json.dumps(jobs), str(directory)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS * len(jobs),
        check=False,
    )
    return done.returncode, done.stdout


def each(architectures: list[Architecture]) -> Any:
    return pytest.mark.parametrize("name", [architecture.name for architecture in architectures])


@each(RUN)
@pytest.mark.timeout(SECONDS * len(RUN))
def test_what_vllm_did_is_recorded_bit_for_bit(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert not run.error, run.error
    it, trace, rows = run.architecture, run.trace, sum(map(len, prompts())) + len(prompts()) * (MAX_TOKENS - 1)
    assert run.answer["model"] == it.vllm and it.routing is not None
    assert trace.complete
    assert [(layer.layer, layer.status, layer.experts, layer.top_k) for layer in trace.coverage] == [
        (layer, "exact", it.experts, it.routing.k) for layer in it.layers
    ]
    assert set(run.witnessed) == set(it.layers)
    for layer, seen in run.witnessed.items():
        recorded = trace.layer(layer)
        assert recorded.ids.shape == (rows, it.routing.k)
        assert np.array_equal(recorded.ids, seen["ids"].numpy())
        assert_same_bits(recorded.weights, seen["weights"])
        if it.sees_logits:
            assert_same_bits(recorded.logits, seen["logits"])
        else:
            with pytest.raises(moe_trace.TraceError):
                _ = recorded.logits


def assert_same_bits(recorded: npt.NDArray[Any], seen: torch.Tensor) -> None:
    """bfloat16 is read as float32, which keeps every bit."""
    assert np.isfinite(recorded).all()
    assert np.array_equal(recorded, seen.float().numpy())


@each([architecture for architecture in RUN if architecture.sees_logits])
def test_ids_and_weights_follow_the_published_formula(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert not run.error, run.error
    routing = run.architecture.routing
    assert routing is not None
    near_ties = rows = 0
    coarse = run.architecture.engine.get("dtype") == "bfloat16"  # logits of 8 bits tie, and give weights of 8 bits
    for layer in run.witnessed:
        recorded = run.trace.layer(layer)
        ids, choice = recorded.ids.astype(np.int64), formula(run, layer)
        different = (np.sort(ids, axis=1) != np.sort(choice.ids, axis=1)).any(axis=1)
        assert (choice.margin[different] < SAME_LOGITS).all(), choice.margin[different]
        near_ties, rows = near_ties + int(different.sum()), rows + len(ids)
        expected = weights(routing, choice, ids)
        if routing.expert_scale:
            expected = expected * tensor(run.checkpoint, layer, routing.expert_scale)[ids]
        np.testing.assert_allclose(recorded.weights, expected, rtol=2**-6 if coarse else 1e-5, atol=1e-7)
    assert near_ties <= rows / (20 if coarse else 100)


def formula(run: Run, layer: int) -> Choice:
    assert run.architecture.routing is not None
    seen = run.witnessed[layer]
    bias = seen["bias"].float().numpy() if run.architecture.routing.bias else None
    assert bias is None or np.abs(bias).max() > 0
    return choose(run.architecture.routing, run.trace.layer(layer).logits, bias)


def tensor(checkpoint: Path, layer: int, name: str) -> npt.NDArray[np.float64]:
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        full = next(key for key in file.keys() if f".{layer}." in key and key.endswith(name))  # noqa: SIM118
        found: npt.NDArray[np.float64] = file.get_tensor(full).double().numpy()
        return found


@each([architecture for architecture in RUN if architecture.transformers is not None])
def test_ids_and_weights_are_those_of_transformers(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert not run.error, run.error
    it, near_ties, rows = run.architecture, 0, 0
    for request, theirs in by_transformers(run):
        assert set(theirs) == set(it.layers)
        for layer in it.layers:
            recorded = run.trace.request(request).layer(layer)
            order = np.argsort(recorded.positions)
            ids, w = in_order(recorded.ids[order].astype(np.int64), recorded.weights[order].astype(np.float64))
            their_ids, their_w = in_order(*theirs[layer])
            different = (ids != their_ids).any(axis=1)
            rows += len(ids)
            if different.any():
                # From here on this request's tokens have seen other experts.
                assert it.sees_logits, f"{request}, layer {layer}: {ids[different]} is {their_ids[different]}"
                margin = formula(run, layer).margin[run.trace.request_ids == request][order][different]
                assert (margin < NEAR_TIE).all(), f"{request}, layer {layer}: {margin}"
                near_ties += int(different.sum())
                break
            np.testing.assert_allclose(w * it.transformers, their_w, rtol=5e-4, atol=1e-6)
    assert near_ties <= rows / 100


def in_order(ids: npt.NDArray[np.int64], w: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(w, order, axis=1)


def by_transformers(run: Run) -> Iterator[tuple[str, dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]]]]:
    """Each request's ids and weights by layer, `[rows, k]`, from one pass over the tokens that vLLM executed: what the
    experts are called with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.checkpoint, dtype=torch.float32).eval()
    seen: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    def see(layer: int, ids: torch.Tensor, w: torch.Tensor) -> None:
        seen[layer] = ids.reshape(-1, ids.shape[-1]).numpy(), w.reshape(-1, w.shape[-1]).double().numpy()

    for path, module in model.named_modules():
        layer = layer_number(path, -1)
        if path.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, args, layer=layer: see(layer, *args[1:3]) if len(args) > 2 else None
            )
        elif type(module).__name__ == "Llama4Router":  # its experts are called with all tokens, weighed by 0 or more
            module.register_forward_hook(
                lambda _, __, scores, layer=layer: see(layer, *reversed(scores[0].topk(1, dim=-1)))
            )
    for request in run.answer["requests"]:
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([[*request["prompt"], *request["generated"][:-1]]]))
        yield request["id"], dict(seen)


@each(HOLES)
def test_what_is_not_captured_is_named(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert not run.error, run.error
    it, trace = run.architecture, run.trace
    assert run.answer["model"] == it.vllm and run.answer["requests"]
    assert [(layer.layer, layer.status, layer.detail) for layer in trace.coverage] == [
        (layer, "missed", it.hole) for layer in it.layers
    ]
    assert not trace.complete and trace.rows == 0


@each(NOT_RUN)
def test_what_vllms_cpu_build_does_not_run_fails_as_the_table_says(runs: dict[str, Run], name: str) -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed here")
    if not vllm.__version__.startswith("0.32."):
        pytest.skip("the table says what vLLM 0.32 does")
    assert runs[name].architecture.error in runs[name].error


def test_the_tables_in_the_documents_are_those_of_these_tests() -> None:
    document = (Path(__file__).parents[3] / "moe_native" / "vllm" / "ARCHITECTURES.md").read_text()
    for lines in (architecture_table.run(), architecture_table.holes(), architecture_table.not_run()):
        assert "\n".join(["", *lines, ""]) in document, "put in what architecture_table.py prints"
