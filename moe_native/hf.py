"""Records a plain transformers Mixture-of-Experts model: `attach(model, recorder)`.

    with moe_native.Recorder("trace") as recorder, moe_native.hf.attach(model, recorder):
        model.generate(**inputs, max_new_tokens=50)

Every forward pass of `model` becomes a step. A sequence of the batch is a request; a pass that starts without a cache
starts new sequences, one that has a cache goes on with the same ones at the next positions. So `generate` gives one
request per sequence: its first pass is the prompt, the others are decoding. Without a cache (`use_cache=False`) every
pass is taken for new sequences. With beams, a request is a place in the batch, whichever hypothesis has it.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_native import ops
from moe_native.modules import layer_number
from moe_native.recorder import Recorder
from moe_native.runs import join_rows, row_class

log = logging.getLogger("moe_native")

_GATES = ("gate", "router")


def attach(model: torch.nn.Module, recorder: Recorder, *, requests: Iterable[str] | None = None) -> Attachment:
    """Record every forward pass of a transformers model, until `detach()`.

    Args:
        model: a decoder-only Mixture-of-Experts model on the CPU, with routers or gates in the usual places: a module
            with the children
            `experts` and `gate` or `router`. Call the model itself: passes of its parts are not seen.
        recorder: where to; bind nothing else to it.
        requests: names for the sequences, in the order in which they start; None for "0", "1", … When it runs out,
            numbers follow.

    Returns:
        A handle, also a context manager, that detaches.

    Raises:
        ValueError: the model has no Mixture-of-Experts layer that is known here, or is an encoder-decoder.

    A router that returns its choice is recorded exactly, and so is one whose experts are given it. Where only the
    logits of a gate can be seen, the choice is computed from them (top-k of the softmax) and the layer is marked
    "derived" in the trace.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("encoder-decoder models are not supported: their two halves route different rows in one pass")
    blocks = list(_find(model))
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no Mixture-of-Experts layer that is known here (a module with children "
            "'experts' and 'gate' or 'router'); use moe_native.Recorder.record in its router instead"
        )
    return Attachment(model, recorder, blocks, requests)


class _Block:
    """One MoE layer: its gate or router, and its experts where they are one module that is given the choice."""

    def __init__(self, name: str, layer: int, block: torch.nn.Module, gate: torch.nn.Module, config: Any) -> None:
        self.name, self.layer, self.gate = name, layer, gate
        experts = block.get_submodule("experts")
        self.experts: torch.nn.Module | None = None if isinstance(experts, torch.nn.ModuleList) else experts
        self.derived = self.experts is None and isinstance(gate, torch.nn.Linear)
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
        self._binding = -1
        self._logits: torch.Tensor | None = None
        self._recorded = False

    def bind(self, recorder: Recorder) -> list[Any]:
        """Bind, and return the hooks' handles."""
        parameter = next(itertools.chain(self.gate.parameters(), self.gate.buffers()), None)
        if parameter is not None and parameter.device.type != "cpu":
            detail = f"the model runs on {parameter.device.type}: this version records on CPU only"
            recorder.miss(self.layer, name=self.name, detail=detail, experts=self.width, top_k=self.top_k)
            return []
        status, detail = "exact", ""
        if self.derived:
            status = "derived"
            detail = "computed from the gate's logits: top-k of the softmax"
            detail += ", renormalised" if self.renormalise else ""
        self._binding = recorder.bind(
            self.layer, experts=self.width, top_k=self.top_k, name=self.name, status=status, detail=detail
        )
        handles = [self.gate.register_forward_hook(self._after_gate)]
        if self.experts is not None:
            handles.append(self.experts.register_forward_pre_hook(self._before_experts, with_kwargs=True))
        return handles

    def _after_gate(self, _: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        logits, weights, ids = _choice(output)
        hidden = _rows(inputs[0]) if inputs and isinstance(inputs[0], torch.Tensor) else None
        self._logits, self._recorded = logits, ids is not None
        if ids is None and self.experts is None and logits is not None:
            probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
            weights, ids = probabilities.topk(self.top_k, dim=-1)
            if self.renormalise:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        if ids is not None and weights is not None:
            torch.ops.moe_native.record(ops.state, ids, weights, logits, hidden, self._binding)

    def _before_experts(self, _: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._recorded:
            return
        __, weights, ids = _choice((*inputs[1:], *named.values()))
        if ids is not None and weights is not None:
            hidden = _rows(inputs[0]) if inputs else None
            torch.ops.moe_native.record(ops.state, ids, weights, self._logits, hidden, self._binding)


class Attachment:
    """What `attach` returns. Detaching removes every hook and leaves the recorder open."""

    def __init__(
        self, model: torch.nn.Module, recorder: Recorder, blocks: list[_Block], requests: Iterable[str] | None
    ) -> None:
        self._model, self._recorder = model, recorder
        self._signature = inspect.signature(model.forward)
        self._names = itertools.chain(requests or (), (str(n) for n in itertools.count()))
        self._sequences: list[str] = []  # the requests of the batch that is under way
        self._indices: list[int] = []
        self._runs: npt.NDArray[np.void] | None = None  # of the open step; None when it is not ours
        self._tokens: npt.NDArray[np.uint32] | None = None
        self._complained = False
        config = getattr(model, "config", None)
        self._modality = "unknown" if hasattr(config, "vision_config") or hasattr(config, "audio_config") else "text"
        self._handles = [handle for block in blocks for handle in block.bind(recorder)]
        # Steps are opened and closed in Python, also around a model that is compiled.
        outside: Callable[[Any], Any] = torch.compiler.disable
        before, after = outside(self._before), outside(self._after)
        self._handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(model.register_forward_hook(after, always_call=True))
        recorder.update_metadata(**_describe(model))

    def detach(self) -> None:
        """Remove the hooks. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._finish()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # Around a forward pass. Nothing that goes wrong here may reach the model.

    def _before(self, _: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._runs = None
        try:
            self._begin(self._signature.bind_partial(*inputs, **named).arguments)
        except Exception as error:
            self._complain(error)

    def _after(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        runs, self._runs = self._runs, None
        if runs is None:
            return
        try:
            if output is None:  # the pass raised
                self._recorder.abort_step()
            else:
                self._recorder.end_step(runs, tokens=self._tokens)
        except Exception as error:
            self._recorder.abort_step()
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            log.error("moe_native: a pass of %s is not recorded: %s (said once)", type(self._model).__name__, error)

    def _begin(self, arguments: dict[str, Any]) -> None:
        # **kwargs of the model's forward come as one entry.
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        ids = arguments.get("input_ids")
        shaped = ids if ids is not None else arguments["inputs_embeds"]
        batch, length = int(shaped.shape[0]), int(shaped.shape[1])
        past = _past_length(arguments)
        real, positions = _layout(batch, length, past, arguments)
        fresh = past == 0 or len(self._sequences) != batch
        if fresh:
            self._start(batch, real.sum(1) if past == 0 else None)
        classes = row_class("prefill" if past == 0 else "decode", self._modality, True)
        rows = int(real.sum())
        requests = np.repeat(np.array(self._indices, np.uint32), length)[real.ravel()]
        runs = join_rows(requests, positions[real].astype(np.uint32), np.full(rows, classes, np.uint16))
        try:
            begun = self._recorder.begin_step(rows, None if real.all() else _spans(real.ravel()))
        except RuntimeError:
            return  # the caller has opened a step around this pass, and knows better whose rows they are
        if begun:
            self._runs = runs
            self._tokens = None if ids is None else ids.detach().cpu().numpy()[real].astype(np.uint32)

    def _start(self, batch: int, prompts: npt.NDArray[Any] | None) -> None:
        """New sequences begin; those before them have ended."""
        self._finish()
        self._sequences = list(itertools.islice(self._names, batch))
        known = [{} if prompts is None else {"prompt_len": int(prompts[row])} for row in range(batch)]
        self._indices = [
            self._recorder.request(name, **info) for name, info in zip(self._sequences, known, strict=True)
        ]

    def _finish(self) -> None:
        for name in self._sequences:
            self._recorder.finish(name)
        self._sequences = []


def _find(model: torch.nn.Module) -> Iterable[_Block]:
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
            yield _Block(name, layer, module, gate, config)


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


def _past_length(arguments: dict[str, Any]) -> int:
    """Columns of the batch that are in the cache already."""
    cache = arguments.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2])


def _layout(
    batch: int, length: int, past: int, arguments: dict[str, Any]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which places of the input hold real tokens, and their positions; both `[batch, length]`."""
    mask, given = arguments.get("attention_mask"), arguments.get("position_ids")
    positions = np.broadcast_to(np.arange(past, past + length), (batch, length))
    real = np.ones((batch, length), bool)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        whole = mask.detach().cpu().numpy() != 0
        real = whole[:, -length:]
        # Counted over the cache as well; padding on the left takes no position.
        positions = (np.cumsum(whole, axis=1) - 1)[:, -length:]
    elif isinstance(given, torch.Tensor) and given.dim() == 2:
        positions = np.broadcast_to(given.detach().cpu().numpy(), (batch, length))
    return real, positions


def _spans(real: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], real, [False])).astype(np.int8)))
    return [(int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    import transformers

    config = getattr(model, "config", None)
    parameter = next(model.parameters())
    return {
        "model": str(getattr(config, "name_or_path", "") or type(model).__name__),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {"transformers": transformers.__version__},
    }


def _first(thing: Any, *names: str) -> int:
    """The first of these attributes that is a number above 0, else 0."""
    for name in names:
        value = getattr(thing, name, 0)
        if isinstance(value, int) and value > 0:
            return value
    return 0
