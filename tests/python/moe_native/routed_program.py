"""A program that routes rows, and remembers what it did."""

from __future__ import annotations

import numpy as np
import torch

EXPERTS, K, LAYERS = 16, 2, 3


class Program:
    """A stand-in for a model: routes rows by a seeded generator and remembers what it did."""

    def __init__(self, recorder, layers=LAYERS):
        self.bindings = [
            recorder.bind(layer, experts=EXPERTS, top_k=K, name=f"layers.{layer}") for layer in range(layers)
        ]
        self.recorder = recorder
        self.generator = torch.Generator().manual_seed(1)
        self.ids = [[] for _ in self.bindings]

    def forward(self, rows):
        for layer, binding in enumerate(self.bindings):
            logits = torch.randn(rows, EXPERTS, generator=self.generator)
            weights, ids = logits.softmax(-1).topk(K)
            self.recorder.record(binding, ids, weights, logits)
            self.ids[layer].append(ids.numpy())

    def all_ids(self, layer):
        return np.concatenate(self.ids[layer])
