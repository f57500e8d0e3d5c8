"""What a trace says of itself: its metadata, and in it the coverage ledger (csrc/FORMAT.md, section 6)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

import torch

import moe_trace
from moe_native.tier import Tier


class Metadata:
    """Items of JSON.

    Attributes:
        stale: whether a layer was added, or the tier changed, since `text()`.
    """

    def __init__(self, tier: Tier, weights_dtype: str, items: Mapping[str, Any]) -> None:
        self._tier = tier
        self._ledger: list[dict[str, Any]] = []
        self._standing: list[tuple[str, str]] = []  # of each line: status and detail while the layer is asked for
        self._items: dict[str, Any] = {
            "versions": {
                "moe_native": moe_trace.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "fields": list(tier.fields),
            "sample": tier.sample,
            "weights_dtype": weights_dtype,
            "layers": self._ledger,
        }
        self.stale = False
        self.merge(items)

    def merge(self, items: Mapping[str, Any]) -> None:
        """Set items; mappings are merged, one level deep.

        Raises:
            TypeError, ValueError: an item is not JSON; nothing is changed.
        """
        merged = dict(self._items)
        for key, value in items.items():
            old = merged.get(key)
            merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
        json.dumps(merged, allow_nan=False)
        self._items = merged

    def add_layer(
        self, layer: int, name: str, experts: int, top_k: int, status: str, detail: str, every_step: bool = True
    ) -> None:
        """A line of the coverage ledger."""
        line = {"layer": layer, "name": name, "experts": experts, "top_k": top_k, "status": status, "detail": detail}
        self._ledger.append(line if every_step else {**line, "every_step": False})
        self._standing.append((status, detail))
        self.tier(self._tier)

    def tier(self, tier: Tier) -> None:
        """What is stored from now on. A layer that it leaves out is skipped."""
        self._tier = tier
        self._items = {**self._items, "fields": list(tier.fields), "sample": tier.sample}
        for line, (status, detail) in zip(self._ledger, self._standing, strict=True):
            if status != "missed" and not tier.takes(line["layer"]):
                status, detail = "skipped", "not among the layers asked for"
            line["status"], line["detail"] = status, detail
        self.stale = True

    @property
    def items(self) -> dict[str, Any]:
        return self._items

    def text(self) -> str:
        """As a segment carries it."""
        self.stale = False
        return json.dumps(self._items)
