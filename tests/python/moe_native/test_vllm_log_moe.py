"""`VLLM_LOG_MOE` with real engines, in programs that know nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine
from recorded import MAX_TOKENS, PROMPTS, TOP_K

import moe_trace
from moe_trace.exchange import jsonl

pytestmark = pytest.mark.vllm


def job(checkpoint: Path, **more: Any) -> dict[str, Any]:
    engine = {
        "model": str(checkpoint), "dtype": "float32", "seed": 1234, "max_model_len": 256, "max_num_seqs": 8,
        "enable_prefix_caching": False, "enforce_eager": True, "async_scheduling": False,
    }  # fmt: skip
    return {"engine": engine, "prompts": PROMPTS, "max_tokens": MAX_TOKENS, **more}


Key = tuple[str, int, int]  # request, position, layer


def routes(file: Path) -> dict[Key, tuple[list[int], list[float]]]:
    meta, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert meta["type"] == "meta" and meta["top_k"] == TOP_K
    found = {
        (line["req_id"], line["token_idx"], line["layer"]): (line["topk_ids"], line["topk_weights"]) for line in lines
    }
    assert len(found) == len(lines)  # no token twice
    return found


def executed(answer: dict[str, Any], layers: list[int]) -> set[Key]:
    """What vLLM says that it executed: all tokens but the last one generated of each request."""
    lengths = {name: len(of["prompt"]) + len(of["generated"]) - 1 for name, of in answer["requests"].items()}
    return {(name, at, layer) for name, length in lengths.items() for at in range(length) for layer in layers}


@pytest.fixture(scope="module")
def whole(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    file = tmp_path_factory.mktemp("whole") / "routes.jsonl"
    answer = engine(
        job(checkpoint),
        "log_moe_program.py",
        VLLM_LOG_MOE=str(file),
        VLLM_LOG_MOE_LAYERS="0,2",
        VLLM_NUM_MOE_LAYERS="4",
    )
    return answer, file


def test_each_executed_token_has_its_lines_and_nothing_else_is_left(whole: tuple[dict[str, Any], Path]) -> None:
    answer, file = whole
    assert set(routes(file)) == executed(answer, [0, 2])  # so nothing of profiling and warm-up
    assert list(file.parent.iterdir()) == [file]
    assert f"moe_native: {file} has " in answer["log"]


def test_in_one_process_beside_a_trace_the_file_is_what_the_trace_has(
    engine: Engine, checkpoint: Path, tmp_path: Path, whole: tuple[dict[str, Any], Path]
) -> None:
    file, path = tmp_path / "routes.jsonl", tmp_path / "trace"
    answer = engine(
        job(checkpoint), "log_moe_program.py",
        VLLM_LOG_MOE=str(file), VLLM_LOG_LAYER="2", MOE_NATIVE_TRACE=str(path), MOE_NATIVE_WEIGHTS_DTYPE="exact",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )  # fmt: skip
    trace = moe_trace.open(path)
    assert trace.complete and trace.layers == (0, 1, 2, 3)
    assert file.read_text() == "".join(text for text, _ in jsonl.jsonl(trace, trace.layer([2]), []))
    assert set(routes(file)) == executed(answer, [2])
    assert answer["requests"] == whole[0]["requests"]
    other = routes(whole[1])
    assert {key: of for key, of in other.items() if key[2] == 2} == routes(file)


def test_an_engine_core_that_is_killed(
    engine: Engine, checkpoint: Path, tmp_path: Path, whole: tuple[dict[str, Any], Path]
) -> None:
    file = tmp_path / "routes.jsonl"
    answer = engine(job(checkpoint, kill_after=6), "log_moe_program.py", VLLM_LOG_MOE=str(file), VLLM_LOG_MOE_LAYER="2")
    assert answer["steps"] == 6
    found = routes(file)
    # All whose token reached the program was executed before the kill; the core may have been a step or two ahead.
    assert executed(answer, [2]) <= set(found) <= executed(whole[0], [2])
    assert all(routes(whole[1])[key] == of for key, of in found.items())
