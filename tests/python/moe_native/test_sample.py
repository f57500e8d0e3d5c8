"""The rows of one sample: by position, phase and modality, as tensors that belong to whoever asked for them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_llm import LLM, SamplingParams, Worker, shut_down

import moe_native
from moe_native.captures.sample import ByLayer, Sample

PROMPT, GENERATED = 8, 4
ROWS = PROMPT + GENERATED - 1


def feature(kind: str, first: int, length: int) -> Any:
    return SimpleNamespace(modality=kind, mm_position=SimpleNamespace(offset=first, length=length))


PROMPTS: list[Any] = [
    {"prompt_token_ids": [*range(50, 58)], "features": [feature("image", 1, 2), feature("audio", 5, 1)]},
    "hello",
    {"prompt_embeds": torch.zeros(6, 3)},
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    yield LLM(Worker((2, 5), logits=torch.bfloat16))
    shut_down()


@pytest.fixture
def capture(llm: LLM) -> Iterator[moe_native.Capture]:
    yield moe_native.capture(llm, PROMPTS, SamplingParams(GENERATED, n=2), fields="logits,weights")


@pytest.fixture
def sample(capture: moe_native.Capture) -> Sample:
    return capture[0]


def rows(llm: LLM, field: str, layer: int, positions: Any, prompt: int = 0, child: int = 0) -> torch.Tensor:
    found = llm.workers[0].model.rows(field, layer, llm.names[prompt, child], positions)
    return found.to(torch.uint8) if field == "ids" else found


def is_of(part: Sample, llm: LLM, positions: list[int]) -> bool:
    """Everything that a part says of itself."""
    assert len(part) == len(positions) and part.positions.tolist() == positions
    assert part.positions.dtype == part.token_ids.dtype == torch.int64
    assert part.token_ids.tolist() == [[*range(50, 58), 0, 1, 2][position] for position in positions]
    for field in ("ids", "weights", "logits"):
        for layer in (2, 5):
            expected = rows(llm, field, layer, positions)
            found = getattr(part, field)[layer]
            assert found.dtype == expected.dtype and torch.equal(found, expected), (field, layer)
    return True


def test_all_rows(sample: Sample, llm: LLM) -> None:
    assert is_of(sample, llm, list(range(ROWS)))
    assert (sample.prompt_index, sample.completion_index, sample.prompt_len) == (0, 0, PROMPT)
    assert sample.layers == [2, 5]
    assert sample.completion is sample.request_output.outputs[0] and sample.completion.token_ids == [0, 1, 2, 3]


def test_phases(sample: Sample, llm: LLM) -> None:
    assert is_of(sample.prefill, llm, list(range(PROMPT)))
    assert is_of(sample.decode, llm, list(range(PROMPT, ROWS)))
    assert is_of(sample.decode.prefill, llm, []) and is_of(sample.prefill.decode, llm, [])
    assert is_of(sample.decode.decode, llm, list(range(PROMPT, ROWS)))
    middle = sample.tokens(6, 10)
    assert is_of(middle.prefill, llm, [6, 7]) and is_of(middle.decode, llm, [8, 9])


@pytest.mark.parametrize(
    ("first", "end", "positions"),
    [
        (2, 5, [2, 3, 4]),
        (0, 99, list(range(ROWS))),
        (-2, ROWS, [9, 10]),
        (0, -9, [0, 1]),
        (-3, -1, [8, 9]),
        (-99, 2, [0, 1]),
        (4, 4, []),
        (5, 3, []),
        (40, 50, []),
        (0, -99, []),
        (8, None, [8, 9, 10]),
        (-2, None, [9, 10]),
    ],
)
def test_tokens_of_a_range(sample: Sample, llm: LLM, first: int, end: int | None, positions: list[int]) -> None:
    assert is_of(sample.tokens(first, end), llm, positions)


def test_a_range_of_a_range_keeps_to_absolute_positions(sample: Sample, llm: LLM) -> None:
    part = sample.tokens(3, 9)
    assert is_of(part.tokens(0, 5), llm, [3, 4])
    assert is_of(part.tokens(5, 99), llm, [5, 6, 7, 8])
    assert is_of(part.tokens(-4, 99), llm, [7, 8])  # from the end of the sample
    assert is_of(part.tokens(0, 2), llm, [])
    assert is_of(part.tokens(10, 11).tokens(0, 99), llm, [])


def test_modality(capture: moe_native.Capture, llm: LLM) -> None:
    sample = capture[0]
    text, image, audio = "text", "image", "audio"
    assert sample.media == [(1, 3, image), (5, 6, audio)]
    modality = sample.modality
    assert isinstance(modality, np.ndarray)
    assert modality.tolist() == [text, image, image, text, text, audio, *[text] * 5]
    assert torch.equal(sample.logits[5][modality == image], rows(llm, "logits", 5, [1, 2]))
    assert sample.tokens(2, 6).modality.tolist() == [image, text, text, audio]
    assert sample.decode.modality.tolist() == [text] * 3
    assert set(capture[2].modality.tolist()) == {text}


def test_samplings_of_a_prompt(capture: moe_native.Capture, llm: LLM) -> None:
    second, other = capture[1], capture[3]
    assert (second.prompt_index, second.completion_index, second.completion.token_ids) == (0, 1, [10, 11, 12, 13])
    assert second.token_ids.tolist()[PROMPT:] == [10, 11, 12]
    assert torch.equal(second.ids[2], rows(llm, "ids", 2, range(ROWS), 0, 1))
    assert (other.prompt_index, other.completion_index, len(other)) == (1, 1, 8)
    assert torch.equal(other.weights[5], rows(llm, "weights", 5, range(8), 1, 1))


def test_a_prompt_of_embeddings_has_no_tokens(capture: moe_native.Capture, llm: LLM) -> None:
    sample = capture[4]
    assert sample.is_of_embeddings and not capture[0].is_of_embeddings
    assert sample.prompt_len == 6 and len(sample) == 9 and len(sample.decode) == 3
    assert torch.equal(sample.logits[2], rows(llm, "logits", 2, range(9), 2))
    with pytest.raises(LookupError, match="given as embeddings"):
        _ = sample.prefill.token_ids
    assert sample.request_output.prompt_token_ids == [0] * 6  # which no one has given


def test_token_ids_beside_embeddings_stand_for_none(llm: LLM) -> None:
    given = {"prompt_embeds": torch.zeros(2, 3), "prompt_token_ids": [7, 7], "prompt_is_token_ids": [True, False]}
    (sample,) = moe_native.capture(llm, given, SamplingParams(2))
    assert sample.is_of_embeddings and sample.prompt_len == 2 and len(sample) == 3


def test_a_vllm_that_returns_nothing_for_embeddings(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = llm.generate

    def as_before(*given: Any, **options: Any) -> Any:
        outputs = generate(*given, **options)
        outputs[0].prompt_token_ids = None
        return outputs

    monkeypatch.setattr(llm, "generate", as_before)
    (sample,) = moe_native.capture(llm, {"prompt_embeds": torch.zeros(5, 3)}, SamplingParams(2))
    assert sample.is_of_embeddings and sample.prompt_len == 5 and len(sample) == 6


def test_fields_are_mappings_by_layer(sample: Sample) -> None:
    assert isinstance(sample.logits, ByLayer)
    assert list(sample.logits) == [2, 5] and len(sample.logits) == 2 and 5 in sample.logits and 3 not in sample.logits
    assert {layer: tuple(tensor.shape) for layer, tensor in sample.decode.logits.items()} == {2: (3, 16), 5: (3, 16)}
    assert list(sample.hidden) == [] and sample.ids.get(4) is None
    assert repr(sample.logits) == "<logits of 2 layers (2 to 5), (11, 16) in layer 2>"
    assert repr(sample.hidden) == "<hidden: not captured>"


def test_what_was_not_captured_is_told(sample: Sample) -> None:
    with pytest.raises(KeyError, match="hidden were not captured: name them in fields="):
        sample.hidden[2]
    with pytest.raises(KeyError, match="layer 3 was not captured; these were: 2, 5"):
        sample.prefill.logits[3]


def test_it_says_what_it_is(capture: moe_native.Capture) -> None:
    said = "completion 1: 8 prompt + 3 generated tokens, 2 layers, ids, weights, logits>"
    assert repr(capture[1]) == f"<moe_native.Sample of prompt 0, {said}"
    assert "5 prompt + 2 generated" in repr(capture[1].tokens(3, 10))
    assert "0 prompt + 1 generated" in repr(capture[1].tokens(9, 10))


def test_what_is_written_to_a_tensor_stays_in_this_mapping(llm: LLM) -> None:
    """Of the worker's memory, which it uses again, nothing is changed."""
    capture = moe_native.capture(llm, "hello", SamplingParams(2))
    (opened,), (closed,) = llm.replies[-2:]
    handle, size = opened["handle"], closed["bytes"]
    of_worker = os.pread(handle, size, 0)
    capture[0].logits[2].zero_()
    capture[0].ids[5][3] = 77
    assert capture[0].prefill.logits[2].abs().sum() == 0 == capture.logits[2].abs().sum()
    assert capture[0].ids[5][3].tolist() == [77, 77]
    assert len(of_worker) == size and os.pread(handle, size, 0) == of_worker


def test_tensors_outlive_what_they_came_from(llm: LLM) -> None:
    capture = moe_native.capture(llm, ["hello", "world"], SamplingParams(2))
    tensors = {field: getattr(capture[1].decode, field)[5] for field in ("ids", "weights", "logits")}
    expected = {field: rows(llm, field, 5, [5], 1) for field in tensors}
    del capture
    gc.collect()
    for _ in range(4):  # which take memory of their own
        moe_native.capture(llm, ["other", "texts"], SamplingParams(2))
    assert all(torch.equal(tensors[field], expected[field]) for field in tensors)
