"""Which routers of a vLLM model are found and hooked, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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


def test_weights_of_experts_inside_or_around_a_known_layer_are_no_layer() -> None:
    runner, block = Runner("layers.0.mlp.experts", Router()), TinyMoE()
    runner.routed, block.experts = TinyMoE(), runner
    found = routers.find(model(block), torch.device("cpu"))
    assert [(layer.name, layer.obstacle) for layer in found] == [("layers.0.mlp.experts", "")]


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


class TinyMoE(torch.nn.Module):
    """As a model's own MoE block that shows nothing of vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, 8)
        self.w1 = torch.nn.Parameter(torch.zeros(8, 4, 4))


class Unseen(Runner):
    """As a runner with a kernel that cannot even be asked."""

    def __init__(self, name: str) -> None:
        super().__init__(name, Router())
        self.routed_experts = Kernel()


class Kernel:
    @property
    def quant_method(self) -> None:
        raise ValueError("not yet")


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
        (TinyMoE(), "cpu", "TinyMoE routes in a way"),
        (Unseen("layers.0.mlp"), "cpu", "ValueError: not yet"),
        (Runner("layers.0.mlp", Router(experts=0), experts=0), "cpu", "has (unknown) or chooses (2)"),
        (Runner("layers.0.mlp", Router(top_k=0), top_k=0), "cpu", "has (8) or chooses (unknown)"),
        (Runner("layers.0.mlp", Router(experts=1 << 17), experts=1 << 17), "cpu", "has (unknown) or chooses (2)"),
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
    assert [layer.obstacle for layer in found] == ["", "layer 0 has another router, layers.0.a, which stands for it"]


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


@pytest.mark.parametrize("width", [2, 5])
def test_what_is_not_as_wide_as_the_experts_are_many_is_not_taken_for_logits(width: int, tmp_path: Path) -> None:
    """vLLM's Transformers backend may have routed already, and passes the k weights on."""
    router = Router()
    found = routers.find(model(Runner("layers.0.mlp", router)), torch.device("cpu"))
    trace = record_one_step(tmp_path, found, lambda: router.select_experts(torch.randn(3, 4), torch.rand(3, width)))
    assert trace.rows == 3 and trace.complete
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


def test_weights_are_not_taken_for_logits_where_all_experts_are_chosen(tmp_path: Path) -> None:
    router = Router(experts=2)
    runner = Runner("layers.0.mlp", router, experts=2)
    runner._moe_state = object()  # as the Transformers backend's runner, where transformers' own module routes
    found = routers.find(model(runner), torch.device("cpu"))
    trace = record_one_step(tmp_path, found, lambda: router.select_experts(torch.randn(3, 4), torch.rand(3, 2)))
    with pytest.raises(moe_trace.TraceError):
        _ = trace.layer(0).logits


def test_all_experts_may_be_chosen_from_logits(tmp_path: Path) -> None:
    router, logits = Router(experts=2), torch.randn(3, 2)
    found = routers.find(model(Runner("layers.0.mlp", router, experts=2)), torch.device("cpu"))
    trace = record_one_step(tmp_path, found, lambda: router.select_experts(torch.randn(3, 4), logits))
    assert np.array_equal(trace.layer(0).logits, logits.numpy())


class Misshapen(Router):
    """Its output is cut by `cut`."""

    def __init__(self, cut: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.cut = cut

    def _compute_routing(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cut(*super()._compute_routing(hidden_states, router_logits, *args, **kwargs))


@pytest.mark.parametrize(
    "cut",
    [
        lambda weights, ids: (weights[:, 0], ids[:, 0]),
        lambda weights, ids: (weights[:, None], ids[:, None]),
        lambda weights, ids: (weights[:, :1], ids),
        lambda weights, ids: (weights, ids.float()),
    ],
    ids=["one dimension", "three dimensions", "fewer weights than ids", "ids that are no whole numbers"],
)
def test_a_router_whose_output_does_not_fit_is_a_named_hole(cut: Any, tmp_path: Path) -> None:
    good, bad = Router(), Misshapen(cut)
    found = routers.find(model(Runner("layers.0.mlp", good), Runner("layers.1.mlp", bad)), torch.device("cpu"))

    def forward() -> None:
        for router in (good, bad):
            router.select_experts(torch.randn(3, 4), torch.randn(3, 8))

    trace = record_one_step(tmp_path, found, forward)
    assert [(layer.layer, layer.name, layer.status) for layer in trace.coverage] == [
        (0, "layers.0.mlp", "exact"),
        (1, "layers.1.mlp", "missed"),
    ]
    assert trace.layer(0).rows == 3 and not trace.complete
    with pytest.raises(moe_trace.TraceError, match="layer 1 was missed"):
        trace.layer(1)


def test_more_ids_than_were_announced_are_recorded_as_they_are(tmp_path: Path) -> None:
    """Fused shared experts add columns."""
    router = Misshapen(lambda weights, ids: (torch.cat([weights, weights[:, :1]], 1), torch.cat([ids, ids[:, :1]], 1)))
    found = routers.find(model(Runner("layers.0.mlp", router, shared=1)), torch.device("cpu"))
    trace = record_one_step(tmp_path, found, lambda: router.select_experts(torch.randn(3, 4), torch.randn(3, 8)))
    assert trace.layer(0).ids.shape == (3, 3) and trace.layer(0).logits.shape == (3, 8)


def record_one_step(path: Path, found: list[routers.MoELayer], forward: Callable[[], Any]) -> moe_trace.Trace:
    with moe_native.Recorder(path, fields=("ids", "weights", "logits")) as recorder:
        assert routers.bind(found, recorder, 0) == len(found)
        with recorder.step(rows=3):
            forward()
    return moe_trace.open(path)


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


def test_a_draft_models_layers_are_said_to_be_left_out() -> None:
    draft = model(Runner("model.layers.0.mlp.experts", Router()), Runner("model.layers.1.mlp.experts", Router()))
    said = ["the draft model ModuleList has 2 MoE layers of its own, which are not recorded"]
    assert routers.left_out(SimpleNamespace(drafter=SimpleNamespace(model=draft))) == said
    newer = SimpleNamespace(drafter=None, speculator=SimpleNamespace(model=draft))
    assert routers.left_out(newer) == said
    assert routers.left_out(SimpleNamespace(drafter=object())) == []  # n-grams: there is no model
