"""What a trace says of itself: its metadata, and in it the coverage ledger (csrc/FORMAT.md, section 6)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import moe_trace


class Metadata:
    """Items of JSON.

    Attributes:
        stale: whether a layer was added since `text()`.
    """

    def __init__(self, fields: Sequence[str], weights_dtype: str, items: Mapping[str, Any]) -> None:
        self._ledger: list[dict[str, Any]] = []
        self._items: dict[str, Any] = {
            "versions": {
                "moe_native": moe_trace.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "fields": list(fields),
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
        self.stale = True

    @property
    def items(self) -> dict[str, Any]:
        return self._items

    def text(self) -> str:
        """As a segment carries it."""
        self.stale = False
        return json.dumps(self._items)
