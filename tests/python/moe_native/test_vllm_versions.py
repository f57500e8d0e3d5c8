"""With whatever vLLM is installed: what is recorded is right, what is not is missed with its reason, and no token
changes. `make test-vllm VLLM=0.28.0` runs this with another version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Engine

import moe_trace

pytestmark = pytest.mark.vllm

LAYERS, TOP_K = 4, 4
PROMPTS = [f"Maria has {n} hens and buys {3 * n} more." for n in range(5)]
NEAR_TIE = 1e-5  # two float32 implementations may order logits closer than this differently


def generated(engine: Engine, checkpoint: Path, **environment: str) -> dict[str, Any]:
    """Eager, in one process, prompts in chunks."""
    arguments = {
        "model": str(checkpoint),
        "dtype": "float32",
        "seed": 1234,
        "max_model_len": 256,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 16,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }
    job = {"engine": arguments, "prompts": PROMPTS, "max_tokens": 12}
    return engine(job, VLLM_ENABLE_V1_MULTIPROCESSING="0", **environment)


def test_every_layer_is_recorded_rightly_or_missed_with_a_reason(
    engine: Engine, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    answer = generated(engine, checkpoint, MOE_NATIVE_TRACE=str(tmp_path / "trace"))
    off = generated(engine, checkpoint)
    assert [request["generated"] for request in answer["requests"]] == [r["generated"] for r in off["requests"]]

    trace = moe_trace.open(tmp_path / "trace")
    assert not trace.problems and not trace.losses
    assert [layer.layer for layer in trace.coverage] == list(range(LAYERS))
    missed = [layer for layer in trace.coverage if layer.status == "missed"]
    recorded = [layer.layer for layer in trace.coverage if layer.status != "missed"]
    assert all(layer.detail for layer in missed) and trace.complete == (not missed)
    assert answer["log"].count("MoE layers are not recorded") == bool(missed)

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    checked = near_ties = 0
    for request in answer["requests"] if recorded else ():
        tokens = [*request["prompt"], *request["generated"][:-1]]
        rows = trace.request(request["id"]).layer(recorded)
        order = np.argsort(rows.positions)
        assert rows.positions[order].tolist() == list(range(len(tokens)))
        assert rows.prefill().rows == len(request["prompt"])
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
        ranked, expected = torch.stack(logits, dim=1)[:, recorded].sort(dim=-1, descending=True)
        ids = np.sort(rows.ids[order].astype(np.int64), axis=-1)
        different = (ids != np.sort(expected[..., :TOP_K].numpy(), axis=-1)).any(axis=-1)
        assert ((ranked[..., TOP_K - 1] - ranked[..., TOP_K]).numpy()[different] < NEAR_TIE).all()
        checked, near_ties = checked + different.size, near_ties + int(different.sum())
    assert trace.rows == checked // max(len(recorded), 1) and near_ties <= checked / 100
    with capsys.disabled():
        why = f": {missed[0].detail}" if missed else ""
        print(f"\n  vLLM {trace.metadata['versions']['vllm']}: {checked} rows x layers as in transformers, ", end="")
        print(f"{near_ties} near-ties, {len(missed)} of {LAYERS} layers missed{why}", end="")
