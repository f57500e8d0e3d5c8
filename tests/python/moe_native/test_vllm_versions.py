"""With whatever vLLM is installed: what is recorded is right, what is not is missed with its reason, and no token
changes. `make test-vllm VLLM=0.28.0` runs this with another version."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Engine
from recorded import LAYERS, MAX_TOKENS, PROMPTS, Recorded, Transformers, check_routing, check_rows, job
from test_vllm_capture import ENGINE, check, run

pytestmark = pytest.mark.vllm


def test_the_layers_are_recorded_rightly_or_missed_with_a_reason(
    engine: Engine, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"max_num_batched_tokens": 16, "enforce_eager": True, "distributed_executor_backend": "uni"}
    work = {**job(checkpoint, **arguments), "inspect": False}
    in_one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    settings = {"MOE_NATIVE_TRACE": str(tmp_path / "trace"), "MOE_NATIVE_FIELDS": "ids,tokens"}
    off = engine(work, **in_one_process)
    recorded = Recorded(tmp_path / "trace", engine(work, **in_one_process, **settings))
    assert recorded.calls == off["calls"]

    trace, log = recorded.trace, recorded.answer["log"]
    assert not trace.problems and not trace.losses
    assert [layer.layer for layer in trace.coverage] == list(range(LAYERS))
    missed = [layer for layer in trace.coverage if layer.status == "missed"]
    assert len(missed) in (0, LAYERS) and all(layer.detail for layer in missed)
    assert trace.complete == (not missed) and log.count("MoE layers are neither recorded") == bool(missed)
    if missed:
        assert trace.rows == 0
        result = f"every layer is missed: {missed[0].detail}"
    else:
        assert check_rows(recorded, recorded.requests) == 0
        assert trace.rows == sum(len(recorded.executed(request)) for request in recorded.requests)
        compared = check_routing(recorded, recorded.requests, Transformers(checkpoint))
        result = f"{compared} rows x layers as in transformers"
    with capsys.disabled():
        print(f"\n  vLLM {trace.metadata['versions']['vllm']}: {result}", end="")


def test_prompts_are_captured_rightly_or_refused_with_the_reason(
    engine: Engine, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunked, batched, and with a prefix cache; armed by the environment."""
    build = {**ENGINE, "model": str(checkpoint), "max_num_batched_tokens": 48, "enable_prefix_caching": True}
    ask = {"prompts": PROMPTS, "sampling": {"max_tokens": MAX_TOKENS}}
    steps = [["build", build], ["generate", {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}], ["capture", ask]]
    _, before, samples = run(engine, steps, MOE_NATIVE_CAPTURE="1")
    if isinstance(samples, dict):
        kind, text = samples["error"]
        assert kind == "CaptureError" and "layer" in text
        result = f"refused: {text}"
    else:
        assert [sample["generated"] for sample in samples] == [request["generated"] for request in before]
        result = f"{check(samples, Transformers(checkpoint))} rows as in transformers"
    with capsys.disabled():
        print(f"\n  captured: {result}", end="")
