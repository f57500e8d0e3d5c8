"""Recording changes no token and kills no engine, whatever happens to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Engine
from recorded import ALL_FIELDS, Recorded, check_rows, job

import moe_trace

pytestmark = pytest.mark.vllm

STORY = "There are many hens on the farm, and each of them lays an egg a day. " * 5
PROMPTS = [f"{STORY}Maria has {n} hens and buys {3 * n} more." + " How many eggs?" * n for n in range(6)]
ASKED: dict[str, Any] = {"prompts": PROMPTS, "max_tokens": 16}
SAMPLED: dict[str, Any] = {
    "prompts": PROMPTS[:3],
    "max_tokens": 16,
    "n": 2,
    "temperature": 0.8,
}  # by the engine's own seed
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
MODES: dict[str, dict[str, Any]] = {
    "prefix caching": {"enable_prefix_caching": True},
    "preemption": {"num_gpu_blocks_override": 11},
    "drafts": {"speculative_config": NGRAM},
}
STEPS = "moe_native.vllm.steps:Steps"
FAULTS = (
    [["disk"]]
    + [[f"{STEPS}.{name}"] for name in ("begin", "end", "_follow_blocks", "sampled")]
    + [
        ["moe_native.vllm.steps:_HostArray.of"],
        [f"{STEPS}.end", f"{STEPS}.abort"],
        ["moe_native.recorder:Recorder.begin_step"],
        ["moe_native.recorder:Recorder.end_step"],
        ["moe_native.recorder:Recorder.request"],
    ]
)


def ask(engine: Engine, checkpoint: Path, *calls: dict[str, Any], faults: Any = (), **arguments: Any) -> dict[str, Any]:
    """What an engine in one process answers, eager, with long prompts in chunks."""
    work = job(
        checkpoint,
        *calls,
        **{
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "block_size": 32,
            "max_num_batched_tokens": 48,
            **arguments,
        },
    )
    work |= {"inspect": False, "faults": list(faults)}
    return engine(work, VLLM_ENABLE_V1_MULTIPROCESSING="0")


def tokens(answer: dict[str, Any]) -> list[list[list[int]]]:
    return [[request["generated"] for request in call] for call in answer["calls"]]


@pytest.fixture(scope="module")
def off(engine: Engine, checkpoint: Path) -> list[list[list[int]]]:
    return tokens(ask(engine, checkpoint, ASKED, SAMPLED, ASKED, **MODES["prefix caching"]))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_an_engine_without_recording(
    mode: str, engine: Engine, checkpoint: Path, tmp_path: Path, off: list[list[list[int]]]
) -> None:
    # With drafts, what vLLM samples at a temperature differs from process to process, without us too.
    calls = [ASKED, ASKED] if mode == "drafts" else [ASKED, SAMPLED, ASKED]
    without = off if mode == "prefix caching" else tokens(ask(engine, checkpoint, *calls, **MODES[mode]))
    settings = {"moe_native": {"trace": str(tmp_path), "fields": ALL_FIELDS}}
    answer = ask(engine, checkpoint, *calls, additional_config=settings, **MODES[mode])
    assert tokens(answer) == without
    trace = moe_trace.open(tmp_path)
    assert trace.complete and trace.rows > 500


@pytest.fixture(scope="module")
def faulty(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A good call, one with each fault, and a good one again. Blocks are written soon, so that a dead disk shows."""
    path = tmp_path_factory.mktemp("faulty") / "trace"
    settings = {"moe_native": {"trace": str(path), "fields": "ids,tokens", "flush_seconds": 0.05}}
    calls = [ASKED, *({**ASKED, "faults": fault} for fault in FAULTS), ASKED]
    return Recorded(path, ask(engine, checkpoint, *calls, additional_config=settings, **MODES["prefix caching"]))


def test_faults_of_ours_change_no_token(faulty: Recorded, off: list[list[list[int]]]) -> None:
    assert len(faulty.calls) == len(FAULTS) + 2
    for call, fault in zip(tokens(faulty.answer), [[], *FAULTS, []], strict=True):
        assert call == off[0], fault


def test_a_fault_costs_its_own_steps_only_and_is_counted_and_said_once(faulty: Recorded) -> None:
    trace = faulty.trace
    assert not trace.complete and {"aborted", "io_error"} <= set(trace.losses)
    check_rows(faulty, faulty.calls[-1])
    errors = trace.metadata["errors"]
    assert {"opening a step", "closing a step", "reading the sampler's output"} <= set(errors)
    assert all(count > 1 for count in errors.values())
    said = [line for line in faulty.answer["log"].splitlines() if "(said once)" in line]
    assert len(said) == len(set(said)) == len(errors)


def test_sources_are_not_guessed_after_a_fault(faulty: Recorded) -> None:
    # From the first fault on it is not known any more what the KV blocks hold; and where the faults were, no rows are.
    for request in faulty.calls[-1]:
        sequence = faulty.trace.sequence(request["id"])
        cached = faulty.trace.requests[request["id"]].cached_tokens
        assert cached > 0 and (sequence.state[:cached] == 1).all(), sequence


@pytest.mark.parametrize(
    "faults",
    [
        ["moe_native.vllm.routers:find"],
        ["moe_native.vllm.metadata:describe"],
        ["moe_native.vllm.prefix:followed", "moe_native.vllm.worker:WorkerRecording._close"],
    ],
)
def test_faults_at_start_and_end(
    faults: list[str], engine: Engine, checkpoint: Path, tmp_path: Path, off: list[list[list[int]]]
) -> None:
    settings = {"moe_native": {"trace": str(tmp_path / "trace")}}
    answer = ask(engine, checkpoint, ASKED, faults=faults, additional_config=settings, **MODES["prefix caching"])
    assert tokens(answer) == off[:1]
    assert "a fault that the test has put in (said once)" in answer["log"]


def test_a_ring_that_is_too_small_loses_rows_and_no_token(
    engine: Engine, checkpoint: Path, tmp_path: Path, off: list[list[list[int]]]
) -> None:
    settings = {"moe_native": {"trace": str(tmp_path), "fields": ALL_FIELDS, "ring_bytes": 64 << 10}}
    call = {**ASKED, "faults": ["disk"]}
    answer = ask(engine, checkpoint, call, additional_config=settings, **MODES["prefix caching"])
    assert tokens(answer) == off[:1]
    trace = moe_trace.open(tmp_path)
    assert not trace.complete and trace.losses
