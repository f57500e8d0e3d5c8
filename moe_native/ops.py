"""The torch op `moe_native::record`, registered for CPU and Meta tensors by importing this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_native import _C

# Beside the extension module, which an editable install keeps elsewhere than this file.
_load_library: Any = torch.ops.load_library
_load_library(str(Path(_C.__file__).with_name("libmoe_native_ops.so")))

#: The tensor that the op mutates in name, so that no compiler drops, merges or moves the call. One for the process,
#: never freed: compiled graphs hold it.
state: torch.Tensor = torch.zeros(8, dtype=torch.int64)

#: The op itself, for callers that cannot spare a Python call.
op: Any = torch.ops.moe_native.record.default


def _pass_the_dispatcher() -> None:
    """Let `op` skip torch's dispatcher where it is called from Python on plain CPU tensors, from eager code or from a
    compiled graph's: with the caches full of a layer's weights the dispatcher takes 10 us, and the copy 2 us. Tracing,
    subclasses and other devices go through it as ever; so does everything in a torch that lacks what is needed here."""
    dispatched = getattr(op, "_op", None)
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if dispatched is None or exchange is None:
        return
    direct = _C.direct(dispatched, torch.Tensor, exchange)
    if direct is not None:
        op._op = direct


_pass_the_dispatcher()

#: Goes into vLLM's compile-cache key: a graph that was cached without the op, or with another schema of it, must not be
#: used.
SCHEMA_VERSION = "record-1"


def record(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    router_logits: torch.Tensor | None,
    hidden: torch.Tensor | None,
    binding: int,
) -> None:
    """Record one layer's rows of the open step; outside a step, or with a binding whose recorder is closed, do nothing.

    Args:
        topk_ids: `[rows, k]`, int32, int64, uint16 or uint32: logical expert ids.
        topk_weights: `[rows, k]`, float32, float16 or bfloat16.
        router_logits: `[rows, experts]` or None.
        hidden: `[rows, width]`, the router's input, or None.
        binding: what `Recorder.bind` returned for this router.

    Never raises for what is in the tensors: an unusable shape or dtype is a counted loss and one line in the log.
    """
    op(state, topk_ids, topk_weights, router_logits, hidden, binding)
