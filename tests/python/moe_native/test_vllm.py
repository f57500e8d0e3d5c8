"""Recording in real vLLM engines, checked against transformers and against vLLM's own account of what it executed.

Each engine runs in a process of its own, and vLLM puts its core and its worker into further ones, as it does for users.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Engine
from recorded import ALL_FIELDS, EXPERTS, LAYERS, MAX_TOKENS, PROMPTS, TOP_K, Recorded, Transformers, job

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def off(engine: Engine, checkpoint: Path) -> dict[str, Any]:
    """Compiled, without recording. It runs before `compiled` and leaves its graphs in the shared cache."""
    return engine(job(checkpoint))


@pytest.fixture(scope="module")
def compiled(
    engine: Engine, checkpoint: Path, off: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    path = tmp_path_factory.mktemp("compiled") / "trace"
    return Recorded(path, engine(job(checkpoint), MOE_NATIVE_TRACE=str(path), MOE_NATIVE_FIELDS=ALL_FIELDS))


@pytest.fixture(scope="module")
def eager(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Eager, prompts in chunks of at most 16 tokens, exact weights; asked for by the additional config."""
    path = tmp_path_factory.mktemp("eager") / "trace"
    settings = {"trace": str(path), "fields": ALL_FIELDS.split(","), "weights_dtype": "exact"}
    arguments = {"enforce_eager": True, "max_num_batched_tokens": 16, "additional_config": {"moe_native": settings}}
    return Recorded(path, engine(job(checkpoint, **arguments)))


@pytest.fixture(scope="module")
def two_ranks(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    path = tmp_path_factory.mktemp("two_ranks") / "trace"
    answer = engine(
        job(checkpoint, enforce_eager=True, tensor_parallel_size=2),
        MOE_NATIVE_TRACE=str(path),
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    return Recorded(path, answer)


@pytest.fixture(params=["compiled", "eager", "two_ranks"])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    result: Recorded = request.getfixturevalue(request.param)
    return result


@pytest.fixture(params=["compiled", "eager"])
def with_all_fields(request: pytest.FixtureRequest) -> Recorded:
    result: Recorded = request.getfixturevalue(request.param)
    return result


def test_every_executed_token_and_nothing_else_is_recorded(recorded: Recorded) -> None:
    trace = recorded.trace
    executed = sum(len(recorded.executed(request)) for request in recorded.requests)
    assert trace.rows == executed  # so none of profiling, warm-up or padding either
    assert {layer: stats.rows for layer, stats in trace.stats().items()} == dict.fromkeys(range(LAYERS), executed)
    assert (trace.counts().sum(axis=1) == TOP_K * executed).all()
    assert not trace.losses and not trace.problems and trace.complete
    assert [(layer.layer, layer.status, layer.experts, layer.top_k) for layer in trace.coverage] == [
        (layer, "exact", EXPERTS, TOP_K) for layer in range(LAYERS)
    ]


def test_every_row_has_its_request_position_and_phase(recorded: Recorded) -> None:
    trace = recorded.trace
    assert set(trace.requests) == {request["id"] for request in recorded.requests}
    for request in recorded.requests:
        rows, prompt = trace.request(request["id"]), len(request["prompt"])
        assert trace.requests[request["id"]].prompt_len == prompt
        assert sorted(rows.positions.tolist()) == list(range(len(recorded.executed(request))))
        assert sorted(rows.prefill().positions.tolist()) == list(range(prompt))
        assert rows.decode().rows == MAX_TOKENS - 1
        assert rows.modality("text").rows == rows.rows


def test_prompts_were_cut_into_chunks_and_requests_batched(eager: Recorded) -> None:
    first = eager.trace.request(eager.requests[5]["id"]).prefill()
    assert len(eager.requests[5]["prompt"]) > 16
    assert len(set(first.step_numbers.tolist())) > 1
    steps = eager.trace.step_numbers
    together = [len(set(eager.trace.request_ids[steps == step])) for step in sorted(set(steps.tolist()))]
    assert max(together) > 1


def test_token_ids_are_those_of_the_requests(with_all_fields: Recorded) -> None:
    for request in with_all_fields.requests:
        rows = with_all_fields.trace.request(request["id"])
        order = np.argsort(rows.positions)
        assert rows.tokens[order].tolist() == with_all_fields.executed(request)


@pytest.fixture(scope="module")
def transformers(checkpoint: Path) -> Transformers:
    return Transformers(checkpoint)


def test_ids_and_weights_are_those_of_transformers(
    transformers: Transformers, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    near_ties = compared = 0
    exact = recorded.trace.metadata["weights_dtype"] == "exact"
    for request in recorded.requests:
        tokens, rows = recorded.executed(request), recorded.trace.request(request["id"]).layer(range(LAYERS))
        order = np.argsort(rows.positions)
        ids, weights = rows.ids[order].astype(np.int64), rows.weights[order].astype(np.float64)
        size, ties = transformers.check_ids(tokens, ids, request["id"])
        compared, near_ties = compared + size, near_ties + ties
        logits = transformers.logits(tokens).astype(np.float64)
        probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        # float16 keeps 11 bits; the two implementations differ by a few float32 roundings over 4 layers.
        tolerance = {"rtol": 2e-4, "atol": 1e-7} if exact else {"rtol": 2**-11 + 2e-4, "atol": 2**-24}
        np.testing.assert_allclose(weights, np.take_along_axis(probabilities, ids, axis=-1), **tolerance)
    with capsys.disabled():
        print(f"\n  {compared} rows x layers as in transformers, {near_ties} near-ties", end="")
    assert near_ties < compared / 100


def test_recorded_logits_are_those_of_transformers_and_choose_the_recorded_ids(
    transformers: Transformers, with_all_fields: Recorded
) -> None:
    trace = with_all_fields.trace.layer(range(LAYERS))
    chosen = torch.from_numpy(trace.logits).topk(TOP_K, dim=-1).indices.numpy()
    assert (np.sort(chosen, axis=-1) == np.sort(trace.ids.astype(np.int64), axis=-1)).all()
    for request in with_all_fields.requests:
        logits = transformers.logits(with_all_fields.executed(request))
        rows = with_all_fields.trace.request(request["id"]).layer(range(LAYERS))
        np.testing.assert_allclose(rows.logits[np.argsort(rows.positions)], logits, atol=2e-4)


def test_recorded_hidden_states_are_the_routers_input(checkpoint: Path, with_all_fields: Recorded) -> None:
    from transformers import AutoModelForCausalLM

    gates = [layer.mlp.gate.weight for layer in AutoModelForCausalLM.from_pretrained(checkpoint).model.layers]
    for layer, gate in enumerate(gates):
        rows = with_all_fields.trace.layer(layer)
        np.testing.assert_allclose(rows.hidden @ gate.detach().numpy().T, rows.logits, atol=1e-4)


def test_compiled_graphs_of_a_run_without_recording_are_not_used_with_it(
    off: dict[str, Any], compiled: Recorded
) -> None:
    # Same model, settings and cache directory: without the salt, `compiled` would look for `off`'s graphs.
    def key(answer: dict[str, Any]) -> set[str]:
        return {
            part
            for line in answer["log"].splitlines()
            if "AOT compiled" in line
            for part in line.split("/")
            if len(part) == 64
        }

    assert key(off) and key(compiled.answer) and not key(off) & key(compiled.answer)


def test_recording_changes_no_generated_token(off: dict[str, Any], compiled: Recorded) -> None:
    assert [request["generated"] for request in off["calls"][0]] == compiled.generated


def test_without_settings_nothing_is_hooked(off: dict[str, Any], compiled: Recorded) -> None:
    assert off["hooks"] == [{"worker": [], "routers": [], "class": [], "additional_config": []}]
    assert compiled.answer["hooks"] == [
        {
            "worker": ["load_model", "compile_or_warm_up_model", "execute_model", "sample_tokens", "shutdown"],
            "routers": ["CPURouter"] * LAYERS,
            "class": ["__init__"],
            "additional_config": ["moe_native"],
        }
    ]


def test_tensor_parallel_ranks_record_once(two_ranks: Recorded) -> None:
    directories = sorted(path.name for path in two_ranks.path.glob("run-*/*"))
    assert directories == ["rank-0-tp0"]
    assert two_ranks.trace.metadata["parallel"]["tensor_parallel_size"] == 2


def test_metadata_say_what_ran(checkpoint: Path, compiled: Recorded, eager: Recorded) -> None:
    metadata = compiled.trace.metadata
    assert metadata["model"] == str(checkpoint)
    assert (metadata["device"], metadata["dtype"], metadata["seed"]) == ("cpu", "float32", 1234)
    assert {"moe_native", "torch", "vllm", "transformers"} <= set(metadata["versions"])
    assert metadata["versions"]["torch"] == torch.__version__
    assert metadata["engine"]["enforce_eager"] is False
    assert eager.trace.metadata["engine"]["enforce_eager"] is True
    assert metadata["fields"] == ALL_FIELDS.split(",")


def test_files_are_for_their_owner_only_and_closed(recorded: Recorded) -> None:
    for path in recorded.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert not path.name.endswith(".open")
    for file in recorded.path.rglob("rank.json"):
        assert json.loads(file.read_text())["closed"] is True


def test_a_wrong_setting_is_said_once_and_the_engine_serves(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    answer = engine(
        job(checkpoint, {"prompts": PROMPTS[:1], "max_tokens": MAX_TOKENS}, enforce_eager=True),
        MOE_NATIVE_TRACE=str(tmp_path / "trace"),
        MOE_NATIVE_OVERFLOW="wait",
    )
    said = [line for line in answer["log"].splitlines() if "moe_native:" in line]
    assert len(said) == 1 and "MOE_NATIVE_OVERFLOW is 'wait': use drop or block" in said[0]
    assert len(answer["calls"][0][0]["generated"]) == MAX_TOKENS
    assert not (tmp_path / "trace").exists()
