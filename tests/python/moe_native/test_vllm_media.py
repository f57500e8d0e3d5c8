"""Images and films in vLLM, with a small model of Qwen3-VL-MoE's geometry: which rows are which modality, judged by the
prompt as vLLM and transformers' processor expand it, and their experts, judged by transformers' model."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vision
from conftest import Engine
from recorded import Recorded, Transformers, check_rows
from vision import FILM, IMAGE

from moe_trace.cli import main

pytestmark = pytest.mark.vllm

BLOCK, MAX_TOKENS = 32, 6
FLOWERS, HENS, STAMP = (1, 256, 160), (3, 256, 160), (2, 96, 64)  # 40, 40 and 6 tokens
PROMPTS: list[dict[str, Any]] = [
    {"text": f"Maria has {IMAGE} hens and {IMAGE} eggs. How many?", "images": [FLOWERS, FLOWERS]},
    {"text": "There are thirty seats in a bus. " * 3},
    {"text": f"Question: {FILM} what is the sum?", "videos": [(5, 6, 96, 64)]},
    {"text": f"{IMAGE}", "images": [STAMP]},
    {"text": f"Each box {IMAGE} holds {FILM} six", "images": [HENS], "videos": [(9, 4, 64, 64)]},
]
# Alike up to the second image.
OTHER = {"text": PROMPTS[0]["text"], "images": [FLOWERS, HENS]}
FIRST, AGAIN, OTHERS = range(3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vision")
    vision.make(directory)
    return directory


@pytest.fixture(scope="module")
def recorded(engine: Engine, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """One engine in one process, eager, with long prompts in chunks and requests in batches, prefix caching on."""
    path = tmp_path_factory.mktemp("media") / "trace"
    job = {
        "engine": {
            "model": str(checkpoint),
            "dtype": "float32",
            "seed": 1234,
            "max_model_len": 512,
            "max_num_seqs": 4,
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "block_size": BLOCK,
            "max_num_batched_tokens": 40,
            "enable_prefix_caching": True,
            "limit_mm_per_prompt": {"image": 2, "video": 1},
            "additional_config": {"moe_native": {"trace": str(path), "fields": "ids,tokens"}},
        },
        "calls": [{"prompts": prompts, "max_tokens": MAX_TOKENS} for prompts in (PROMPTS, PROMPTS, [OTHER])],
    }
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": os.pathsep.join(torchvision())}
    return Recorded(path, engine(job, "vision_engine.py", **environment))


def torchvision() -> list[str]:
    """Directories for PYTHONPATH, with which vLLM's vision models can be imported."""
    there = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if importlib.util.find_spec("torchvision"):
        return there
    beside = Path(sys.prefix) / "vision"
    if not (beside / "torchvision").is_dir():
        pytest.skip("vLLM's vision models need torchvision, which is not installed here; `make test` sets it up")
    return [str(Path(__file__).with_name("torchvision_on_cpu")), str(beside), *there]


@pytest.fixture(scope="module")
def ids(checkpoint: Path) -> dict[str, int]:
    """Token ids: of what stands where the model is given an embedding of that modality."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    return {"image": config.image_token_id, "video": config.video_token_id}


def processed(recorded: Recorded) -> list[dict[str, Any]]:
    """What transformers' processor makes of each prompt."""
    import torch

    places = [(number, place) for number, call in enumerate(recorded.calls) for place in range(len(call))]
    return [torch.load(f"{recorded.answer['inputs']}.{number}.{place}.pt") for number, place in places]


def where(tokens: list[int], token: int) -> list[int]:
    return np.flatnonzero(np.asarray(tokens) == token).tolist()


def test_each_row_has_the_modality_of_its_position(recorded: Recorded, ids: dict[str, int]) -> None:
    trace = recorded.trace
    assert trace.complete
    expected = {"image": 0, "video": 0, "text": 0}
    for request, inputs in zip(recorded.requests, processed(recorded), strict=True):
        prompt = request["prompt"]
        assert prompt == inputs["input_ids"][0].tolist()
        executed = range(trace.requests[request["id"]].cached_tokens, len(recorded.executed(request)))
        places = {modality: where(prompt, token) for modality, token in ids.items()}
        places["text"] = sorted({*executed} - {*places["image"], *places["video"]})
        rows = trace.request(request["id"])
        for modality, positions in places.items():
            positions = [position for position in positions if position in executed]
            selected = rows.modality(modality)
            assert selected.positions.tolist() == positions, (request["id"], modality)
            assert selected.prefill().positions.tolist() == [p for p in positions if p < len(prompt)]
            assert selected.decode().positions.tolist() == [p for p in positions if p >= len(prompt)]
            expected[modality] += len(positions)
        assert not rows.modality("audio", "unknown").rows
    assert {modality: trace.modality(modality).rows for modality in expected} == expected
    assert expected["image"] > 150 and expected["video"] > 20


def test_the_request_table_has_the_placeholders(recorded: Recorded, ids: dict[str, int]) -> None:
    for request in recorded.requests:
        media = recorded.trace.requests[request["id"]].info.get("media", [])
        spans = {modality: [(first, count) for first, count, of in media if of == modality] for modality in ids}
        for modality, token in ids.items():
            covered = [first + n for first, count in spans[modality] for n in range(count)]
            assert covered == where(request["prompt"], token)
    # Between the images of a film stands when they are seen, which is text.
    film = recorded.trace.requests[recorded.calls[FIRST][2]["id"]].info["media"]
    assert [of for _, _, of in film] == ["video"] * 3


def test_the_summary_adds_up(recorded: Recorded, ids: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    counted: dict[tuple[str, str], int] = {}
    modalities = {token: name for name, token in ids.items()}
    for request in recorded.requests:
        cached = recorded.trace.requests[request["id"]].cached_tokens
        for position, token in enumerate(recorded.executed(request)[cached:], cached):
            prompt = position < len(request["prompt"])
            key = ("prefill" if prompt else "decode", modalities.get(token, "text") if prompt else "text")
            counted[key] = counted.get(key, 0) + 1
    assert main(["summary", str(recorded.path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {(kind["phase"], kind["modality"]): kind["rows"] for kind in summary["kinds"]} == counted
    assert sum(counted.values()) == summary["executed_rows"]
    assert main(["summary", str(recorded.path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens "))
    assert set(line.removeprefix("tokens").strip().split(", ")) == {
        f"{phase} {modality} {rows:,}" for (phase, modality), rows in counted.items()
    }


def test_tokens_and_experts_are_those_of_transformers(
    recorded: Recorded, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_rows(recorded, recorded.requests) == 0
    judge = Seeing(checkpoint)
    compared = near_ties = 0
    for request, inputs in zip(recorded.requests, processed(recorded), strict=True):
        tokens = recorded.executed(request)
        sequence = recorded.trace.sequence(request["id"])
        assert (sequence.state[: len(tokens)] >= 2).all()
        size, ties = judge.check_ids(tokens, sequence.ids[: len(tokens)], request["id"], **beside(inputs, len(tokens)))
        compared, near_ties = compared + size, near_ties + ties
    with capsys.disabled():
        print(f"\n  {compared} rows x layers as in transformers, {near_ties} of them near-ties", end="")
    assert compared > 2000 and near_ties <= compared / 100


class Seeing(Transformers):
    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForImageTextToText

        self._model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


def beside(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The model's inputs but the tokens, for the prompt and what was generated."""
    import torch

    kinds = inputs["mm_token_type_ids"]
    generated = torch.zeros(1, tokens - kinds.shape[1], dtype=kinds.dtype)
    pixels = {name: inputs[name] for name in inputs if name.startswith(("pixel", "image", "video"))}
    return {"mm_token_type_ids": torch.cat([kinds, generated], dim=1), **pixels}


def test_chunks_cut_images_and_batches_mix_modalities(recorded: Recorded) -> None:
    trace = recorded.trace
    first = trace.request(recorded.calls[FIRST][0]["id"]).modality("image")
    steps = dict(zip(first.positions.tolist(), first.step_numbers.tolist(), strict=True))
    media = trace.requests[recorded.calls[FIRST][0]["id"]].info["media"]
    assert any(len({steps[start + n] for n in range(count)}) > 1 for start, count, _ in media)
    modalities = np.concatenate([batch.modalities for batch in trace.batches()])
    together = [set(modalities[trace.step_numbers == step]) for step in np.unique(trace.step_numbers)]
    assert {1, 2} in together and any({1, 3} <= seen for seen in together)


def test_a_prefix_that_was_cached_may_end_within_an_image(recorded: Recorded, ids: dict[str, int]) -> None:
    trace = recorded.trace
    for request in recorded.calls[AGAIN]:
        cached = trace.requests[request["id"]].cached_tokens
        assert cached == (len(request["prompt"]) - 1) // BLOCK * BLOCK
    (other,) = recorded.calls[OTHERS]
    cached = trace.requests[other["id"]].cached_tokens
    images = where(other["prompt"], ids["image"])
    assert cached == BLOCK and cached - 1 in images and cached in images
    assert trace.request(other["id"]).modality("image").positions.tolist() == [p for p in images if p >= cached]
    # Tokens alike, images not: the second picture's rows are its own.
    assert other["prompt"] == recorded.calls[FIRST][0]["prompt"]
    second, before = (trace.sequence(r["id"]).ids[images[40:]] for r in (other, recorded.calls[FIRST][0]))
    assert len(second) == 40 and (second != before).any()
