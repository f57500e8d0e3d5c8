"""Which positions of a prompt are images, video or audio."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_native.runs import MODALITIES

# Prompt positions that are not text: (first, one past the last, modality's name).
MediaSpan = tuple[int, int, str]


def media_spans(features: Iterable[Any]) -> list[MediaSpan]:
    """What is not text in a prompt, ascending, from vLLM's multi-modal features.

    A placeholder may hold text as well, such as the tokens between the rows of an image or the time stamps of a video:
    where it has a mask, only the positions that take embeddings count. Of placeholders that overlap, the one that
    begins first has the positions. Modalities that the format does not know are `unknown`.
    """
    spans: list[MediaSpan] = []
    for feature in features:
        place = feature.mm_position
        modality = feature.modality if feature.modality in MODALITIES else "unknown"
        mask = getattr(place, "is_embed", None)
        taken = np.ones(int(place.length), bool) if mask is None else np.asarray(mask, bool)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], taken, [False])))) + int(place.offset)
        spans += [(first, end, modality) for first, end in edges.reshape(-1, 2).tolist()]
    apart: list[MediaSpan] = []
    taken_to = 0
    for first, end, modality in sorted(spans):
        if end > taken_to:
            apart.append((max(first, taken_to), end, modality))
            taken_to = end
    return apart
