"""Finds the MoE routers of a loaded vLLM model and hooks those whose choices can be seen.

The hook sits on `BaseRouter._compute_routing`, on the instance: the one place that has the weights, the logical
expert ids (before expert-parallel load balancing maps them) and the logits together. Every MoE layer of the model is
either bound or missed with a reason, so that the trace knows what it lacks.

vLLM's classes are told apart by what they have, not by name or version, and nothing of vLLM is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_native import ops
from moe_native.modules import layer_number
from moe_native.recorder import Recorder
from moe_native.vllm.probe import UnknownVLLM, require
from moe_native.vllm.symbols import ROUTER


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model. `obstacle` says why its routing cannot be recorded; empty when it can."""

    layer: int
    name: str
    router: Any
    experts: int  # number of legal ids
    top_k: int
    obstacle: str = ""


def find(model: torch.nn.Module, device: torch.device | None) -> list[MoELayer]:
    """All MoE layers of `model`, in the order of its modules, which is the order in which every process sees them."""
    found: list[MoELayer] = []
    names: dict[int, str] = {}
    routers: set[int] = set()
    for path, module in model.named_modules():
        name, router = str(getattr(module, "layer_name", "") or path), getattr(module, "router", None)
        if not _is_moe(module, router) or id(router) in routers:
            continue
        if router is not None:
            routers.add(id(router))  # some versions show one router through two modules
        layer = layer_number(name, len(found))
        experts, top_k = _geometry(module, router)
        obstacle = _obstacle(module, router, device)
        if layer in names:
            obstacle = f"layer {layer} has a second router, and is recorded as {names[layer]}"
        names.setdefault(layer, name)
        found.append(MoELayer(layer, name, router, experts, top_k, obstacle))
    return found


def _is_moe(module: torch.nn.Module, router: Any) -> bool:
    if hasattr(router, "_compute_routing") or hasattr(router, "select_experts"):
        return True
    # Modules with a fused kernel of their own show vLLM's interface for capturing expert ids.
    return hasattr(module, "capture_fn") and hasattr(module, "layer_id")


def _geometry(module: torch.nn.Module, router: Any) -> tuple[int, int]:
    """Number of legal expert ids (fused shared experts included) and ids per row; 0 where unknown."""
    config = getattr(module, "moe_config", None)
    experts = getattr(config, "num_logical_experts", 0) or getattr(router, "global_num_experts", 0)
    experts_map = getattr(getattr(module, "routed_experts", None), "expert_map_manager", None)
    shared = getattr(experts_map, "num_fused_shared_experts", 0)
    top_k = getattr(router, "top_k", 0) or getattr(config, "experts_per_token", 0)
    return int(experts or 0) + int(shared or 0), int(top_k or 0)


def _obstacle(module: torch.nn.Module, router: Any, device: torch.device | None) -> str:
    if device is not None and device.type != "cpu":
        return f"the model runs on {device.type}: this version records on CPU only"
    method = getattr(getattr(module, "routed_experts", module), "quant_method", None)
    if getattr(method, "is_monolithic", False):
        kernel = getattr(getattr(getattr(method, "moe_kernel", None), "impl", None), "fused_experts", method)
        return f"the kernel {type(kernel).__name__} routes by itself: no ids or weights are seen outside of it"
    if not hasattr(router, "_compute_routing"):
        return f"{type(router or module).__name__} routes in a way that is not known here"
    try:
        require(router, ROUTER)
    except UnknownVLLM as unknown:
        return str(unknown)
    if hasattr(router, "zero_expert_type"):
        return f"{type(router).__name__} turns the ids of zero experts into expert 0 before they can be seen"
    return ""


def bind(layers: list[MoELayer], recorder: Recorder, first: int) -> int:
    """Hook every layer that can be hooked and miss the others; returns how many were bound.

    Compiled graphs hold a binding's index as a constant, and vLLM keeps such graphs in a cache across processes.
    `first` is the index of the first binding that the cache key was made for.

    Raises:
        RuntimeError: the indices are not those of the cache key; nothing is hooked then.
    """
    hooks: list[tuple[Any, int]] = []
    for found in layers:
        if found.obstacle:
            recorder.miss(found.layer, name=found.name, detail=found.obstacle, experts=found.experts, top_k=found.top_k)
            continue
        binding = recorder.bind(found.layer, experts=found.experts, top_k=found.top_k, name=found.name)
        if binding != first + len(hooks):
            raise RuntimeError(
                f"binding {binding} where {first + len(hooks)} was expected: another recorder was opened or closed "
                "in this process while the model was loading"
            )
        hooks.append((found.router, binding))
    for router, binding in hooks:
        _hook(router, binding)
    return len(hooks)


def _hook(router: Any, binding: int) -> None:
    compute, record, state = router._compute_routing, torch.ops.moe_native.record, ops.state

    # Traced by torch.compile, so no more Python than this; the op never raises for what is in the tensors.
    def _compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = compute(hidden_states, router_logits, *args, **kwargs)
        if (
            not isinstance(chosen, tuple) or len(chosen) != 2
        ):  # not as it is known here: the trace shows that this layer has no rows
            return chosen
        weights, ids = chosen
        # vLLM's Transformers backend passes the chosen weights where logits are expected: k of them.
        logits = router_logits if router_logits.shape[-1] != ids.shape[-1] else None
        record(state, ids, weights, logits, hidden_states, binding)
        return chosen

    router._compute_routing = _compute_routing
