"""Finds the MoE routers of a loaded vLLM model and hooks those whose choices can be seen.

The hook sits on `BaseRouter._compute_routing`, on the instance: the one place that has the weights, the logical
expert ids (before expert-parallel load balancing maps them) and the logits together. Every MoE layer of the model is
either bound or missed with a reason, so that the trace knows what it lacks.

vLLM's classes are told apart by what they have, not by name or version, and nothing of vLLM is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    experts: int  # number of legal ids; 0 where unknown
    top_k: int  # ids per row; 0 where unknown
    logits: int  # width of the router's logits; 0 where they are not seen
    obstacle: str = ""


def find(model: torch.nn.Module, device: torch.device | None) -> list[MoELayer]:
    """All MoE layers of `model`, in the order of its modules, which is the order in which every process sees them."""
    found: list[MoELayer] = []
    names: dict[int, str] = {}
    routers: set[int] = set()
    modules = list(model.named_modules())
    known = [path for path, module in modules if _shows_routing(module)]
    for path, module in modules:
        router = getattr(module, "router", None)
        if id(router) in routers or not (_shows_routing(module) or _routes_unseen(path, module, known)):
            continue
        if router is not None:
            routers.add(id(router))  # some versions show one router through two modules
        name = str(getattr(module, "layer_name", "") or path)
        layer = layer_number(name, len(found))
        entry = _look(layer, name, module, router, device)
        if layer in names:
            entry = replace(entry, obstacle=f"layer {layer} has another router, {names[layer]}, which stands for it")
        names.setdefault(layer, name)
        found.append(entry)
    return found


def left_out(runner: Any) -> list[str]:
    """What of a model runner routes and is not recorded, a sentence each: the layers of a draft model. They are another
    model's, whose layers have numbers of their own, and what they choose is not what the model did."""
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    model = getattr(drafter, "model", None)
    layers = find(model, None) if isinstance(model, torch.nn.Module) else []
    if not layers:
        return []
    own = "1 MoE layer of its own, which is" if len(layers) == 1 else f"{len(layers)} MoE layers of its own, which are"
    return [f"the draft model {type(model).__name__} has {own} not recorded"]


def _shows_routing(module: torch.nn.Module) -> bool:
    router = getattr(module, "router", None)
    if hasattr(router, "_compute_routing") or hasattr(router, "select_experts"):
        return True
    # Modules with a fused kernel of their own show vLLM's interface for capturing expert ids.
    return hasattr(module, "capture_fn") and hasattr(module, "layer_id")


def _routes_unseen(path: str, module: torch.nn.Module, known: list[str]) -> bool:
    """Whether this is a MoE block, by its name and its experts' stacked weights, and apart from the `known` ones."""
    kind = type(module).__name__.lower()
    if not ("moe" in kind or "expert" in kind) or all(weight.dim() < 3 for weight in module.parameters(recurse=False)):
        return False
    return not any(f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.") for other in known)


def _look(layer: int, name: str, module: torch.nn.Module, router: Any, device: torch.device | None) -> MoELayer:
    try:
        experts, top_k, logits = _geometry(module, router)
        obstacle = _obstacle(module, router, device)
    except Exception as error:  # one layer that cannot be understood shall not cost the others
        what = f"{type(module).__name__} cannot be looked at: {type(error).__name__}: {error}"
        return MoELayer(layer, name, router, 0, 0, 0, what)
    if not obstacle and not (experts and top_k):
        obstacle = f"it is not known how many experts it has ({experts or 'unknown'}) or chooses ({top_k or 'unknown'})"
    return MoELayer(layer, name, router, experts, top_k, logits, obstacle)


def _geometry(module: torch.nn.Module, router: Any) -> tuple[int, int, int]:
    """Number of legal expert ids (fused shared experts included), ids per row, width of the logits; 0 where unknown."""
    config = getattr(module, "moe_config", None)
    experts = getattr(config, "num_logical_experts", 0) or getattr(router, "global_num_experts", 0)
    experts_map = getattr(getattr(module, "routed_experts", None), "expert_map_manager", None)
    shared = getattr(experts_map, "num_fused_shared_experts", 0)
    top_k = getattr(router, "top_k", 0) or getattr(config, "experts_per_token", 0)
    # vLLM's Transformers backend may route in transformers' own module, and passes the chosen weights as logits.
    logits = 0 if hasattr(module, "_moe_state") else experts
    return _small(experts) + _small(shared), _small(top_k), _small(logits)


def _small(number: Any) -> int:
    return number if isinstance(number, int) and 0 < number <= 0xFFFF else 0


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
    hooks: list[tuple[MoELayer, int]] = []
    for found in layers:
        if found.obstacle:
            recorder.miss(found.layer, name=found.name, detail=found.obstacle, experts=found.experts, top_k=found.top_k)
            continue
        binding = recorder.bind(
            found.layer, experts=found.experts, top_k=found.top_k, name=found.name, logits=found.logits
        )
        if binding != first + len(hooks):
            raise RuntimeError(
                f"binding {binding} where {first + len(hooks)} was expected: another recorder was opened or closed "
                "in this process while the model was loading"
            )
        hooks.append((found, binding))
    for found, binding in hooks:
        _hook(found.router, found.logits > 0, binding)
    return len(hooks)


def _hook(router: Any, has_logits: bool, binding: int) -> None:
    compute, record, state = router._compute_routing, ops.op, ops.state

    # Traced by torch.compile, so no more Python than this; the op never raises for what is in the tensors.
    def _compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = compute(hidden_states, router_logits, *args, **kwargs)
        if not isinstance(chosen, tuple) or len(chosen) != 2:
            return chosen  # not as it is known here: the trace shows that this layer has no rows
        weights, ids = chosen
        record(state, ids, weights, router_logits if has_logits else None, hidden_states, binding)
        return chosen

    router._compute_routing = _compute_routing
