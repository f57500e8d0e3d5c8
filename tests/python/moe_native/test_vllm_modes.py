"""Recording in the modes that people serve with, each row judged by vLLM's own account of the tokens it executed, and
by transformers' routing of them.

One engine that does many things in one process (which starts in a third of the time), and some that need to be set up
in their own way.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Engine
from recorded import (
    LAYERS,
    RECOMPUTED,
    SUPERSEDED,
    TOP_K,
    Recorded,
    Transformers,
    check_fates,
    check_routing,
    check_rows,
    job,
)

pytestmark = pytest.mark.vllm

IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
BLOCK = 32
# Alike up to the number, and longer than two KV blocks.
STORY = "There are many hens on the farm, and each of them lays an egg a day. " * 5
PROMPTS = [f"{STORY}Maria has {n} hens and buys {3 * n} more." + " How many eggs?" * n for n in range(6)]


def run(
    engine: Engine, checkpoint: Path, path: Path, *calls: dict[str, Any], environment: Any = (), **arguments: Any
) -> Recorded:
    """An engine in one process, eager, with long prompts in chunks and requests in batches, prefix caching on."""
    settings = {"trace": str(path), "fields": "ids,tokens"}
    arguments = {
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "block_size": BLOCK,
        "max_num_batched_tokens": 48,
        "enable_prefix_caching": True,
        "additional_config": {"moe_native": settings},
        **arguments,
    }
    work = {**job(checkpoint, *calls, **arguments), "inspect": False}
    return Recorded(path, engine(work, **IN_THIS_PROCESS, **dict(environment)))


@pytest.fixture(scope="module")
def transformers(checkpoint: Path) -> Transformers:
    return Transformers(checkpoint)


FIRST, AGAIN, WITHOUT_CACHE, SAMPLES, ABORTED = range(5)  # calls


@pytest.fixture(scope="module")
def one_engine(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    calls: list[dict[str, Any]] = [
        {"prompts": PROMPTS, "max_tokens": 12},
        {"prompts": PROMPTS, "max_tokens": 12},
        {"prompts": PROMPTS, "max_tokens": 12, "skip_reading_prefix_cache": True},
        {"prompts": PROMPTS[:2], "max_tokens": 20, "n": 3, "temperature": 1.0, "seed": 7},
        {"prompts": PROMPTS[:3], "max_tokens": 40, "abort_after": 9},
    ]
    return run(engine, checkpoint, tmp_path_factory.mktemp("modes") / "trace", *calls)


@pytest.mark.parametrize("call", [FIRST, AGAIN, WITHOUT_CACHE, SAMPLES])
def test_each_position_has_its_token_and_its_experts(
    one_engine: Recorded, call: int, transformers: Transformers, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = one_engine.calls[call]
    assert check_rows(one_engine, requests) == 0
    compared = check_routing(one_engine, requests, transformers)
    with capsys.disabled():
        print(f"\n  {compared} rows x layers as in transformers", end="")
    assert compared > 1000


def test_nothing_is_lost_and_everything_counted(one_engine: Recorded) -> None:
    trace = one_engine.trace
    assert trace.complete and trace.state == "closed"
    cached = sum(request.cached_tokens for request in trace.requests.values())
    # Of the aborted requests vLLM tells what it had sampled; that last token may have been executed or not.
    whole = [request for call in one_engine.calls[:ABORTED] for request in call]
    expected = sum(len(one_engine.executed(request)) for request in whole) - cached
    aborted = sum(trace.request(request["id"]).rows for request in one_engine.calls[ABORTED])
    cached_by_aborted = sum(trace.requests[request["id"]].cached_tokens for request in one_engine.calls[ABORTED])
    assert trace.rows == expected + cached_by_aborted + aborted


def test_requests_that_begin_alike_share_rows_and_say_whose(one_engine: Recorded) -> None:
    trace = one_engine.trace
    first = [request["id"] for request in one_engine.calls[FIRST]]
    for request in one_engine.calls[AGAIN]:
        cached = trace.requests[request["id"]].cached_tokens
        assert cached == (len(request["prompt"]) - 1) // BLOCK * BLOCK
        sequence = trace.sequence(request["id"])
        assert (sequence.state[:cached] == 2).all() and (sequence.state[cached:] == 3).all()
        assert set(sequence.sources[:cached]) <= set(first)
        assert trace.request(request["id"]).positions.min() == cached
        apart = trace.sequence(request["id"], resolve_cached=False)
        assert (apart.state[:cached] == 1).all() and (apart.ids[:cached] == 255).all()
    # Requests of the first call shared too, as soon as one of them had computed the story.
    assert any(trace.requests[name].cached_tokens for name in first[1:])
    assert not trace.requests[first[0]].cached_tokens


def test_resolved_rows_are_those_of_a_run_that_executes_them(one_engine: Recorded) -> None:
    for cached, executed in zip(one_engine.calls[AGAIN], one_engine.calls[WITHOUT_CACHE], strict=True):
        assert cached["generated"] == executed["generated"]
        assert not one_engine.trace.requests[executed["id"]].cached
        resolved, run_again = (one_engine.trace.sequence(request["id"]) for request in (cached, executed))
        assert len(resolved) == len(run_again) and (run_again.state == 3).all()
        assert np.array_equal(np.sort(resolved.ids, axis=-1), np.sort(run_again.ids, axis=-1))


def test_samples_of_a_request_are_requests_of_their_own(one_engine: Recorded) -> None:
    names = [request["id"] for request in one_engine.calls[SAMPLES]]
    assert len(names) == 6 and [name.partition("_")[0] for name in names] == ["0", "1", "2"] * 2
    generated = {tuple(request["generated"]) for request in one_engine.calls[SAMPLES]}
    assert len(generated) > 2  # so that a sample with another's rows would show


def test_aborted_requests_keep_the_rows_they_had(one_engine: Recorded, transformers: Transformers) -> None:
    going_on, *aborted = one_engine.calls[ABORTED]
    assert going_on["finished"] == "length" and len(going_on["generated"]) == 40
    check_rows(one_engine, [going_on])
    check_routing(one_engine, [going_on], transformers)
    for request in aborted:
        assert 0 < len(request["generated"]) < 40
        check_rows(one_engine, [request])
        check_routing(one_engine, [request], transformers)


def test_chunks_and_batches_were_mixed(one_engine: Recorded) -> None:
    trace = one_engine.trace
    steps, names, phases = trace.step_numbers, trace.request_ids, np.concatenate([b.phases for b in trace.batches()])
    together = [len(set(names[steps == step])) for step in np.unique(steps)]
    mixed = [set(phases[steps == step]) for step in np.unique(steps)]
    assert max(together) == 4 and {1, 2} in mixed
    first = trace.request(one_engine.calls[FIRST][0]["id"]).prefill()
    assert len(set(first.step_numbers.tolist())) > 1


def test_preempted_requests_are_recorded_again_and_marked(
    engine: Engine, checkpoint: Path, tmp_path: Path, transformers: Transformers
) -> None:
    # Room for 12 blocks of 32 tokens, where four requests need 20 or so.
    calls = {"prompts": PROMPTS, "max_tokens": 40}
    recorded = run(
        engine, checkpoint, tmp_path / "trace", calls, num_gpu_blocks_override=13, enable_prefix_caching=False
    )
    trace = recorded.trace
    assert trace.complete
    assert check_rows(recorded, recorded.requests) > 0
    check_routing(recorded, recorded.requests, transformers)
    executed = sum(len(recorded.executed(request)) for request in recorded.requests)
    assert trace.rows > executed == trace.current().rows
    # Those from before are still there, and marked.
    assert ((trace.flags & SUPERSEDED) != 0).sum() == ((trace.flags & RECOMPUTED) != 0).sum() == trace.rows - executed


def test_preempted_requests_find_their_own_blocks_in_the_prefix_cache(
    engine: Engine, checkpoint: Path, tmp_path: Path, transformers: Transformers
) -> None:
    calls = {"prompts": PROMPTS, "max_tokens": 40}
    recorded = run(engine, checkpoint, tmp_path / "trace", calls, num_gpu_blocks_override=11)
    assert recorded.trace.complete
    assert check_rows(recorded, recorded.requests) > 0
    check_routing(recorded, recorded.requests, transformers)


def test_speculative_decoding_marks_drafts_and_their_fates(
    engine: Engine, checkpoint: Path, tmp_path: Path, transformers: Transformers
) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    calls = {"prompts": PROMPTS, "max_tokens": 24}
    recorded = run(engine, checkpoint, tmp_path / "trace", calls, speculative_config=ngram)
    trace = recorded.trace
    assert trace.complete
    repeated = check_rows(recorded, recorded.requests)
    check_routing(recorded, recorded.requests, transformers)
    drafts, rejected = check_fates(recorded)
    assert drafts > rejected >= repeated > 0


def test_the_newer_runner_and_vllms_own_routed_experts(
    engine: Engine, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton", reason="vLLM's newer model runner needs Triton")
    shim = str(Path(__file__).with_name("triton_on_cpu"))
    environment = {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join([shim, os.environ.get("PYTHONPATH", "")]),
    }
    calls = [{"prompts": PROMPTS, "max_tokens": 12}] * 2
    recorded = run(
        engine,
        checkpoint,
        tmp_path / "trace",
        *calls,
        environment=environment,
        enable_return_routed_experts=True,
    )
    assert recorded.answer["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert recorded.trace.complete
    assert check_rows(recorded, recorded.requests) == 0
    tokens = cached = 0
    for request in recorded.requests:
        theirs = np.asarray(request["routed"])
        assert theirs.shape == (len(recorded.executed(request)), LAYERS, TOP_K)
        sequence = recorded.trace.sequence(request["id"])
        assert len(sequence) == len(theirs) and sequence.complete
        assert np.array_equal(np.sort(sequence.ids.astype(np.int64), axis=-1), np.sort(theirs, axis=-1))
        tokens, cached = tokens + len(theirs), cached + int((sequence.state == 2).sum())
    with capsys.disabled():
        print(f"\n  {tokens} tokens ({cached} of them prefix hits) as vLLM returns them, 0 mismatches", end="")
    assert tokens > 1000 and cached > 200


def test_asynchronous_scheduling(engine: Engine, checkpoint: Path, tmp_path: Path, transformers: Transformers) -> None:
    calls = [{"prompts": PROMPTS, "max_tokens": 12}] * 2
    recorded = run(engine, checkpoint, tmp_path / "trace", *calls, async_scheduling=True)
    assert recorded.trace.complete
    check_rows(recorded, recorded.requests)
    check_routing(recorded, recorded.requests, transformers)


def test_pooling(engine: Engine, checkpoint: Path, tmp_path: Path, transformers: Transformers) -> None:
    calls = {"prompts": PROMPTS, "embed": True}
    recorded = run(engine, checkpoint, tmp_path / "trace", calls, runner="pooling", convert="embed")
    trace = recorded.trace
    assert trace.complete and not trace.decode().rows
    for request in recorded.requests:
        rows, cached = trace.request(request["id"]), trace.requests[request["id"]].cached_tokens
        assert rows.positions.tolist() == list(range(cached, len(request["prompt"])))
        assert rows.tokens.tolist() == request["prompt"][cached:]
        transformers.check_ids(request["prompt"], trace.sequence(request["id"]).ids, request["id"])
