"""Which prompt positions are not text, from features in the shape of vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_native.vllm.media import media_spans


def feature(modality: str, offset: int, length: int, mask: list[int] | None = None) -> Any:
    is_embed = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    return SimpleNamespace(
        modality=modality, mm_position=SimpleNamespace(offset=offset, length=length, is_embed=is_embed)
    )


def test_a_placeholder_without_a_mask_is_media_throughout() -> None:
    assert media_spans([feature("image", 2, 3)]) == [(2, 5, "image")]
    assert media_spans([]) == []


def test_of_a_placeholder_with_a_mask_only_what_takes_embeddings() -> None:
    video = feature("video", 10, 8, [0, 1, 1, 0, 1, 0, 0, 1])
    assert media_spans([video]) == [(11, 13, "video"), (14, 15, "video"), (17, 18, "video")]
    assert media_spans([feature("image", 0, 3, [0, 0, 0])]) == []


def test_spans_ascend_whatever_the_order_of_the_features() -> None:
    found = media_spans([feature("audio", 20, 2), feature("image", 4, 2), feature("depth", 0, 1)])
    assert found == [(0, 1, "unknown"), (4, 6, "image"), (20, 22, "audio")]


def test_of_spans_that_overlap_the_one_that_begins_first_has_the_positions() -> None:
    found = media_spans([feature("audio", 10, 10), feature("video", 0, 15), feature("image", 3, 4)])
    assert found == [(0, 15, "video"), (15, 20, "audio")]


def test_they_are_those_of_vllm() -> None:
    inputs = pytest.importorskip("vllm.multimodal.inputs", reason="vLLM is not installed here")
    mask = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.6
    place = inputs.PlaceholderRange(offset=7, length=64, is_embed=mask)
    theirs = [(first, last + 1, "image") for first, last in place.extract_embeds_range()]
    assert media_spans([SimpleNamespace(modality="image", mm_position=place)]) == theirs
