"""How MoE families choose experts, in numpy and float64, written from what was published of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Routing:
    """One family's way.

    Attributes:
        k: experts per row.
        score: of an expert, from the logits: `softmax`, `sigmoid` or `sparsemixer` (two choices, each weighed among
            those within 2 % of it).
        renormalised: the chosen scores are made to add up to 1.
        bias: a correction bias is added to the scores for choosing, and not for weighing.
        groups, kept: experts are in groups, of which those with the best score are kept: the best expert's, or with a
            bias the sum of the best two.
        scale: what the router multiplies its weights by.
        expert_scale: name in the checkpoint of a factor for each expert's weight.
    """

    k: int
    score: str = "softmax"
    renormalised: bool = True
    bias: bool = False
    groups: int = 1
    kept: int = 1
    scale: float = 1.0
    expert_scale: str = ""

    def __str__(self) -> str:
        parts = [self.score + (" + correction bias" if self.bias else "")]
        parts += [f"best {self.kept} of {self.groups} groups"] if self.groups > 1 else []
        parts += ["renormalised"] if self.renormalised else []
        parts += [f"x {self.scale}"] if self.scale != 1 else []
        parts += ["a scale per expert"] if self.expert_scale else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Choice:
    """Of each row: the chosen `ids` `[rows, k]`; all experts' weights if they were chosen, before renormalising,
    `scores` `[rows, experts]`; by how much the decision was taken, `margin` `[rows]`."""

    ids: npt.NDArray[np.int64]
    scores: Floats
    margin: Floats


def choose(routing: Routing, logits: npt.NDArray[Any], bias: npt.NDArray[Any] | None) -> Choice:
    """Args: logits `[rows, experts]`, bias `[experts]` or None."""
    x = logits.astype(np.float64)
    if routing.score == "sparsemixer":
        return _sparsemixer(x)
    scores = _softmax(x) if routing.score == "softmax" else 1 / (1 + np.exp(-x))
    preference = scores if bias is None else scores + bias.astype(np.float64)
    margin = np.full(len(x), np.inf)
    if routing.groups > 1:
        by_group = np.sort(preference.reshape(len(x), routing.groups, -1))[..., ::-1]
        best = by_group[..., 0] if bias is None else by_group[..., :2].sum(axis=-1)
        groups, margin = _best(best, routing.kept)
        keep = np.zeros_like(best, dtype=bool)
        np.put_along_axis(keep, groups, True, axis=1)
        preference = np.where(np.repeat(keep, x.shape[1] // routing.groups, axis=1), preference, -np.inf)
    ids, margin_of_experts = _best(preference, routing.k)
    return Choice(ids, scores, np.minimum(margin, margin_of_experts))


def weights(routing: Routing, choice: Choice, ids: npt.NDArray[np.int64]) -> Floats:
    """The weights `[rows, k]` of these ids."""
    chosen = np.take_along_axis(choice.scores, ids, axis=1)
    if routing.renormalised:
        chosen = chosen / chosen.sum(axis=1, keepdims=True)
    return chosen * routing.scale


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _best(preference: Floats, k: int) -> tuple[npt.NDArray[np.int64], Floats]:
    ids = np.argsort(-preference, axis=1, kind="stable")
    ranked = np.take_along_axis(preference, ids, axis=1)
    margin = ranked[:, k - 1] - ranked[:, k] if k < preference.shape[1] else np.full(len(preference), np.inf)
    return ids[:, :k], margin


def _sparsemixer(x: Floats) -> Choice:
    ids, margin = _best(x, 2)
    margin = np.minimum(margin, _best(x, 1)[1])
    scores = np.zeros_like(x)
    left = x.copy()
    for place in range(2):
        choice = ids[:, place, None]
        best = np.take_along_axis(left, choice, axis=1)
        near = (best - x) / np.maximum(np.abs(x), best) <= 0.02
        weight = np.take_along_axis(_softmax(np.where(near, left, -np.inf)), choice, axis=1)
        np.put_along_axis(scores, choice, weight, axis=1)
        np.put_along_axis(left, choice, -np.inf, axis=1)
    return Choice(ids, scores, margin)
