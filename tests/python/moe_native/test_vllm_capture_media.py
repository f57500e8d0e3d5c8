"""Captures of images, given in every form, in two models that look at them in different ways: tiny Qwen3-VL-MoE, and
Llava with an MoE text model. Each row is judged by transformers' model, shown the same pictures."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import llava
import numpy as np
import numpy.typing as npt
import pytest
import torch
import vision
from conftest import Engine
from test_vllm_capture import ENGINE, Done, run
from test_vllm_media import Seeing, torchvision

pytestmark = pytest.mark.vllm

PICTURE, OTHER, THIRD = (1, 96, 64), (2, 64, 64), (3, 80, 80)
MAX_TOKENS = 4
MODELS = ("qwen", "llava")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A directory with a picture, and a web server that shows it."""
    directory = tmp_path_factory.mktemp("pictures")
    vision.picture(*PICTURE).save(directory / "picture.png")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=directory)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield directory, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def prompts_of(image: str, pictures: tuple[Path, str]) -> list[dict[str, Any]]:
    """The same picture in each form, two in a list, and prompts of other lengths between them."""
    directory, server = pictures
    one = [
        ["pil", *PICTURE],
        ["array", *PICTURE],
        str(directory / "picture.png"),
        f"{server}/picture.png",
        ["data", *PICTURE],
    ]
    prompts = [
        {"text": "How many" + " eggs" * number + f" {image} are here?", "images": [form], "shown": [PICTURE]}
        for number, form in enumerate(one)
    ]
    two = {"text": f"{image} or {image}?", "images": [["pil", *OTHER], ["pil", *THIRD]], "shown": [OTHER, THIRD]}
    return [*prompts, two]


@pytest.fixture(scope="module")
def seen(
    engine: Engine, pictures: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Any]]]:
    """By model: its checkpoint, and what the steps gave: samples with pictures and text in one batch, transformers'
    inputs, what scripts call, and two errors."""
    checkpoints = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    vision.make(checkpoints["qwen"])
    llava.make(checkpoints["llava"])
    steps: list[Any] = [["import", "moe_native.hidden_states"]]
    for name, image in (("qwen", vision.IMAGE), ("llava", llava.IMAGE)):
        prompts = prompts_of(image, pictures)
        missing = {"text": image, "images": [str(pictures[0] / "none.png")]}
        dead = {"text": image, "images": [f"{pictures[1]}/none.png"]}
        build = {
            **ENGINE,
            "model": str(checkpoints[name]),
            "block_size": 32,
            "max_num_batched_tokens": 64,
            "limit_mm_per_prompt": {"image": 2},
            "distributed_executor_backend": "uni",
        }
        steps += [
            ["build", build],
            ["capture", {"prompts": [*prompts, "Only text"], "sampling": {"max_tokens": MAX_TOKENS}}],
            ["inputs", prompts],
            ["hs", {"prompts": prompts[:2], "split_by_samples": True}],
            ["capture", {"prompts": [missing]}],
            ["capture", {"prompts": [dead]}],
        ]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": os.pathsep.join(torchvision())}
    done: Done = run(engine, steps, **environment)[1:]
    return {name: (checkpoints[name], done[6 * at + 1 : 6 * at + 6]) for at, name in enumerate(MODELS)}


class ThroughGates(Seeing):
    """Llava's output has no router logits: here they are computed where the gates are called."""

    def logits(self, tokens: list[int], **inputs: Any) -> npt.NDArray[np.float32]:
        seen: list[torch.Tensor] = []
        gates = [layer.mlp.gate for layer in self._model.model.language_model.layers]
        hooks = [
            gate.register_forward_pre_hook(lambda gate, args: seen.append(args[0].flatten(0, -2) @ gate.weight.T))
            for gate in gates
        ]
        with torch.no_grad():
            self._model(torch.tensor([tokens]), **inputs)
        for hook in hooks:
            hook.remove()
        return torch.stack(seen, dim=1).numpy()


@pytest.mark.parametrize("model", MODELS)
def test_each_row_is_that_of_transformers(seen: dict[str, tuple[Path, list[Any]]], model: str) -> None:
    checkpoint, (samples, inputs, *_) = seen[model]
    judge = (ThroughGates if model == "llava" else Seeing)(checkpoint)
    assert len(samples) == len(inputs) + 1
    for sample, given in zip(samples, [*inputs, {}], strict=True):
        tokens = sample["tokens"]
        assert len(tokens) == sample["prompt_len"] + MAX_TOKENS - 1
        beside = {name: value for name, value in given.items() if name.startswith(("pixel", "image"))}
        if given:
            assert tokens[: sample["prompt_len"]] == given["input_ids"][0].tolist()
        if "mm_token_type_ids" in given:
            kinds = given["mm_token_type_ids"]
            generated = torch.zeros(1, len(tokens) - kinds.shape[1], dtype=kinds.dtype)
            beside["mm_token_type_ids"] = torch.cat([kinds, generated], dim=1)
        expected = judge.logits(tokens, **beside)
        for layer in range(expected.shape[1]):
            logits, ids = sample["logits"][layer], sample["ids"][layer]
            np.testing.assert_allclose(logits.numpy(), expected[:, layer], atol=2e-3)
            assert torch.equal(logits.topk(ids.shape[1]).indices.sort().values, ids.long().sort().values)


@pytest.mark.parametrize(("model", "image"), [("qwen", "<|image_pad|>"), ("llava", llava.IMAGE)])
def test_rows_of_images_are_marked(seen: dict[str, tuple[Path, list[Any]]], model: str, image: str) -> None:
    from transformers import AutoTokenizer

    checkpoint, (samples, *_) = seen[model]
    token = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(image)
    for sample in samples:
        kinds = ["image" if each == token else "text" for each in sample["tokens"][: sample["prompt_len"]]]
        assert sample["modality"] == kinds + ["text"] * (MAX_TOKENS - 1)
    assert "image" not in samples[-1]["modality"] and samples[0]["modality"].count("image") > 4


@pytest.mark.parametrize("model", MODELS)
def test_the_form_of_a_picture_changes_nothing(seen: dict[str, tuple[Path, list[Any]]], model: str) -> None:
    _, (samples, _, scripts, *_) = seen[model]
    rows = []
    for sample in samples[:5]:
        where = torch.from_numpy(np.array(sample["modality"]) == "image")
        rows.append(sample["logits"][0][where])
    for other in rows[1:]:
        # The words before it differ; the pictures do not.
        assert other.shape == rows[0].shape
    for split, sample in zip(scripts["logits"], samples, strict=False):
        prompt = sample["logits"][0][: sample["prompt_len"]]
        torch.testing.assert_close(split[0], prompt, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_pictures_that_are_not_there(
    seen: dict[str, tuple[Path, list[Any]]], pictures: tuple[Path, str], model: str
) -> None:
    _, (*_, missing, dead) = seen[model]
    assert missing["error"][0] == "FileNotFoundError" and str(pictures[0] / "none.png") in missing["error"][1]
    assert dead["error"][0] == "ValueError" and f"{pictures[1]}/none.png" in dead["error"][1]
