"""Speculative decoding by a model of its own, whose MoE layers are not the model's: none of its rows is recorded, and
those of the model are what they are without it, drafts and their fates marked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_moe
from architectures import DEEPSEEK, ONE_GROUP, SIZES
from conftest import Engine
from recorded import (
    LAYERS,
    MAX_TOKENS,
    PROMPTS,
    REJECTED,
    UNDECIDED,
    Recorded,
    Transformers,
    check_fates,
    check_routing,
    check_rows,
    job,
)

pytestmark = pytest.mark.vllm

MTP = {"method": "mtp", "num_speculative_tokens": 1}
GLM = "Glm4MoeMTP has 1 MoE layer of its own, which is"


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model once more, which predicts a little differently."""
    import torch

    directory = tmp_path_factory.mktemp("draft")
    tokenizer = tiny_moe.make_tokenizer()
    model = tiny_moe.make_model(tokenizer, layers=LAYERS)
    with torch.no_grad():
        head = model.lm_head.weight
        head += 0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(7))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def with_a_layer_that_predicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4-MoE with three layers, two of them MoE, and a fourth that drafts: what the embedding alone suggests."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    directory = tmp_path_factory.mktemp("glm")
    tokenizer = tiny_moe.make_tokenizer()
    sizes = {**SIZES, **DEEPSEEK, **ONE_GROUP, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**{**sizes, "num_hidden_layers": 4})).float().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 20  # so that this is often what the model says, too
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    weights, hidden = load_file(directory / "model.safetensors"), sizes["hidden_size"]
    own = {
        "enorm.weight": torch.ones(hidden),
        "hnorm.weight": torch.ones(hidden),
        "eh_proj.weight": torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1),
        "shared_head.norm.weight": torch.ones(hidden),
        "shared_head.head.weight": weights["lm_head.weight"].clone(),
        "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    weights |= {f"model.layers.3.{name}": weight for name, weight in own.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}))
    return directory


def run(engine: Engine, checkpoint: Path, path: Path, environment: Any = (), **arguments: Any) -> Recorded:
    """An engine in one process, eager, with prompts in chunks and requests in batches."""
    calls = {"prompts": PROMPTS, "max_tokens": 2 * MAX_TOKENS}
    arguments = {
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "max_num_batched_tokens": 48,
        "additional_config": {"moe_native": {"trace": str(path), "fields": "ids,tokens"}},
        **arguments,
    }
    work = {**job(checkpoint, calls, **arguments), "inspect": False}
    return Recorded(path, engine(work, VLLM_ENABLE_V1_MULTIPROCESSING="0", **dict(environment)))


def check(recorded: Recorded, checkpoint: Path, layers: tuple[int, ...], drafter: str) -> str:
    """All that shall hold; returns it in numbers."""
    trace = recorded.trace
    assert trace.complete and trace.layers == layers
    assert {entry.layer: entry.status for entry in trace.coverage} == dict.fromkeys(layers, "exact")
    assert trace.metadata["left_out"] == [f"the draft model {drafter} not recorded"]
    repeated = check_rows(recorded, recorded.requests)
    compared = check_routing(recorded, recorded.requests, Transformers(checkpoint))
    drafts, rejected = check_fates(recorded)
    assert drafts > rejected >= repeated > 0
    for request in recorded.requests:
        # The last token is executed too where it was drafted.
        rows, last = trace.request(request["id"]).current(), len(recorded.executed(request))
        assert rows.tokens[rows.positions == last].tolist() in ([], request["generated"][-1:])
    return f"{compared} rows x layers as in transformers; {drafts} drafts, {rejected} rejected"


def test_a_draft_model(
    engine: Engine, checkpoint: Path, draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    recorded = run(engine, checkpoint, tmp_path / "trace", speculative_config=speculative)
    drafter = f"Qwen2MoeForCausalLM has {LAYERS} MoE layers of its own, which are"
    said = check(recorded, checkpoint, tuple(range(LAYERS)), drafter)
    with capsys.disabled():
        print(f"\n  {said}", end="")


def test_layers_that_predict_further_tokens(
    engine: Engine, with_a_layer_that_predicts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = run(engine, with_a_layer_that_predicts, tmp_path / "trace", speculative_config=MTP)
    # It is layer 3 of the checkpoint, and none of the model's.
    said = check(recorded, with_a_layer_that_predicts, (1, 2), GLM)
    with capsys.disabled():
        print(f"\n  {said}", end="")


def test_the_newer_runner(engine: Engine, with_a_layer_that_predicts: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="vLLM's newer model runner needs Triton")
    path = [str(Path(__file__).with_name("triton_on_cpu")), os.environ.get("PYTHONPATH", "")]
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": os.pathsep.join(path)}
    recorded = run(engine, with_a_layer_that_predicts, tmp_path / "trace", environment, speculative_config=MTP)
    assert recorded.answer["runner"] == "vllm.v1.worker.cpu.model_runner"
    trace, judge = recorded.trace, Transformers(with_a_layer_that_predicts)
    assert trace.complete and trace.layers == (1, 2)
    assert trace.metadata["left_out"] == [f"the draft model {GLM} not recorded"]
    rejected = 0
    for request in recorded.requests:
        rows, executed = trace.request(request["id"]), recorded.executed(request)
        assert not (rows.flags & UNDECIDED).any()  # its sampler's output comes after the step, but it comes
        kept = np.flatnonzero((rows.flags & REJECTED == 0) & (rows.positions < len(executed)))
        assert rows.positions[kept].tolist() == list(range(len(executed)))
        assert rows.tokens[kept].tolist() == executed
        judge.check_ids(executed, rows.ids[kept], request["id"])
        rejected += int((rows.flags & REJECTED != 0).sum())
    assert rejected > 0
