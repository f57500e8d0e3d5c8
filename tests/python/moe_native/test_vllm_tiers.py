"""Counts alone, and rows of a share of the requests, in real vLLM engines, against a full recording of the same
prompts; and settings that change while an engine serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Engine
from recorded import LAYERS, MAX_TOKENS, PROMPTS, TOP_K

import moe_trace
from moe_native.tier import Tier

pytestmark = pytest.mark.vllm

SAMPLE = 0.5
NAMES = [str(i) for i in range(10_000)]
KEPT = {name for name in NAMES if Tier(("ids",), sample=SAMPLE).keeps(name)}
assert 0 < len(KEPT & set(NAMES[: len(PROMPTS)])) < len(PROMPTS)


class Served:
    """A trace, and what vLLM and the recorder said meanwhile."""

    def __init__(self, trace: moe_trace.Trace, given: list[Any]) -> None:
        self.trace = trace
        self.given = given

    def executed(self, batch: int) -> int:
        """Tokens that went through the model: the last of each request is sampled and not executed."""
        return sum(len(r["prompt"]) + len(r["generated"]) - 1 for r in self.given[batch])


def serve(engine: Engine, checkpoint: Path, path: Path, do: list[list[Any]], **environment: str) -> Served:
    job = {
        "engine": {
            "model": str(checkpoint),
            "dtype": "float32",
            "seed": 1234,
            "max_model_len": 256,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 256,
            "enable_prefix_caching": False,
            "enforce_eager": True,
        },
        "trace": str(path),
        "prompts": PROMPTS,
        "do": do,
    }
    environment = {"MOE_NATIVE_TRACE": str(path), "VLLM_ALLOW_INSECURE_SERIALIZATION": "0", **environment}
    given = engine(job, script="vllm_tiers_engine.py", **environment)["given"]
    return Served(moe_trace.open(path), given)


@pytest.fixture(scope="module")
def steered(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """One engine in one process: the same prompts under four settings, each flushed so that no block has two."""
    generate, flush = ["generate", MAX_TOKENS], ["rpc", "flush", {}]
    do = [
        generate,  # 0: everything
        flush,
        ["rpc", "set", {"fields": "counts"}],
        generate,  # 3: counts
        flush,
        ["rpc", "set", {"fields": "ids,weights,logits,tokens", "sample": SAMPLE, "layers": "1-3"}],
        generate,  # 6: a share, of some layers, with fields that were not there before
        flush,
        ["rpc", "pause"],
        generate,  # 9: nothing
        ["rpc", "resume"],
        ["rpc", "set", {"fields": "ids", "sample": "1", "layers": "all"}],
        generate,  # 12: ids
        ["rpc", "set", {"fields": "idz"}],
        ["rpc", "status"],
    ]
    path = tmp_path_factory.mktemp("steered") / "trace"
    return serve(engine, checkpoint, path, do, VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.fixture(scope="module")
def from_outside(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """An engine in processes of its own, started with a share; then another process steers it while it generates."""
    do = [
        ["generate", MAX_TOKENS],
        ["rpc", "flush", {}],
        [
            "ctl",
            ["set", "fields=counts"],
            ["flush"],
            ["pause"],
            ["status"],
            ["resume"],
            ["set", "sample=7"],
            ["status"],
        ],
        ["generate", MAX_TOKENS],
        ["rpc", "status"],
    ]
    path = tmp_path_factory.mktemp("outside") / "trace"
    return serve(engine, checkpoint, path, do, MOE_NATIVE_SAMPLE=str(SAMPLE))


def steps_of(served: Served, batch: int) -> tuple[int, int]:
    """The steps of a batch of `steered`: all have as many; those of the paused one have numbers, and no rows."""
    each = served.given[-1][0]["steps"] // 4
    first = {0: 0, 3: 1, 6: 2, 12: 4}[batch] * each
    return first, first + each


def test_every_batch_generated_the_same(steered: Served) -> None:
    texts = [[r["generated"] for r in steered.given[batch]] for batch in (0, 3, 6, 9, 12)]
    assert texts == texts[:1] * 5
    assert steered.trace.complete and not steered.trace.losses


def test_counts_are_those_of_a_full_recording(steered: Served) -> None:
    full = steered.trace.steps(*steps_of(steered, 0))
    for batch, layers in ((3, range(LAYERS)), (6, range(1, LAYERS))):
        same = steered.trace.steps(*steps_of(steered, batch))
        for phase in ("prefill", "decode"):
            one, other = same.phase(phase).layer(layers), full.phase(phase).layer(layers)
            assert np.array_equal(one.counts(), other.counts())
            assert np.array_equal(one.weight_sums(), other.weight_sums())
        assert same.layer(layers).counts().sum() == len(layers) * TOP_K * steered.executed(batch)


def test_counts_alone_have_neither_rows_nor_names(steered: Served) -> None:
    assert steered.trace.steps(*steps_of(steered, 3)).rows == 0
    assert not {r["id"] for r in steered.given[3]} & set(steered.trace.requests)


def test_the_rows_of_a_sampled_request_are_those_of_a_full_recording(steered: Served) -> None:
    same = steered.trace.steps(*steps_of(steered, 6))
    kept = [(a["id"], b["id"]) for a, b in zip(steered.given[0], steered.given[6], strict=True) if b["id"] in KEPT]
    assert 0 < len(kept) < len(PROMPTS)
    assert set(same.request_ids) == {name for _, name in kept}
    for name, sampled in kept:
        one = steered.trace.layer(range(1, LAYERS)).request(name)
        other = steered.trace.layer(range(1, LAYERS)).request(sampled)
        for column in ("positions", "ids", "weights", "flags"):
            assert np.array_equal(getattr(one, column), getattr(other, column)), column
        chosen = np.sort(np.argsort(-other.logits, axis=-1, kind="stable")[..., :TOP_K], axis=-1)
        assert np.array_equal(chosen, np.sort(other.ids, axis=-1))
        generated = next(r for r in steered.given[6] if r["id"] == sampled)
        assert other.tokens.tolist() == [*generated["prompt"], *generated["generated"][:-1]]
    assert steered.trace.layer(0).steps(*steps_of(steered, 6)).rows == 0  # the layer was not asked for


def test_a_pause_is_told(steered: Served) -> None:
    assert steered.given[8][0]["state"] == "paused" and steered.given[10][0]["state"] == "recording"
    each = steered.given[-1][0]["steps"] // 4
    assert (steered.trace.paused.steps, steered.trace.paused.rows) == (each, steered.executed(9))
    assert not {r["id"] for r in steered.given[9]} & set(steered.trace.requests)
    assert steered.trace.steps(*steps_of(steered, 12)).rows == steered.executed(12)


def test_what_cannot_be_set_is_told_to_the_caller(steered: Served) -> None:
    (refusal,) = steered.given[-2]
    assert refusal["ok"] is False and "'idz' is not a field" in refusal["error"]
    assert steered.given[-1][0]["fields"] == ["ids"]


def test_a_share_from_the_environment_is_the_same_in_another_engine(steered: Served, from_outside: Served) -> None:
    first, trace = from_outside.given[0], from_outside.trace
    mine = {r["id"] for r in first}
    assert [r["generated"] for r in first] == [r["generated"] for r in steered.given[0]]
    assert set(trace.requests) <= KEPT and set(trace.requests) & mine == mine & KEPT
    for name in mine & KEPT:
        one, other = trace.request(name), steered.trace.request(name)
        assert np.array_equal(one.positions, other.positions)
        for layer in range(LAYERS):
            assert np.array_equal(one.layer(layer).ids, other.layer(layer).ids)
            assert np.array_equal(one.layer(layer).weights, other.layer(layer).weights)
        generated = next(r for r in first if r["id"] == name)
        assert one.rows == len(generated["prompt"]) + len(generated["generated"]) - 1


def test_another_process_steers_an_engine_that_generates(from_outside: Served) -> None:
    codes, said = zip(*from_outside.given[2], strict=True)
    assert codes == (0, 0, 0, 0, 0, 1, 0), said
    assert "recording: counts of all layers" in said[0] and "paused: counts" in said[3] and "recording" in said[6]
    assert "sample is '7'" in said[5] or "share of the requests" in said[5]
    trace, (status,) = from_outside.trace, from_outside.given[-1]
    assert trace.complete and not trace.losses
    assert trace.paused.steps > 0  # it generated all the while
    steps = sum(len(block.steps) for rank in trace.ranks for block in rank.blocks())
    assert steps == status["steps"]
    # After all of that, counts alone, of everything that was executed.
    assert not {r["id"] for r in from_outside.given[3]} & set(trace.requests)
    assert trace.counts().sum() == LAYERS * TOP_K * trace.executed_rows
    assert trace.executed_rows > trace.rows + from_outside.executed(3)
