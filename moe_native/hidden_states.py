"""Router logits under the names that EasySteer's scripts use: `import moe_native.hidden_states as hs`.

Importing this module arms recording for the vLLM engines that this program builds afterwards: it sets
`MOE_NATIVE_CAPTURE=1` in the environment, by which their workers hook the model's routers. So import it before
`LLM(...)`. An engine that was built before can be bound late where it runs eagerly and takes functions of ours
(`moe_native.capture` says how). Nothing is recorded but what is asked for here.

    import moe_native.hidden_states as hs
    llm = LLM(model)
    logits, outputs = hs.get_moe_router_logits_generate(llm, ["Hello"], max_tokens=8, split_by_samples=True)
    logits[0][12]                                             # [rows, experts] of the first prompt in layer 12
    usage = hs.analyze_expert_usage(logits[0], top_k=8)

`moe_native.capture` offers more: ids, weights, the routers' inputs, positions, phases and modalities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from moe_native.captures import Capture, Sample, capture
from moe_native.vllm.plugin import arm

__all__ = ["RouterLogits", "analyze_expert_usage", "get_moe_router_logits_generate"]

arm()

_NEEDED = ("ids", "weights", "logits")


class RouterLogits(dict[int, torch.Tensor]):
    """Router logits by layer, `[rows, experts]`: a dict, that also knows what the model chose.

    Attributes:
        ids, weights: the expert ids that the model chose and their weights, by layer, `[rows, k]`.
    """

    def __init__(
        self,
        logits: Mapping[int, torch.Tensor],
        ids: Mapping[int, torch.Tensor],
        weights: Mapping[int, torch.Tensor],
    ) -> None:
        super().__init__(logits)
        self.ids = dict(ids)
        self.weights = dict(weights)


def get_moe_router_logits_generate(
    llm: Any,
    prompts: Any,
    max_tokens: int = 1,
    split_by_samples: bool = False,
    **sampling: Any,
) -> tuple[Any, list[Any]]:
    """Generate, and return the router logits of each token that went through the model.

    Args:
        llm: vLLM's `LLM`, built after this module was imported.
        prompts: strings, lists of token ids, or dicts as vLLM takes them; `multi_modal_data` may hold PIL images,
            arrays, paths, URLs and base64 data URLs, or lists of them. One, or a list.
        max_tokens: how many tokens to generate; with 1 only the prompts are executed.
        split_by_samples: a dict for each sample, in the order of the prompts (with `n` > 1, those of a prompt next to
            each other), in place of one for all of them.
        sampling: further arguments of `SamplingParams`. `temperature` is 0 unless given.

    Returns:
        `(router_logits, outputs)`. `router_logits` is `{layer: [rows, experts]}`, or a list of such dicts: raw logits,
        before softmax, on the CPU, in the router's own dtype, from layer to layer with the same rows. A sample has
        prompt + generated - 1 of them; without `split_by_samples` the samples follow each other. `outputs` is what
        `LLM.generate` returns.

    Raises:
        ValueError: a prompt has a form that is not known, or the model takes no images.
        FileNotFoundError: an image is not there.
        CaptureError: the engine was built before recording was armed, the model has no MoE layer, or a row is missing.
    """
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0.0, **sampling, "max_tokens": max_tokens})
    captured = capture(llm, prompts, params, fields=("ids", "weights", "logits"))
    if split_by_samples:
        return [RouterLogits(each.logits, each.ids, each.weights) for each in captured], captured.outputs
    return RouterLogits(captured.logits, captured.ids, captured.weights), captured.outputs


@dataclasses.dataclass(frozen=True)
class _Chosen:
    ids: torch.Tensor  # [rows, k] int64
    weights: torch.Tensor  # [rows, k]
    experts: int


def analyze_expert_usage(
    router_logits: Mapping[int, torch.Tensor] | Capture | Sample,
    top_k: int = 2,
    token_range: tuple[int, int] | None = None,
    normalize: bool = False,
) -> dict[str, Any]:
    """How often each expert was chosen, layer by layer.

    Where `router_logits` came from `get_moe_router_logits_generate`, or is a `Capture` or one of its samples, the
    experts are those that the model really chose, the `top_k` of them with the largest weights, with the model's own
    weights. Of other tensors, or where `top_k` is more than the model chose, **softmax top-k is assumed**: the `top_k`
    largest logits, weighted by the softmax over all experts. That is wrong for routers with a sigmoid, a bias or
    groups.

    Args:
        router_logits: `[rows, experts]` by layer, or a capture with `ids`, `weights` and `logits`. A layer may have a
            number of rows of its own.
        top_k: how many experts a row has.
        token_range: the rows from the first to before the second, as in `tensor[first:end]`; None for all.
        normalize: divide counts by the layer's own number of rows, so that a layer's counts add up to `top_k`.

    Returns:
        `expert_selection` `{layer: int64 [rows, top_k]}`, the largest weight first; `expert_weights` `{layer: [rows,
        top_k]}`; `expert_usage_counts` `{layer: [experts] floats}`; `load_balance` `{layer: float}`, the coefficient of
        variation of the counts as EasySteer defines it, std(ddof=1) / (mean + 1e-8), 0 where all experts are used
        alike; `num_tokens_analyzed`, of the layer that has the most.

    Raises:
        ValueError: `top_k` or a tensor's shape is not usable, or a capture has no logits.
    """
    router_logits = _by_layer(router_logits)
    first, end = (None, None) if token_range is None else token_range
    selection: dict[int, torch.Tensor] = {}
    weights: dict[int, torch.Tensor] = {}
    counts: dict[int, list[float]] = {}
    balance: dict[int, float] = {}
    for layer, logits in router_logits.items():
        chosen = _chosen(router_logits, layer, logits, top_k)
        ids, of_ids = chosen.ids[first:end], chosen.weights[first:end]
        legal = ids[(ids >= 0) & (ids < chosen.experts)]  # an id that is none was not counted by the model either
        count = torch.bincount(legal, minlength=chosen.experts).double()
        if normalize:
            count /= max(len(ids), 1)
        spread = float(count.std()) if chosen.experts > 1 else 0.0
        balance[layer] = spread / (float(count.mean()) + 1e-8)
        counts[layer] = count.tolist()
        selection[layer], weights[layer] = ids, of_ids
    return {
        "expert_selection": selection,
        "expert_weights": weights,
        "expert_usage_counts": counts,
        "load_balance": balance,
        "num_tokens_analyzed": max((len(ids) for ids in selection.values()), default=0),
    }


def _by_layer(given: Mapping[int, torch.Tensor] | Capture | Sample) -> Mapping[int, torch.Tensor]:
    if isinstance(given, Mapping):
        return given
    fields = given.fields if isinstance(given, Capture) else [name for name in _NEEDED if len(getattr(given, name))]
    if lacking := [name for name in _NEEDED if name not in fields]:
        raise ValueError(f"this capture has no {' and no '.join(lacking)}: capture ids, weights and logits")
    return RouterLogits(given.logits, given.ids, given.weights)


def _chosen(router_logits: Mapping[int, torch.Tensor], layer: int, logits: torch.Tensor, top_k: int) -> _Chosen:
    if logits.dim() != 2:
        raise ValueError(f"layer {layer}: router logits must be [rows, experts], not {list(logits.shape)}")
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} is not between 1 and the {experts} experts of layer {layer}")
    if isinstance(router_logits, RouterLogits):
        ids, weights = router_logits.ids.get(layer), router_logits.weights.get(layer)
        if ids is not None and weights is not None and len(ids) == len(logits) and top_k <= ids.shape[1]:
            order = weights.float().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
            return _Chosen(ids.long().gather(1, order), weights.gather(1, order), experts)
    best, indices = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    return _Chosen(indices, best, experts)
