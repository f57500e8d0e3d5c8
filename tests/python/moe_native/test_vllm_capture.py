"""Captures of real vLLM engines: each row against transformers' logits for the same tokens, and against the ids that
the model chose in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Engine
from recorded import EXPERTS, LAYERS, MAX_TOKENS, PROMPTS, TOP_K, Transformers

import moe_trace

pytestmark = pytest.mark.vllm

Done = list[Any]
ALL = ("ids", "weights", "logits", "hidden")
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "seed": 1234,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "enforce_eager": True,
}


def run(engine: Engine, steps: list[Any], script: str = "capture_engine.py", **environment: str) -> Done:
    """What each step gave."""
    answer = engine(steps, script, **{"VLLM_ALLOW_INSECURE_SERIALIZATION": "0", **environment})
    given: Done = torch.load(answer["path"] + ".pt", weights_only=False)
    if script == "capture_engine.py":
        for (what, _), gave in zip(steps, given, strict=True):
            assert what not in ("build", "import") or gave is None, gave
    return given


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Transformers:
    return Transformers(checkpoint)


def check(samples: list[dict[str, Any]], judge: Transformers, layers: Sequence[int] = tuple(range(LAYERS))) -> int:
    """Every row of the samples: of the right token, with transformers' logits, and with the experts that these choose.
    Returns how many rows there are."""
    assert samples, samples
    for sample in samples:
        rows = sample["prompt_len"] + len(sample["generated"]) - 1
        assert sample["positions"] == list(range(rows))
        assert sample["tokens"][sample["prompt_len"] :] == sample["generated"][:-1]
        expected = judge.logits(sample["tokens"])
        for layer in layers:
            logits, ids, weights = (sample[field][layer] for field in ("logits", "ids", "weights"))
            assert logits.shape == (rows, EXPERTS) and logits.dtype == torch.float32
            np.testing.assert_allclose(logits.numpy(), expected[:, layer], atol=2e-4)
            chosen, order = logits.topk(TOP_K).indices.sort().values, ids.long().sort()
            assert torch.equal(chosen, order.values)
            probabilities = logits.softmax(-1).gather(1, ids.long())
            torch.testing.assert_close(weights, probabilities, atol=1e-5, rtol=1e-4)
    return sum(len(sample["tokens"]) for sample in samples)


@pytest.fixture(scope="module")
def chunked(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, moe_trace.Trace]:
    """Small chunks, a prefix cache, so few KV blocks that requests are preempted, and a trace whose ring is smaller
    than a step of what is captured."""
    path = tmp_path_factory.mktemp("capture") / "trace"
    build = {
        **ENGINE,
        "model": str(checkpoint),
        "max_num_batched_tokens": 48,
        "enable_prefix_caching": True,
        "block_size": 32,
        "num_gpu_blocks_override": 9,
    }
    long = {"max_tokens": 60}
    done = run(
        engine,
        [
            ["build", build],
            ["generate", {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}],
            ["capture", {"prompts": PROMPTS, "sampling": {"max_tokens": MAX_TOKENS}, "fields": ALL}],
            ["capture", {"prompts": PROMPTS[:4], "sampling": long}],
            ["capture", {"prompts": PROMPTS[:2], "sampling": {"n": 3, "temperature": 1.0, "max_tokens": 5}}],
            ["capture", {"prompts": PROMPTS[:2], "layers": [1, 3], "fields": "logits,weights"}],
            ["hs", {"prompts": PROMPTS, "max_tokens": 4, "split_by_samples": True}],
            ["hs", {"prompts": PROMPTS, "max_tokens": 4}],
            ["capture", {"prompts": PROMPTS[:1], "layers": [9]}],
            ["capture", {"prompts": PROMPTS[:1], "fields": "tokens"}],
            ["capture", {"prompts": [{"nothing": 1}]}],
            ["capture", {"prompts": [{"text": "a picture", "images": [["pil", 1, 32, 32]]}]}],
            ["capture", {"prompts": ["Maria " * 300]}],
            ["capture", {"prompts": [[5, 6, 7], PROMPTS[0]], "sampling": {"max_tokens": 1}}],
            ["generate", {"prompts": PROMPTS[5:], "max_tokens": 2}],
            ["generate", {"prompts": PROMPTS[5:], "max_tokens": 2}],
            ["capture", {"prompts": PROMPTS[5:], "sampling": {"max_tokens": 2}}],
            ["generate", {"prompts": PROMPTS[5:], "max_tokens": 2}],
        ],
        MOE_NATIVE_TRACE=str(path),
        MOE_NATIVE_RING_BYTES="64KiB",
        VLLM_LOGGING_LEVEL="INFO",
    )
    return done, moe_trace.open(path)


def test_every_row_of_chunks_and_batches(chunked: tuple[Done, moe_trace.Trace], judge: Transformers) -> None:
    done, _ = chunked
    before, samples = done[1], done[2]
    assert [sample["prompt_index"] for sample in samples] == list(range(len(PROMPTS)))
    assert [sample["generated"] for sample in samples] == [request["generated"] for request in before]
    assert check(samples, judge) == sum(len(r["prompt"]) + MAX_TOKENS - 1 for r in before)


def test_the_routers_input(chunked: tuple[Done, moe_trace.Trace], checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    gates = [layer.mlp.gate.weight for layer in AutoModelForCausalLM.from_pretrained(checkpoint).model.layers]
    for sample in chunked[0][2]:
        for layer, gate in enumerate(gates):
            torch.testing.assert_close(sample["hidden"][layer] @ gate.T, sample["logits"][layer], atol=1e-4, rtol=1e-4)


def test_preempted_requests(chunked: tuple[Done, moe_trace.Trace], judge: Transformers) -> None:
    done, trace = chunked
    names = [sample["request"] for sample in done[3]]
    again = sum(int((trace.request(name).flags & 1).sum()) for name in names)
    assert again > 0  # rows that were executed twice: there was a preemption
    check(done[3], judge)


def test_samplings_of_a_prompt_come_in_their_order(chunked: tuple[Done, moe_trace.Trace], judge: Transformers) -> None:
    samples = chunked[0][4]
    assert [sample["prompt_index"] for sample in samples] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(sample["generated"]) for sample in samples}) > 2
    check(samples, judge)


def test_some_layers_and_fields(chunked: tuple[Done, moe_trace.Trace], judge: Transformers) -> None:
    samples = chunked[0][5]
    assert all(set(sample["logits"]) == {1, 3} and "hidden" not in sample for sample in samples)
    check(samples, judge, [1, 3])


def test_the_names_that_scripts_use(chunked: tuple[Done, moe_trace.Trace], judge: Transformers) -> None:
    split, joined = chunked[0][6], chunked[0][7]
    for logits, tokens in zip(split["logits"], split["tokens"], strict=True):
        expected = judge.logits(tokens[:-1])
        for layer in range(LAYERS):
            np.testing.assert_allclose(logits[layer].numpy(), expected[:, layer], atol=2e-4)
    assert split["tokens"] == joined["tokens"]
    for layer in range(LAYERS):
        whole = torch.cat([logits[layer] for logits in split["logits"]])
        torch.testing.assert_close(joined["logits"][layer], whole, atol=2e-4, rtol=1e-4)
        assert sum(joined["usage"]["expert_usage_counts"][layer]) == TOP_K * len(whole)
    assert joined["usage"]["num_tokens_analyzed"] == len(whole)


def test_a_capture_does_not_read_the_prefix_cache_and_others_do(
    chunked: tuple[Done, moe_trace.Trace], judge: Transformers
) -> None:
    _, before, captured, after = chunked[0][14:]
    assert before[0]["cached"] > 0 and after[0]["cached"] == before[0]["cached"]
    assert not captured[0]["cached"]
    check(captured, judge)


@pytest.mark.parametrize(
    ("step", "kind", "texts"),
    [
        (8, "ValueError", ["no MoE layer 9", "0-3"]),
        (9, "ValueError", ["'tokens' cannot be captured"]),
        (10, "ValueError", ["Unsupported input format", "nothing"]),
        (11, "ValueError", ["takes no images"]),
    ],
)
def test_errors_say_what_to_do(chunked: tuple[Done, moe_trace.Trace], step: int, kind: str, texts: list[str]) -> None:
    found, said = chunked[0][step]["error"]
    assert found == kind and all(text in said for text in texts), said


def test_an_engine_goes_on_after_an_error(chunked: tuple[Done, moe_trace.Trace], judge: Transformers) -> None:
    assert "error" in chunked[0][12]  # vLLM's own, of a prompt that is too long
    tokens, text = chunked[0][13]
    assert tokens["tokens"] == [5, 6, 7]
    check([tokens, text], judge)


def test_the_trace_goes_on_meanwhile_as_it_is_set(chunked: tuple[Done, moe_trace.Trace]) -> None:
    done, trace = chunked
    assert trace.complete and not trace.losses
    for sample in done[2]:
        rows = trace.request(sample["request"])
        assert rows.positions.tolist() == sample["positions"]
        for layer in range(LAYERS):
            assert np.array_equal(rows.layer(layer).ids, sample["ids"][layer].numpy())
            half = sample["weights"][layer].half().numpy()
            assert np.array_equal(rows.layer(layer).weights, half)
    with pytest.raises(moe_trace.TraceError, match="logits were not recorded"):
        _ = trace.layer(0).logits


def test_two_captures_of_a_compiled_engine_at_a_time(engine: Engine, checkpoint: Path, judge: Transformers) -> None:
    build = {**ENGINE, "model": str(checkpoint), "enforce_eager": False, "max_num_batched_tokens": 32}
    first, second, other, problem = run(engine, [build, PROMPTS], "capture_async_engine.py")
    check(first, judge)
    check(second, judge, [2])
    assert set(second[0]["logits"]) == {2} and len(first) == len(second) == len(PROMPTS)
    assert len(other) == 20  # tokens of a request beside them
    assert problem[0] == "ValueError"


def test_two_tensor_parallel_ranks(engine: Engine, checkpoint: Path, judge: Transformers) -> None:
    build = {**ENGINE, "model": str(checkpoint), "tensor_parallel_size": 2}
    sampling = {"max_tokens": MAX_TOKENS}
    done = run(
        engine,
        [
            ["import", "moe_native.hidden_states"],
            ["build", build],
            ["capture", {"prompts": PROMPTS, "sampling": sampling}],
        ],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    check(done[2], judge)


def test_an_eager_engine_of_this_process_is_bound_late(
    engine: Engine, checkpoint: Path, judge: Transformers, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    dense = tmp_path / "dense"
    config = Qwen2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(checkpoint)),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(dense)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(dense)
    build = {**ENGINE, "model": str(checkpoint), "distributed_executor_backend": "uni"}
    call = {"prompts": PROMPTS, "sampling": {"max_tokens": MAX_TOKENS}}
    done = run(
        engine,
        [
            ["build", build],
            ["generate", {"prompts": PROMPTS, "max_tokens": 2}],
            ["capture", call],
            ["build", {**build, "model": str(dense)}],
            ["capture", call],
        ],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    check(done[2], judge)
    kind, said = done[4]["error"]
    assert kind == "CaptureError" and "has no MoE layer" in said and str(dense) in said


def test_an_engine_that_was_built_too_early_says_what_to_do(engine: Engine, checkpoint: Path) -> None:
    done = run(engine, [["build", {**ENGINE, "model": str(checkpoint)}], ["capture", {"prompts": PROMPTS[:1]}],
                        ["generate", {"prompts": PROMPTS[:1], "max_tokens": 3}]])  # fmt: skip
    kind, said = done[1]["error"]
    assert kind == "NotArmedError" and "before recording was armed" in said and "moe_native.hidden_states" in said
    assert len(done[2][0]["generated"]) == 3  # the engine serves on
