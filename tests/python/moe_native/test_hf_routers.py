"""Hooked routers of transformers models: many families, gates that show their logits only, odd ones."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from old_transformers import OldBlock, OldModel, old_trace, tokens

import moe_native
import moe_trace
from moe_native import hf

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def families() -> Iterator[Any]:
    """Configurations of transformers families that route in different ways."""
    # (logits, weights, ids), renormalised
    yield pytest.param("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}, 2, id="mixtral")
    # ids first
    yield pytest.param("GraniteMoeConfig", {"num_local_experts": 8, "num_experts_per_tok": 3}, 3, id="granitemoe")
    # sigmoid scores in groups with a bias, top-k unsorted; its first layer is dense
    yield pytest.param(
        "DeepseekV3Config",
        {
            "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "qk_nope_head_dim": 8, "head_dim": 8,
        },
        4,
        id="deepseek_v3",
    )  # fmt: skip
    # weights over the chosen logits only
    yield pytest.param("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}, 2, id="gpt_oss")
    # a gate that is a plain Linear; the choice is seen where the experts are given it
    yield pytest.param(
        "JambaConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 1, "attn_layer_offset": 0,
         "expert_layer_period": 1, "expert_layer_offset": 0, "use_mamba_kernels": False},
        2,
        id="jamba",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "options", "top_k"), list(families()))
def test_families(name: str, options: dict[str, Any], top_k: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.append((inputs[1].clone(), inputs[2].clone()))

    experts = [module for path, module in model.named_modules() if path.endswith(".experts")]
    assert experts
    with (
        moe_native.Recorder(tmp_path, fields=("ids", "weights", "logits"), weights_dtype="exact") as recorder,
        hf.attach(model, recorder),
        torch.no_grad(),
    ):
        for module in experts:
            module.register_forward_pre_hook(see)
        model(tokens(2, 5) % 64)
    trace = moe_trace.open(tmp_path)
    assert trace.complete and len(trace.coverage) == len(experts)
    assert {layer.status for layer in trace.coverage} == {"exact"}
    for layer, (ids, weights) in zip(trace.coverage, seen, strict=True):
        rows = trace.layer(layer.layer)
        assert layer.top_k == top_k
        # What the experts were given is what was recorded.
        assert np.array_equal(rows.ids, ids.numpy())
        np.testing.assert_allclose(rows.weights, weights.float().numpy(), rtol=1e-6)
        if name != "DeepseekV3Config":  # its choice does not follow the logits alone
            chosen = torch.from_numpy(rows.logits).topk(top_k, dim=-1).indices.numpy()
            assert np.array_equal(np.sort(chosen, axis=-1), np.sort(rows.ids.astype(np.int64), axis=-1))


def test_a_choice_that_only_the_gate_shows_is_computed_and_marked_derived(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OldModel()
    with moe_native.Recorder(tmp_path, weights_dtype="exact") as recorder, hf.attach(model, recorder), torch.no_grad():
        model(tokens(1, 5) % 16)
    trace = moe_trace.open(tmp_path)
    assert [(layer.status, layer.experts, layer.top_k) for layer in trace.coverage] == [("derived", 6, 2)] * 2
    assert "top-k of the softmax, renormalised" in trace.coverage[0].detail
    with torch.no_grad():
        gate = model.layers[0].gate(model.embed(tokens(1, 5) % 16)[0]).softmax(-1).topk(2, dim=-1)
    assert np.array_equal(trace.layer(0).ids, gate.indices.numpy())
    np.testing.assert_allclose(trace.layer(0).weights.sum(-1), 1, rtol=1e-6)


class Wrapped(torch.nn.Module):
    """As adapters wrap a gate: not a Linear any more."""

    def __init__(self, gate: torch.nn.Linear, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.base_layer, self.activation = gate, activation
        self.out_features = gate.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.activation(self.base_layer(hidden))


@pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.sigmoid], ids=["adapter", "sigmoid"])
def test_a_choice_that_is_computed_is_never_called_exact(activation: Any, tmp_path: Path) -> None:
    model = OldModel()
    for block in model.layers:
        block.gate = Wrapped(block.gate, activation)  # type: ignore[assignment, arg-type]
    with moe_native.Recorder(tmp_path) as recorder, hf.attach(model, recorder), torch.no_grad():
        model(tokens(1, 5) % 16)
    trace = moe_trace.open(tmp_path)
    assert trace.rows == 5 and [layer.status for layer in trace.coverage] == ["derived"] * 2


class OddGate(torch.nn.Linear):
    """A router with an output of its own kind."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return types.SimpleNamespace(logits=super().forward(hidden))


class OddBlock(OldBlock):
    def __init__(self) -> None:
        super().__init__()
        self.gate = OddGate(8, 6)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.gate(hidden.reshape(-1, 8)).logits.mean()  # type: ignore[no-any-return]


class Experts(torch.nn.Module):
    def forward(self, hidden: list[torch.Tensor], ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden[0] * weights.sum(-1, keepdim=True)


class ListBlock(OldBlock):
    """Its experts are one module, which is given the hidden states in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()  # type: ignore[assignment]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 8)
        weights, ids = self.gate(flat).softmax(-1).topk(2, dim=-1)
        return self.experts([flat], ids, weights).reshape(hidden.shape)  # type: ignore[no-any-return]


def test_an_odd_router_does_not_stop_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = OldModel()
    model.layers[0], model.layers[1] = OddBlock(), ListBlock()
    with torch.no_grad():
        plain = model(tokens(1, 5) % 16)

    def passes() -> None:
        for _ in range(2):
            assert torch.equal(model(tokens(1, 5) % 16), plain)

    trace = old_trace(model, tmp_path, passes)
    said = [record.message for record in caplog.records if "layer 0" in record.message]
    assert len(said) == 1 and "layers.0" in said[0]
    assert trace.losses["incomplete"].layers == 2  # of each step, the odd layer
    assert trace.layer(1).ids.shape == (10, 2)


def test_what_is_no_row_of_logits_is_not_taken_for_one(tmp_path: Path) -> None:
    model = OldModel()
    model.layers[1].gate = Wrapped(model.layers[1].gate, lambda logits: logits)  # type: ignore[arg-type, assignment]
    model.layers[1].gate.out_features = 7  # type: ignore[union-attr]
    trace = old_trace(model, tmp_path, lambda: model(tokens(1, 5) % 16))
    assert trace.losses["incomplete"].layers == 1


def test_layers_that_may_be_dropped_are_no_loss(tmp_path: Path) -> None:
    model = OldModel()
    model.config = types.SimpleNamespace(layerdrop=0.5)  # type: ignore[assignment]
    first, second = model.layers

    def passes() -> None:
        model(tokens(1, 5) % 16)
        model.layers = torch.nn.ModuleList([second])
        model(tokens(1, 5) % 16)
        model.layers = torch.nn.ModuleList([first, second])

    trace = old_trace(model, tmp_path, passes)
    assert not trace.losses
    assert trace.layer(0).rows == 5 and trace.layer(1).rows == 10


@pytest.mark.parametrize("gate_alone", [True, False])
def test_nothing_of_a_pass_is_kept_alive(gate_alone: bool, tmp_path: Path) -> None:
    config = transformers.JambaConfig(
        **{**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 1, "attn_layer_offset": 0},
        expert_layer_period=1, expert_layer_offset=0, use_mamba_kernels=False,
    )  # fmt: skip
    model = OldModel() if gate_alone else transformers.JambaForCausalLM(config)
    alive: list[weakref.ref[torch.Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(("gate", "router")):
            module.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    with moe_native.Recorder(tmp_path) as recorder, hf.attach(model, recorder):
        model(tokens(1, 5) % 16)
        gc.collect()
        assert len(alive) == 2 and [reference() for reference in alive] == [None, None]


def test_a_model_on_another_device_is_missed(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
        )
    with moe_native.Recorder(tmp_path) as recorder, hf.attach(model, recorder):
        pass
    layers = moe_trace.open(tmp_path).coverage
    assert [layer.status for layer in layers] == ["missed", "missed"]
    assert "runs on meta: this version records on CPU only" in layers[0].detail
