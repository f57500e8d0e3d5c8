"""Recording transformers models: against `output_router_logits`, with padding and caches, through `generate`."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
import torch
import transformers
from old_transformers import OldModel, old_trace, tokens

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


def routed(model: Any, ids: torch.Tensor) -> np.ndarray:
    """`[rows, layers, experts]` router logits of one sequence, by transformers."""
    with torch.no_grad():
        return torch.stack(model(ids, output_router_logits=True).router_logits, dim=1).numpy()


def test_rows_are_what_transformers_routed(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    ids = tokens(2, 7)
    trace = record(lambda: model(ids))
    assert trace.complete and trace.rows == 14
    assert [(layer.layer, layer.status, layer.experts, layer.top_k) for layer in trace.coverage] == [
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


def say_phases(rows: moe_trace.Trace) -> list[int]:
    """How many rows are prefill, decode, and unknown."""
    prefill, decode = rows.prefill().rows, rows.decode().rows
    return [prefill, decode, rows.rows - prefill - decode]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_not_recorded_with_a_static_cache(
    attention: str, model: Any, record: Callable[..., moe_trace.Trace]
) -> None:
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    made: list[torch.Tensor] = []

    def generate() -> None:  # generate hands masks of four dimensions over, one for each kind of layer
        options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
        made.append(model.generate(ids, attention_mask=mask, **options))

    model.set_attn_implementation(attention)
    try:
        trace = record(generate)
    finally:
        model.set_attn_implementation("sdpa")
    for row, length in enumerate([3, 6]):
        rows = trace.request(str(row))
        assert rows.positions.tolist() == list(range(length + 3))
        assert trace.requests[str(row)].prompt_len == length
        assert say_phases(rows) == [length, 3, 0]
        alone = made[0][row : row + 1, -(length + 4) : -1]
        assert rows.tokens.tolist() == alone[0].tolist()
        np.testing.assert_allclose(rows.layer(range(LAYERS)).logits, routed(model, alone), atol=1e-3)


def test_rows_whose_place_is_not_known_are_nobodys(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    packed = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    trace = record(lambda: model(tokens(2, 5), position_ids=packed))
    assert trace.rows == 10
    assert trace.request_ids.tolist() == [None] * 5 + ["1"] * 5
    assert trace.request("1").positions.tolist() == list(range(5))
    assert say_phases(trace) == [5, 0, 5]
    assert trace.requests["1"].prompt_len == 5


def test_a_copied_prefix_starts_requests_of_their_own(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    prefix, made = tokens(1, 5), []

    def reuse() -> None:  # transformers' recipe
        cache = model(prefix, use_cache=True).past_key_values
        for length in (3, 4):
            full = torch.cat([prefix, tokens(1, length)], dim=1)
            made.append(model.generate(full, past_key_values=copy.deepcopy(cache), max_new_tokens=3, do_sample=False))

    trace = record(reuse)
    assert trace.request("0").positions.tolist() == list(range(5))
    for name, length, ids in zip(["1", "2"], [3, 4], made, strict=True):
        rows = trace.request(name)
        assert rows.positions.tolist() == list(range(5, 5 + length + 2))
        assert say_phases(rows) == [length, 2, 0]
        assert trace.requests[name].prompt_len == 5 + length
        assert rows.tokens.tolist() == ids[0, 5:-1].tolist()
        whole = routed(model, ids[:, :-1])
        np.testing.assert_allclose(rows.layer(range(LAYERS)).logits, whole[5:], atol=1e-3)


def test_caches_in_turn_are_told_apart(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    def in_turn() -> None:
        caches = [model(tokens(1, n), use_cache=True).past_key_values for n in (2, 3)]
        for _ in range(2):
            for cache in caches:
                model(tokens(1, 1), past_key_values=cache)

    trace = record(in_turn)
    assert trace.request("0").positions.tolist() == [0, 1, 2, 3]
    assert trace.request("1").positions.tolist() == [0, 1, 2, 3, 4]
    assert [say_phases(trace.request(name)) for name in "01"] == [[2, 2, 0], [3, 2, 0]]


def test_a_cache_that_is_cut_back_starts_new_requests(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    def answers() -> None:
        cache = model(tokens(1, 5), use_cache=True).past_key_values
        for length in (2, 3):
            model(tokens(1, length), past_key_values=cache)
            model(tokens(1, 1), past_key_values=cache)
            cache.crop(-length - 1)

    trace = record(answers)
    assert trace.request("0").positions.tolist() == list(range(8))
    assert trace.request("1").positions.tolist() == [5, 6, 7, 8]
    assert not trace.flags.any()
    assert trace.requests["1"].prompt_len is None


@pytest.mark.parametrize(
    ("length", "phases"),
    [(8, [8, 1, 1]), (9, [8, 2, 1]), (11, [11, 1, 1])],  # the row that may be prompt or not is unknown
)
def test_a_prompt_in_chunks(length: int, phases: list[int], model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    made: list[torch.Tensor] = []
    trace = record(
        lambda: made.append(model.generate(tokens(1, length), max_new_tokens=3, do_sample=False, prefill_chunk_size=4))
    )
    assert trace.request("0").positions.tolist() == list(range(length + 2))
    assert trace.tokens.tolist() == made[0][0, :-1].tolist()
    assert trace.requests["0"].prompt_len is None  # nobody said where it ends
    assert say_phases(trace) == phases


def assert_drafts(trace: moe_trace.Trace, name: str, made: torch.Tensor, prompt: int, model: Any) -> None:
    """The rows that are not rejected are the sequence's; after it, the last pass's drafts may follow."""
    rows = trace.request(name)
    rejected = rows.flags != 0
    assert set(rows.flags.tolist()) == {0, 2}
    kept, length = ~rejected, made.shape[1] - 1
    assert rows.positions[kept].tolist() == list(range(kept.sum()))
    assert rows.tokens[kept][:length].tolist() == made[0, :length].tolist()
    logits = rows.layer(range(LAYERS)).logits[kept][:length]
    np.testing.assert_allclose(logits, routed(model, made[:, :length]), atol=1e-3)
    for position, token in zip(rows.positions[rejected], rows.tokens[rejected], strict=True):
        assert position >= prompt
        assert token != made[0, position] or (rows.positions[rejected] < position).any()
    assert trace.requests[name].prompt_len == prompt
    assert say_phases(rows)[0] == prompt and say_phases(rows)[2] == 0


def test_rejected_drafts_of_prompt_lookup_are_flagged(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    made: list[torch.Tensor] = []
    trace = record(
        lambda: made.append(model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3))
    )
    assert_drafts(trace, "0", made[0], 11, model)


def test_rejected_drafts_of_an_assistant_are_flagged(
    model: Any, tokenizer: Any, record: Callable[..., moe_trace.Trace]
) -> None:
    assistant = tiny_moe.make_model(tokenizer, layers=LAYERS)
    with torch.no_grad():  # it agrees now and then
        for parameter in assistant.model.layers[-1].parameters():
            parameter.mul_(0.5)
    made: list[torch.Tensor] = []
    trace = record(
        lambda: made.append(model.generate(tokens(1, 6), max_new_tokens=20, do_sample=False, assistant_model=assistant))
    )
    assert_drafts(trace, "0", made[0], 6, model)


def test_a_prompt_in_pieces_goes_on_with_its_cache(model: Any, record: Callable[..., moe_trace.Trace]) -> None:
    ids = tokens(1, 8)

    def in_pieces() -> None:
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:], past_key_values=cache)

    trace = record(in_pieces)
    assert trace.request("0").positions.tolist() == list(range(8))
    assert say_phases(trace) == [5, 0, 3] and trace.requests["0"].prompt_len is None
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


@pytest.fixture
def interrupt(model: Any, monkeypatch: Any) -> Callable[[], None]:
    """A pass of 3 rows that Ctrl-C ends."""

    def run() -> None:
        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(model.model.layers[1].mlp, "forward", stop)
            model(tokens(1, 3))

    return run


def test_after_an_interrupt_recording_goes_on(
    model: Any, record: Callable[..., moe_trace.Trace], interrupt: Callable[[], None]
) -> None:
    def passes() -> None:
        interrupt()
        model(tokens(1, 4))
        model(tokens(1, 2))
        interrupt()  # detaching gives this one up

    trace = record(passes)
    assert trace.rows == 6
    assert trace.losses["aborted"].steps == 2 and trace.losses["aborted"].rows == 6


def test_a_step_that_the_caller_opens_after_an_interrupt_is_the_callers(
    model: Any, tmp_path: Path, interrupt: Callable[[], None]
) -> None:
    with moe_native.Recorder(tmp_path) as recorder, torch.no_grad():
        attachment = hf.attach(model, recorder)
        interrupt()
        recorder.abort_step()
        with recorder.step(requests=["mine"], positions=[range(10, 13)]):
            model(tokens(1, 3))
            attachment.detach()
    trace = moe_trace.open(tmp_path)
    assert trace.request("mine").positions.tolist() == [10, 11, 12] and trace.rows == 3
    assert trace.losses["aborted"].steps == 1


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


def test_masks_and_caches_of_other_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = OldModel()
    diagonal = torch.eye(3, dtype=torch.bool).expand(2, 1, 3, 3).clone()
    diagonal[1, 0, 0, 0] = False  # padding on the left

    def passes() -> None:
        model(tokens(1, 3) % 16, attention_mask=object())  # as flex attention's
        model(tokens(2, 3) % 16, attention_mask=diagonal)
        model(tokens(2, 3) % 16, attention_mask=torch.where(diagonal, 0.0, -torch.inf))
        for _ in range(2):
            model(tokens(1, 4) % 16, past_key_values=object())

    trace = old_trace(model, tmp_path, passes)
    assert trace.request_ids.tolist() == [None] * 3 + ["1"] * 3 + ["2"] * 2 + ["3"] * 3 + ["4"] * 2
    assert trace.positions.tolist()[3:] == [0, 1, 2, 0, 1] * 2
    # How much is in such a cache is not known: the pass is lost, and said once.
    assert trace.losses["aborted"].steps == 2
    assert len([record for record in caplog.records if "a pass of OldModel is not recorded" in record.message]) == 1


def test_caches_of_older_models_are_tuples(tmp_path: Path) -> None:
    model = OldModel()
    made: list[torch.Tensor] = []

    def forward(input_ids: torch.Tensor, past_key_values: Any = None) -> Any:
        past = 0 if past_key_values is None else past_key_values[0][0].shape[-2]
        made[:] = [torch.zeros(1, 1, past + input_ids.shape[1], 2)]
        return types.SimpleNamespace(hidden=OldModel.forward(model, input_ids), past_key_values=((made[0], made[0]),))

    model.forward = forward  # type: ignore[assignment, method-assign]

    def passes() -> None:
        out = model(tokens(1, 3))
        for _ in range(2):
            out = model(tokens(1, 1), past_key_values=out.past_key_values)
        model(tokens(1, 1), past_key_values=((torch.zeros(1, 1, 5, 2),),))

    model.embed = torch.nn.Embedding(300, 8)
    trace = old_trace(model, tmp_path, passes)
    assert trace.request("0").positions.tolist() == [0, 1, 2, 3, 4]
    assert trace.request("1").positions.tolist() == [5]
    assert say_phases(trace) == [3, 2, 1]


def test_models_that_cannot_be_recorded_are_refused(tmp_path: Path) -> None:
    with moe_native.Recorder(tmp_path) as recorder:
        with pytest.raises(ValueError, match=r"sequence of names: write \['chat'\]"):
            hf.attach(OldModel(), recorder, requests="chat")
        with pytest.raises(ValueError, match="Linear has no Mixture-of-Experts layer"):
            hf.attach(torch.nn.Linear(2, 2), recorder)
        config = transformers.SwitchTransformersConfig(
            vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2
        )
        with pytest.raises(ValueError, match="encoder-decoder"):
            hf.attach(transformers.SwitchTransformersForConditionalGeneration(config), recorder)
