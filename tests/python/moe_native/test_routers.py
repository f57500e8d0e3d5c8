"""Which routers of a vLLM model are found and hooked, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import Router, Runner, model

import moe_native
import moe_trace
from moe_native.modules import layer_number
from moe_native.vllm import routers
from moe_native.vllm.probe import require
from moe_native.vllm.symbols import ROUTER


def test_layers_are_found_in_module_order_with_their_own_numbers() -> None:
    found = routers.find(
        model(Runner("model.layers.3.mlp.experts", Router()), Runner("model.layers.7.mlp.experts", Router())),
        torch.device("cpu"),
    )
    assert [(layer.layer, layer.name, layer.experts, layer.top_k, layer.obstacle) for layer in found] == [
        (3, "model.layers.3.mlp.experts", 8, 2, ""),
        (7, "model.layers.7.mlp.experts", 8, 2, ""),
    ]


def test_fused_shared_experts_are_legal_ids() -> None:
    found = routers.find(model(Runner("layers.0.mlp", Router(), shared=1)), torch.device("cpu"))
    assert found[0].experts == 9


def test_one_router_under_two_modules_is_one_layer() -> None:
    router = Router()
    found = routers.find(model(Runner("layers.0.mlp", router), Runner("layers.0.mlp.experts", router)), None)
    assert len(found) == 1


class WithoutRouting:
    top_k = 2

    def select_experts(self) -> None: ...


class ZeroExperts(Router):
    zero_expert_type = "identity"


class OtherArguments(Router):
    def _compute_routing(self, logits: torch.Tensor, hidden: torch.Tensor) -> Any:  # type: ignore[override]
        return super()._compute_routing(hidden, logits, None)


class FusedKernel(torch.nn.Module):
    """As a module of vLLM with a fused kernel of its own."""

    layer_id, capture_fn = 5, None


@pytest.mark.parametrize(
    ("runner", "device", "reason"),
    [
        (Runner("layers.0.mlp", Router(), monolithic=True), "cpu", "routes by itself"),
        (Runner("layers.0.mlp", Router()), "cuda", "runs on cuda: this version records on CPU only"),
        (Runner("layers.0.mlp", WithoutRouting()), "cpu", "WithoutRouting routes in a way"),
        (Runner("layers.0.mlp", ZeroExperts()), "cpu", "zero experts"),
        (
            Runner("layers.0.mlp", OtherArguments()),
            "cpu",
            "no _compute_routing(hidden_states, router_logits) (the hook",
        ),
        (FusedKernel(), "cpu", "FusedKernel routes in a way"),
    ],
)
def test_what_cannot_be_seen_is_missed_with_the_reason(
    runner: torch.nn.Module, device: str, reason: str, tmp_path: Path
) -> None:
    found = routers.find(model(runner), torch.device(device))
    assert len(found) == 1 and reason in found[0].obstacle
    with moe_native.Recorder(tmp_path) as recorder:
        assert routers.bind(found, recorder, 0) == 0
    trace = moe_trace.open(tmp_path)
    assert [(layer.status, reason in layer.detail) for layer in trace.coverage] == [("missed", True)]
    assert not trace.complete


def test_a_second_router_of_a_layer_is_missed() -> None:
    found = routers.find(model(Runner("layers.0.a", Router()), Runner("layers.0.b", Router())), torch.device("cpu"))
    assert [layer.obstacle for layer in found] == ["", "layer 0 has a second router, and is recorded as layers.0.a"]


@pytest.mark.parametrize("compile", [False, True])
def test_the_hook_records_what_the_router_chose_and_changes_nothing(compile: bool, tmp_path: Path) -> None:
    router, untouched = Router(), Router()
    found = routers.find(model(Runner("layers.4.mlp", router)), torch.device("cpu"))
    torch.manual_seed(0)
    hidden, logits = torch.randn(5, 3), torch.randn(5, 8)
    with moe_native.Recorder(
        tmp_path, fields=("ids", "weights", "logits", "hidden"), weights_dtype="exact"
    ) as recorder:
        assert routers.bind(found, recorder, 0) == 1
        select = (
            torch.compile(router.select_experts, fullgraph=True, backend="aot_eager")
            if compile
            else router.select_experts
        )
        select(hidden, logits)  # no step is open
        with recorder.step(rows=5):
            weights, ids = select(hidden, logits)
        with recorder.step(rows=4):  # one row of padding
            select(hidden, logits)
    expected = untouched.select_experts(hidden, logits)
    assert torch.equal(weights, expected[0]) and torch.equal(ids, expected[1])
    rows = moe_trace.open(tmp_path).layer(4)
    both = [*range(5), *range(4)]
    assert np.array_equal(rows.ids, ids.numpy()[both])
    assert np.array_equal(rows.weights, weights.numpy()[both])
    assert np.array_equal(rows.logits, logits.numpy()[both])
    assert np.array_equal(rows.hidden, hidden.numpy()[both])


def test_weights_in_the_place_of_logits_are_not_taken_for_them(tmp_path: Path) -> None:
    """vLLM's Transformers backend has routed already, and passes the k weights on."""
    router = Router()
    found = routers.find(model(Runner("layers.0.mlp", router)), torch.device("cpu"))
    with moe_native.Recorder(tmp_path, fields=("ids", "logits")) as recorder:
        routers.bind(found, recorder, 0)
        with recorder.step(rows=3):
            router.select_experts(torch.randn(3, 4), torch.rand(3, 2))
    trace = moe_trace.open(tmp_path)
    assert trace.rows == 3
    with pytest.raises(moe_trace.TraceError):
        _ = trace.layer(0).logits


class ThreeResults(Router):
    """As a vLLM to come might do it."""

    def _compute_routing(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *_: Any, **__: Any) -> Any:
        weights, ids = super()._compute_routing(hidden_states, router_logits, None)
        return weights, ids, "and more"


class OtherOrder(Router):
    def _compute_routing(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *_: Any, **__: Any) -> Any:
        weights, ids = super()._compute_routing(hidden_states, router_logits, None)
        return ids, weights


@pytest.mark.parametrize("kind", [ThreeResults, OtherOrder])
def test_results_that_are_not_known_are_passed_on_and_the_layer_is_a_hole(kind: type[Router], tmp_path: Path) -> None:
    router = kind()
    found = routers.find(model(Runner("layers.0.mlp", router)), torch.device("cpu"))
    hidden, logits = torch.randn(3, 4), torch.randn(3, 8)
    with moe_native.Recorder(tmp_path) as recorder:
        routers.bind(found, recorder, 0)
        with recorder.step(rows=3):
            results = router.select_experts(hidden, logits)
    expected = kind().select_experts(hidden, logits)
    assert len(results) == len(expected) and torch.equal(results[0], expected[0])
    trace = moe_trace.open(tmp_path)
    assert not trace.complete and trace.stats() == {}
    assert sum(loss.layers for loss in trace.losses.values()) == 1


def test_bindings_that_the_compile_cache_was_not_keyed_for_are_not_hooked(tmp_path: Path) -> None:
    router = Router()
    found = routers.find(model(Runner("layers.0.mlp", router)), torch.device("cpu"))
    with moe_native.Recorder(tmp_path) as recorder, pytest.raises(RuntimeError, match="binding 0 where 5"):
        routers.bind(found, recorder, 5)
    assert "_compute_routing" not in vars(router)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.12.mlp.experts", 12),
        ("language_model.model.layers.3.feed_forward.experts", 3),
        ("model.blocks.2.layers.9.mlp", 2),
        ("transformer.h.5.moe", 5),
        ("decoder.6.moe", 6),
        ("moe", 77),
    ],
)
def test_layer_numbers(name: str, number: int) -> None:
    assert layer_number(name, 77) == number


def test_real_vllm_routers_have_what_the_hook_needs() -> None:
    cpu_router = pytest.importorskip(
        "vllm.model_executor.layers.fused_moe.router.cpu_router",
        reason="vLLM is not installed here, or it is one whose CPU kernels route by themselves",
        exc_type=ImportError,
    )
    router = cpu_router.CPURouter(top_k=2, global_num_experts=8)
    require(router, ROUTER)
    weights, ids = router._compute_routing(torch.randn(3, 4), torch.randn(3, 8), None)
    assert weights.shape == ids.shape == (3, 2)
