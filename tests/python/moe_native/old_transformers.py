"""A model as remote code has it: gates that are plain Linears, experts in a list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moe_native
import moe_trace
from moe_native import hf


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 300, shape, generator=torch.Generator().manual_seed(sum(shape)))


class OldBlock(torch.nn.Module):
    """As models with remote code write it: a Linear gate, and experts in a list that the block itself calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 6, bias=False)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(6)])
        self.top_k = 2

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 8)
        weights, ids = self.gate(flat).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = [
            sum(w * self.experts[int(e)](x) for w, e in zip(ws, es, strict=True))
            for x, ws, es in zip(flat, weights, ids, strict=True)
        ]
        return torch.stack(out).reshape(hidden.shape)  # type: ignore[arg-type]


class OldModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList([OldBlock(), OldBlock()])

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def old_trace(model: OldModel, directory: Path, action: Callable[[], Any], **attach: Any) -> moe_trace.Trace:
    with moe_native.Recorder(directory) as recorder, hf.attach(model, recorder, **attach), torch.no_grad():
        action()
    return moe_trace.open(directory)
