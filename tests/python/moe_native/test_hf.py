"""Recording transformers models: against `output_router_logits`, with padding, through `generate`, in many families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
import transformers

import moe_native
import moe_trace
from moe_native import hf

LAYERS, EXPERTS, TOP_K = 3, 60, 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_moe.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny_moe.make_model(tokenizer, layers=LAYERS)


@pytest.fixture
def record(model: Any, tmp_path: Path) -> Callable[..., moe_trace.Trace]:
    """Runs an action with the model attached, and returns the trace."""

    def run(action: Callable[[], Any], **attach: Any) -> moe_trace.Trace:
        fields = ("ids", "weights", "logits", "hidden", "tokens")
        with (
            moe_native.Recorder(tmp_path / "trace", fields=fields, weights_dtype="exact") as recorder,
            hf.attach(model, recorder, **attach),
            torch.no_grad(),
        ):
            action()
        return moe_trace.open(tmp_path / "trace")

    return run


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(sum(shape)))


def routed(model: Any, ids: torch.Tensor) -> np.ndarray:
    """`[rows, layers, experts]` router logits of one sequence, by transformers."""
    with torch.no_grad():
        return torch.stack(model(ids, output_router_logits=True).router_logits, dim=1).numpy()


def test_rows_are_what_transformers_routed(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    ids = tokens(2, 7)
    trace = record(lambda: model(ids))
    assert trace.complete and trace.rows == 14
    assert [(layer.layer, layer.status, layer.experts, layer.top_k) for layer in trace.layers] == [
        (layer, "exact", EXPERTS, TOP_K) for layer in range(LAYERS)
    ]
    logits = routed(model, ids)
    rows = trace.layer(range(LAYERS))
    assert np.array_equal(rows.logits, logits)
    chosen = torch.from_numpy(logits).softmax(-1).topk(TOP_K, dim=-1)
    assert np.array_equal(rows.ids, chosen.indices.numpy())
    assert np.array_equal(rows.weights, chosen.values.numpy())
    assert trace.request_ids.tolist() == ["0"] * 7 + ["1"] * 7
    assert trace.positions.tolist() == [*range(7), *range(7)]
    assert trace.tokens.tolist() == ids.flatten().tolist()
    assert trace.prefill().modality("text").rows == 14
    for layer in range(LAYERS):
        gate = model.model.layers[layer].mlp.gate.weight.detach().numpy()
        np.testing.assert_allclose(trace.layer(layer).hidden @ gate.T, logits[:, layer], atol=1e-4)


def test_generate_is_one_request_a_sequence_at_growing_positions(
    model: Any, record: Callable[..., moe_trace.Trace]
) -> None:
    ids = tokens(2, 5)
    made: list[torch.Tensor] = []
    trace = record(lambda: made.append(model.generate(ids, max_new_tokens=6, do_sample=False)))
    for row, name in enumerate(["0", "1"]):
        rows = trace.request(name)
        assert rows.positions.tolist() == list(range(10))  # the last token is not executed
        assert rows.prefill().rows == 5 and rows.decode().rows == 5
        assert trace.requests[name].prompt_len == 5
        assert rows.tokens.tolist() == made[0][row, :-1].tolist()
        whole = routed(model, made[0][row : row + 1, :-1])
        np.testing.assert_allclose(rows.layer(range(LAYERS)).logits, whole, atol=1e-3)


def test_padding_on_the_left_is_not_recorded(
    model: Any, tokenizer: Any, record: Callable[..., moe_trace.Trace]
) -> None:
    texts = [
        "Maria bought four notebooks.",
        "There are thirty seats in a bus. Eighteen people get on and seven get off.",
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths[0] < lengths[1]
    made: list[torch.Tensor] = []
    trace = record(lambda: made.append(model.generate(**batch, max_new_tokens=4, do_sample=False)))
    for row, length in enumerate(lengths):
        rows = trace.request(str(row))
        assert rows.positions.tolist() == list(range(length + 3))
        alone = made[0][row : row + 1, -(length + 4) : -1]
        assert rows.tokens.tolist() == alone[0].tolist()
        np.testing.assert_allclose(rows.layer(range(LAYERS)).logits, routed(model, alone), atol=1e-3)


def test_padding_on_the_right_and_holes_are_not_recorded(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    ids = tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1]])
    trace = record(lambda: model(ids, attention_mask=mask))
    assert trace.request("0").positions.tolist() == [0, 1, 2]
    assert trace.request("1").positions.tolist() == [0, 1, 2, 3, 4]
    assert trace.tokens.tolist() == ids[mask.bool()].tolist()


def test_a_prompt_in_pieces_goes_on_with_its_cache(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    ids = tokens(1, 8)

    def in_pieces() -> None:
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:], past_key_values=cache)

    trace = record(in_pieces)
    assert trace.request("0").positions.tolist() == list(range(8))
    np.testing.assert_allclose(trace.layer(range(LAYERS)).logits, routed(model, ids), atol=1e-3)


def test_passes_without_a_cache_are_new_requests_and_can_be_named(
    model: Any, record: Callable[..., moe_trace.Trace]
) -> None:
    def passes() -> None:
        model(tokens(1, 3))
        model(input_ids=tokens(2, 2))
        model(inputs_embeds=model.model.embed_tokens(tokens(1, 4)))

    trace = record(passes, requests=["first", "second"])
    assert list(trace.requests) == ["first", "second", "0", "1"]
    assert [trace.request(name).rows for name in trace.requests] == [3, 2, 2, 4]


def test_a_pass_that_raises_is_given_up(model: Any, record: Callable[..., moe_trace.Trace], monkeypatch: Any) -> None:
    def passes() -> None:
        with monkeypatch.context() as broken:

            def fail(*_: Any, **__: Any) -> None:
                raise RuntimeError("on purpose")

            broken.setattr(model.model.layers[1].mlp, "forward", fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                model(tokens(1, 3))
        model(tokens(1, 4))

    trace = record(passes)
    assert trace.rows == 4 and trace.losses["aborted"].steps == 1


def test_a_step_of_the_callers_own_is_left_to_them(model: Any, tmp_path: Path) -> None:
    with moe_native.Recorder(tmp_path) as recorder, hf.attach(model, recorder), torch.no_grad():
        with recorder.step(requests=["mine"], positions=[range(10, 13)]):
            model(tokens(1, 3))
        model(tokens(1, 2))
    trace = moe_trace.open(tmp_path)
    assert trace.request("mine").positions.tolist() == [10, 11, 12]
    assert trace.rows == 5


def test_gradients_are_what_they_would_be(model: Any, tmp_path: Path) -> None:
    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(tokens(1, 4)).logits.square().mean().backward()
        grad: torch.Tensor = model.model.layers[0].mlp.gate.weight.grad.clone()
        model.zero_grad()
        return grad

    alone = gradient()
    with moe_native.Recorder(tmp_path) as recorder, hf.attach(model, recorder):
        assert torch.equal(gradient(), alone)
    assert moe_trace.open(tmp_path).rows == 4


def test_detaching_leaves_the_model_as_it_was(model: Any, tmp_path: Path) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with moe_native.Recorder(tmp_path) as recorder:
        handle = hf.attach(model, recorder)
        assert hooks() > before
        with torch.no_grad():
            with_hooks = model(tokens(1, 3)).logits
        handle.detach()
        handle.detach()
        assert hooks() == before
        with torch.no_grad():
            assert torch.equal(model(tokens(1, 3)).logits, with_hooks)
    assert moe_trace.open(tmp_path).rows == 3


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
    assert trace.complete and len(trace.layers) == len(experts)
    assert {layer.status for layer in trace.layers} == {"exact"}
    for layer, (ids, weights) in zip(trace.layers, seen, strict=True):
        rows = trace.layer(layer.layer)
        assert layer.top_k == top_k
        # What the experts were given is what was recorded.
        assert np.array_equal(rows.ids, ids.numpy())
        np.testing.assert_allclose(rows.weights, weights.float().numpy(), rtol=1e-6)
        if name != "DeepseekV3Config":  # its choice does not follow the logits alone
            chosen = torch.from_numpy(rows.logits).topk(top_k, dim=-1).indices.numpy()
            assert np.array_equal(np.sort(chosen, axis=-1), np.sort(rows.ids.astype(np.int64), axis=-1))


class OldBlock(torch.nn.Module):
    """As models with remote code write it: a Linear gate, and experts in a list that the block itself calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 6, bias=False)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(6)])
        self.top_k = 2

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 8)
        weights, ids = self.gate(flat).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = [
            sum(w * self.experts[int(e)](x) for w, e in zip(ws, es, strict=True))
            for x, ws, es in zip(flat, weights, ids, strict=True)
        ]
        return torch.stack(out).reshape(hidden.shape)  # type: ignore[arg-type]


class OldModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList([OldBlock(), OldBlock()])

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_a_choice_that_only_the_gate_shows_is_computed_and_marked_derived(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OldModel()
    with moe_native.Recorder(tmp_path, weights_dtype="exact") as recorder, hf.attach(model, recorder), torch.no_grad():
        model(tokens(1, 5) % 16)
    trace = moe_trace.open(tmp_path)
    assert [(layer.status, layer.experts, layer.top_k) for layer in trace.layers] == [("derived", 6, 2)] * 2
    assert "top-k of the softmax, renormalised" in trace.layers[0].detail
    with torch.no_grad():
        gate = model.layers[0].gate(model.embed(tokens(1, 5) % 16)[0]).softmax(-1).topk(2, dim=-1)
    assert np.array_equal(trace.layer(0).ids, gate.indices.numpy())
    np.testing.assert_allclose(trace.layer(0).weights.sum(-1), 1, rtol=1e-6)


def test_models_that_cannot_be_recorded_are_refused(tmp_path: Path) -> None:
    with moe_native.Recorder(tmp_path) as recorder:
        with pytest.raises(ValueError, match="Linear has no Mixture-of-Experts layer"):
            hf.attach(torch.nn.Linear(2, 2), recorder)
        config = transformers.SwitchTransformersConfig(
            vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2
        )
        with pytest.raises(ValueError, match="encoder-decoder"):
            hf.attach(transformers.SwitchTransformersForConditionalGeneration(config), recorder)


def test_a_model_on_another_device_is_missed(tokenizer: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
        )
    with moe_native.Recorder(tmp_path) as recorder, hf.attach(model, recorder):
        pass
    layers = moe_trace.open(tmp_path).layers
    assert [layer.status for layer in layers] == ["missed", "missed"]
    assert "runs on meta: this version records on CPU only" in layers[0].detail
