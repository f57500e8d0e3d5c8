"""What a caller says to an engine's workers, and what they answer. Nothing here waits: `LLM` and `AsyncLLM` differ in
how they are asked (`moe_native.captures.call`)."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_native.captures.errors import CaptureError, NotArmedError
from moe_native.captures.regions import Column, Key, Memory
from moe_native.capturing import wanted
from moe_native.tier import Tier
from moe_native.vllm import KEY
from moe_native.vllm.plugin import forbidden

METHOD = "moe_native_capture"  #: of a worker that can be captured
_ARM = (
    "Before the engine is built, import moe_native.hidden_states, or call moe_native.arm(), or set MOE_NATIVE_CAPTURE=1"
)
_LATE = (
    "An engine that runs eagerly (enforce_eager=True) can be bound late, where it is in this process "
    "(VLLM_ENABLE_V1_MULTIPROCESSING=0) or takes functions (VLLM_ALLOW_INSECURE_SERIALIZATION=1)"
)


def not_armed(error: BaseException) -> bool:
    """Whether asking a worker failed because it does not know of captures."""
    return METHOD in str(error) and ("not implemented" in str(error) or "has no attribute" in str(error))


def built_before_arming(why: str = "") -> NotArmedError:
    """The error for an engine that cannot be bound any more."""
    reason = f" ({why})" if why else ""
    if value := forbidden():
        return NotArmedError(
            f"this engine cannot be captured{reason}: MOE_NATIVE_CAPTURE={value} forbids it, whatever moe_native.arm() "
            "says. Unset it, or set it to 1, and build the engine again"
        )
    return NotArmedError(f"this engine was built before recording was armed{reason}. {_ARM}. {_LATE}")


@dataclass(frozen=True)
class Layer:
    """A MoE layer of the model: `experts` legal ids, `top_k` of them a row."""

    layer: int
    experts: int
    top_k: int
    name: str


@dataclass(frozen=True)
class Found:
    """What a worker has of the samples: its columns, and what is known of the requests."""

    columns: Mapping[Key, Mapping[tuple[str, int], Column]]
    requests: Mapping[Key, Mapping[str, Any]]
    problem: str


class Exchange:
    """One capture of an engine.

    Args:
        fields, layers: as `moe_native.capture` takes them.

    Attributes:
        layers: those that are captured, ascending.
        missed: why the routing of other MoE layers is not seen, by layer.

    Raises:
        ValueError: a field or a layer is none.
    """

    def __init__(self, fields: Any, layers: Any) -> None:
        self._wants: Tier = wanted(fields, layers)
        self.fields = self._wants.fields
        self.layers: list[Layer] = []
        self.missed: dict[int, str] = {}
        self._token = secrets.randbits(62)
        self._memories: list[Memory | None] = []

    @property
    def name(self) -> str:
        """For requests that need a name: no other capture has it."""
        return f"capture-{self._token:x}"

    @property
    def open_arguments(self) -> tuple[tuple[str], dict[str, Any]]:
        """What every worker is called with at first."""
        layers = None if self._wants.layers is None else sorted(self._wants.layers)
        return ("open",), {"token": self._token, "fields": list(self.fields), "layers": layers}

    @property
    def close_arguments(self) -> tuple[tuple[str], dict[str, Any]]:
        """What every worker is called with at last."""
        return ("close",), {"token": self._token}

    def opened(self, replies: Sequence[Mapping[str, Any] | None]) -> None:
        """The workers' answers to the first call.

        Raises:
            CaptureError: one of them cannot capture.
            ValueError: the model lacks a layer that is asked for.
        """
        for reply in replies:
            if reply is not None and "error" in reply:
                raise CaptureError(f"this engine cannot be captured: {reply['error']}")
        here = [reply for reply in replies if reply is not None]
        if not here:
            raise CaptureError("no worker of this engine records")
        seen = {layer[0]: Layer(*layer) for reply in here for layer in reply["layers"]}
        self.missed = {layer: why for reply in here for layer, why in reply["missed"]}
        for layer in sorted(self._wants.layers or ()):
            if layer in self.missed:
                raise ValueError(f"layer {layer} cannot be captured: {self.missed[layer]}")
            if layer not in seen:
                raise ValueError(f"the model has no MoE layer {layer}; it has {_ranges(seen)}")
        self.layers = [seen[layer] for layer in sorted(seen) if self._wants.takes(layer)]
        for reply in replies:
            self._memories.append(None if reply is None else _memory(reply))

    def mark(self, params: Any, sample: int) -> Any:
        """A copy of vLLM's sampling parameters by which the workers know the request of a sample. Nothing else about it
        is changed but that it does not read the prefix cache: a cached token is not executed."""
        marked = params.clone()
        marked.extra_args = {**(params.extra_args or {}), KEY: [self._token, sample, params.n]}
        marked.skip_reading_prefix_cache = True
        return marked

    def closed(self, replies: Sequence[Mapping[str, Any] | None]) -> list[Found]:
        """What the workers answer to the last call.

        Raises:
            CaptureError: a worker has failed.
        """
        found: list[Found] = []
        for reply, memory in zip(replies, self._memories, strict=True):
            if reply is None or memory is None:
                continue
            if "error" in reply:
                raise CaptureError(f"the engine's worker could not close the capture: {reply['error']}")
            requests = {(r["sample"], r["child"]): r for r in reply["requests"]}
            found.append(Found(memory.read(reply["index_at"], reply["bytes"]), requests, reply["problem"]))
        return found

    def release(self) -> None:
        """Let the workers have their memory back, but for what is still in use."""
        for memory in self._memories:
            if memory is not None:
                memory.release()


def _memory(reply: Mapping[str, Any]) -> Memory:
    try:
        return Memory(reply["process"], reply["handle"], reply["identity"])
    except OSError as error:
        raise CaptureError(
            f"the memory of the engine's worker (process {reply['process']}) cannot be mapped here: {error}. Capture "
            "needs the engine on this machine, in the same container and under the same user"
        ) from error


def _ranges(layers: Iterable[int]) -> str:
    """Layers as a reader would write them: 0-3, 5."""
    ordered, parts = sorted(layers), list[str]()
    start = 0
    for place, layer in enumerate(ordered):
        if place + 1 == len(ordered) or ordered[place + 1] != layer + 1:
            first = ordered[start]
            parts.append(str(first) if first == layer else f"{first}-{layer}")
            start = place + 1
    return ", ".join(parts) or "none"
