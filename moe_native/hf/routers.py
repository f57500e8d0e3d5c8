"""Finds the routers of a transformers model, hooks them, and reads their choice from what they return or pass on."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import Any

import torch

from moe_native import ops
from moe_native.modules import layer_number
from moe_native.recorder import Recorder

log = logging.getLogger("moe_native")

_GATES = ("gate", "router")


def find(model: torch.nn.Module) -> Iterable[Router]:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    seen: set[int] = set()
    for name, module in model.named_modules():
        children = dict(module.named_children())
        gate = next((children[gate] for gate in _GATES if gate in children), None)
        if gate is None or "experts" not in children:
            continue
        layer = layer_number(name, len(seen))
        if layer not in seen:
            seen.add(layer)
            yield Router(name, layer, module, gate, config)


class Router:
    """One MoE layer: its gate or router, and its experts where they are one module that is given the choice."""

    def __init__(self, name: str, layer: int, block: torch.nn.Module, gate: torch.nn.Module, config: Any) -> None:
        self.name, self.layer, self.gate = name, layer, gate
        experts = block.get_submodule("experts")
        self.experts: torch.nn.Module | None = None if isinstance(experts, torch.nn.ModuleList) else experts
        weight = getattr(gate, "weight", None)
        self.width = int(
            _first(gate, "num_experts", "n_routed_experts", "num_local_experts", "out_features")
            or (weight.shape[0] if isinstance(weight, torch.Tensor) else 0)
            or _first(config, "num_experts", "num_local_experts", "n_routed_experts")
        )
        self.top_k = int(
            _first(gate, "top_k")
            or _first(block, "top_k")
            or _first(config, "num_experts_per_tok", "num_experts_per_token")
        )
        self.renormalise = bool(getattr(config, "norm_topk_prob", True))
        # Layers may be left out in training; only a layer that runs in every pass is missed where it has no rows.
        self.every_step = not any(getattr(config, rate, 0) for rate in ("layerdrop", "decoder_layerdrop"))
        self._binding = -1
        self._logits: torch.Tensor | None = None  # of a gate whose choice the experts will show
        self._awaited = False
        self._complained = False

    def bind(self, recorder: Recorder) -> list[Any]:
        """Bind, and return the hooks' handles."""
        parameter = next(itertools.chain(self.gate.parameters(), self.gate.buffers()), None)
        if parameter is not None and parameter.device.type != "cpu":
            detail = f"the model runs on {parameter.device.type}: this version records on CPU only"
            recorder.miss(self.layer, name=self.name, detail=detail, experts=self.width, top_k=self.top_k)
            return []
        status, detail = "exact", ""
        if self.experts is None:
            status = "derived"
            detail = "unless the gate returns its choice, computed from its logits: top-k of the softmax"
            detail += ", renormalised" if self.renormalise else ""
        self._binding = recorder.bind(
            self.layer,
            experts=self.width,
            top_k=self.top_k,
            name=self.name,
            status=status,
            detail=detail,
            every_step=self.every_step,
        )
        handles = [self.gate.register_forward_hook(self._after_gate)]
        if self.experts is not None:
            handles.append(self.experts.register_forward_pre_hook(self._before_experts, with_kwargs=True))
        return handles

    # What goes wrong here must not reach the model. The step then lacks rows of this layer, and counts them as lost.

    def _after_gate(self, _: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        try:
            logits, weights, ids = _choice(output)
            self._awaited = ids is None and self.experts is not None
            self._logits = logits.detach() if self._awaited and logits is not None else None
            if ids is None and self.experts is None and logits is not None and logits.shape[-1] == self.width:
                probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
                weights, ids = probabilities.topk(self.top_k, dim=-1)
                if self.renormalise:
                    weights = weights / weights.sum(dim=-1, keepdim=True)
            self._record(ids, weights, logits, inputs)
        except Exception as error:
            self._complain(error)

    def _before_experts(self, _: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self._awaited:
            return
        try:
            logits, self._logits, self._awaited = self._logits, None, False
            __, weights, ids = _choice((*inputs[1:], *named.values()))
            self._record(ids, weights, logits, inputs)
        except Exception as error:
            self._complain(error)

    def _record(
        self,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        logits: torch.Tensor | None,
        inputs: tuple[Any, ...],
    ) -> None:
        if ids is not None and weights is not None:
            hidden = _rows(inputs[0]) if inputs and isinstance(inputs[0], torch.Tensor) else None
            ops.op(ops.state, ids, weights, logits, hidden, self._binding)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            log.error("moe_native: layer %d (%s) is not recorded: %s (said once)", self.layer, self.name, error)


def _choice(values: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(logits, weights, ids) among what a router returned or experts were given; routers return them in different
    orders. Ids are whole numbers, weights have their shape, logits are wider."""
    if isinstance(values, torch.Tensor):
        return (_rows(values) if values.is_floating_point() else None), None, None
    tensors = [_rows(value) for value in values if isinstance(value, torch.Tensor) and value.dim() >= 2]
    ids = next((t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool), None)
    floats = [t for t in tensors if t.is_floating_point()]
    if ids is None:
        return (floats[0] if floats else None), None, None
    weights = next((t for t in floats if t.shape == ids.shape), None)
    logits = next((t for t in floats if t.shape[-1] > ids.shape[-1]), None)
    return logits, weights, ids


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _first(thing: Any, *names: str) -> int:
    """The first of these attributes that is a number above 0, else 0."""
    for name in names:
        value = getattr(thing, name, 0)
        if isinstance(value, int) and value > 0:
            return value
    return 0
