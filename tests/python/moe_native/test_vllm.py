"""Recording in real vLLM engines, checked against transformers and against vLLM's own account of what it executed.

Each engine runs in a process of its own, and vLLM puts its core and its worker into further ones, as it does for users.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Engine

import moe_trace

pytestmark = pytest.mark.vllm

LAYERS, EXPERTS, TOP_K = 4, 60, 4
PROMPTS = [f"Maria has {n} hens and buys {3 * n} more." + " How many eggs?" * n for n in range(6)]
MAX_TOKENS = 12
RECOMPUTED, REJECTED = 1, 2  # flags of a row
NEAR_TIE = 1e-5  # two float32 implementations may order logits closer than this differently
ALL_FIELDS = "ids,weights,logits,hidden,tokens"


def job(checkpoint: Path, **engine: Any) -> dict[str, Any]:
    return {
        "engine": {
            "model": str(checkpoint),
            "dtype": "float32",
            "seed": 1234,
            "max_model_len": 256,
            "max_num_seqs": 4,  # fewer than the prompts, so that requests come and go
            "enable_prefix_caching": False,
            **engine,
        },
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "inspect": True,
    }


class Recorded:
    """A trace, and what vLLM said of the requests in it."""

    def __init__(self, path: Path, answer: dict[str, Any]) -> None:
        self.path = path
        self.trace = moe_trace.open(path)
        self.answer = answer
        self.requests: list[dict[str, Any]] = answer["requests"]

    @property
    def generated(self) -> list[list[int]]:
        return [request["generated"] for request in self.requests]

    def executed(self, request: dict[str, Any]) -> list[int]:
        """The tokens of a request that went through the model: the last one is sampled and not executed."""
        return [*request["prompt"], *request["generated"][:-1]]


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


def by_transformers(checkpoint: Path, recorded: Recorded) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Each request's router logits, `[rows, layers, experts]`, from one pass over the tokens that vLLM executed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    for request in recorded.requests:
        with torch.no_grad():
            output = model(torch.tensor([recorded.executed(request)]), output_router_logits=True)
        yield request["id"], torch.stack(output.router_logits, dim=1).numpy()


def test_ids_and_weights_are_those_of_transformers(
    checkpoint: Path, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    near_ties = rows_checked = 0
    exact = recorded.trace.metadata["weights_dtype"] == "exact"
    for request, logits in by_transformers(checkpoint, recorded):
        rows = recorded.trace.request(request).layer(range(LAYERS))
        order = np.argsort(rows.positions)
        ids, weights = rows.ids[order].astype(np.int64), rows.weights[order].astype(np.float64)
        expected = np.argsort(-logits, axis=-1, kind="stable")[..., :TOP_K]
        ranked = -np.sort(-logits, axis=-1)
        margin = ranked[..., TOP_K - 1] - ranked[..., TOP_K]
        different = (np.sort(ids, axis=-1) != np.sort(expected, axis=-1)).any(axis=-1)
        assert (margin[different] < NEAR_TIE).all(), f"request {request}: {margin[different]}"
        near_ties += int(different.sum())
        rows_checked += different.size

        probabilities = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        # float16 keeps 11 bits; the two implementations differ by a few float32 roundings over 4 layers.
        tolerance = {"rtol": 2e-4, "atol": 1e-7} if exact else {"rtol": 2**-11 + 2e-4, "atol": 2**-24}
        np.testing.assert_allclose(weights, np.take_along_axis(probabilities, ids, axis=-1), **tolerance)
    with capsys.disabled():
        print(
            f"\n  {rows_checked} rows x layers as in transformers, {near_ties} near-ties (margin < {NEAR_TIE})", end=""
        )
    assert near_ties < rows_checked / 100


def test_recorded_logits_are_those_of_transformers_and_choose_the_recorded_ids(
    checkpoint: Path, with_all_fields: Recorded
) -> None:
    trace = with_all_fields.trace.layer(range(LAYERS))
    chosen = torch.from_numpy(trace.logits).topk(TOP_K, dim=-1).indices.numpy()
    assert (np.sort(chosen, axis=-1) == np.sort(trace.ids.astype(np.int64), axis=-1)).all()
    for request, logits in by_transformers(checkpoint, with_all_fields):
        rows = with_all_fields.trace.request(request).layer(range(LAYERS))
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
    assert [request["generated"] for request in off["requests"]] == compiled.generated


def test_without_settings_nothing_is_hooked(off: dict[str, Any], compiled: Recorded) -> None:
    assert off["hooks"] == [{"worker": [], "routers": [], "class": [], "additional_config": []}]
    assert compiled.answer["hooks"] == [
        {
            "worker": ["load_model", "compile_or_warm_up_model", "execute_model", "shutdown"],
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
        {**job(checkpoint, enforce_eager=True), "prompts": PROMPTS[:1]},
        MOE_NATIVE_TRACE=str(tmp_path / "trace"),
        MOE_NATIVE_OVERFLOW="wait",
    )
    said = [line for line in answer["log"].splitlines() if "moe_native:" in line]
    assert len(said) == 1 and "MOE_NATIVE_OVERFLOW is 'wait': use drop or block" in said[0]
    assert len(answer["requests"][0]["generated"]) == MAX_TOKENS
    assert not (tmp_path / "trace").exists()


IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # starts in a third of the time


def unusual(engine: Engine, checkpoint: Path, path: Path, environment: dict[str, str], **arguments: Any) -> Recorded:
    """An engine in one process, eager, with long prompts in chunks."""
    work = job(
        checkpoint,
        enforce_eager=True,
        distributed_executor_backend="uni",
        block_size=32,
        max_num_batched_tokens=32,
        additional_config={"moe_native": {"trace": str(path), "fields": "ids,tokens"}},
        **arguments,
    )
    work |= {"prompts": [prompt + " There are many." * 12 for prompt in PROMPTS], "max_tokens": 24, "inspect": False}
    return Recorded(path, engine(work, **IN_THIS_PROCESS, **environment))


def check_rows_and_flags(recorded: Recorded) -> int:
    """The last row of a position holds the token that counted, and exactly the repeats are marked. Returns how many."""
    repeated = 0
    for request in recorded.requests:
        rows = recorded.trace.request(request["id"])
        tokens = [*request["prompt"], *request["generated"]]
        seen: dict[int, int] = {}
        for position, token, flag in zip(
            rows.positions.tolist(), rows.tokens.tolist(), rows.flags.tolist(), strict=True
        ):
            assert flag & RECOMPUTED == (position in seen)
            repeated += flag & RECOMPUTED
            seen[position] = token
        executed = len(recorded.executed(request))
        assert [seen[position] for position in range(executed)] == tokens[:executed]
    return repeated


def test_preempted_requests_are_recorded_again_and_marked(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    # Room for 9 blocks of 32 tokens, where four requests need 12 or more.
    recorded = unusual(engine, checkpoint, tmp_path / "trace", {}, num_gpu_blocks_override=10)
    assert recorded.trace.complete
    assert check_rows_and_flags(recorded) > 0
    executed = sum(len(recorded.executed(request)) for request in recorded.requests)
    assert recorded.trace.rows > executed


def test_speculative_decoding_records_drafts_at_their_positions(
    engine: Engine, checkpoint: Path, tmp_path: Path
) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    recorded = unusual(engine, checkpoint, tmp_path / "trace", {}, speculative_config=ngram)
    assert recorded.trace.complete
    repeated = check_rows_and_flags(recorded)
    rejected = 0
    for request in recorded.requests:
        rows = recorded.trace.request(request["id"])
        order = rows.positions.tolist()
        for number, (position, flag) in enumerate(zip(order, rows.flags.tolist(), strict=True)):
            # A rejected draft's position is executed again, except behind the end of the request.
            if position < len(recorded.executed(request)):
                assert bool(flag & REJECTED) == (position in order[number + 1 :])
            rejected += bool(flag & REJECTED)
    assert rejected >= repeated > 0


def test_the_newer_runner_and_vllms_own_routed_experts(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="vLLM's newer model runner needs Triton")
    shim = str(Path(__file__).with_name("triton_on_cpu"))
    environment = {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join([shim, os.environ.get("PYTHONPATH", "")]),
    }
    arguments = {"enable_return_routed_experts": True, "enable_prefix_caching": True}
    recorded = unusual(engine, checkpoint, tmp_path / "trace", environment, **arguments)
    assert recorded.answer["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert recorded.trace.complete
    assert check_rows_and_flags(recorded) == 0
    for request in recorded.requests:
        rows = recorded.trace.request(request["id"]).layer(range(LAYERS))
        theirs = np.asarray(request["routed"])
        assert theirs.shape == (len(recorded.executed(request)), LAYERS, TOP_K)
        assert np.array_equal(np.sort(rows.ids.astype(np.int64), axis=-1), np.sort(theirs[rows.positions], axis=-1))
