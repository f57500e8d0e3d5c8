"""The coverage ledger: what became of each MoE layer of the model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_trace import format as fmt
from moe_trace.units import count


@dataclass(frozen=True)
class Layer:
    """What the trace says of one MoE layer: a line of the coverage ledger.

    Attributes:
        layer: the model's own index.
        name: of the module.
        experts, top_k: as the recorder was told; 0 where it could not be.
        status: `exact`; `derived` (ids computed from logits); `missed` (not recorded, `detail` says why); `skipped`
            (not asked for).
        detail: a remark.
        every_step: whether each step has rows of it.
    """

    layer: int
    name: str
    experts: int
    top_k: int
    status: str
    detail: str
    every_step: bool = True

    @property
    def recorded(self) -> bool:
        return self.status in ("exact", "derived")


def read_ledger(metadata: dict[str, Any]) -> list[Layer]:
    """The ledger as the recorder wrote it."""
    entries = metadata.get("layers")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and _small(entry.get("layer")):
            experts, top_k = (entry[key] if _small(entry.get(key)) else 0 for key in ("experts", "top_k"))
            name, status, detail = (str(entry.get(key, "")) for key in ("name", "status", "detail"))
            every_step = entry.get("every_step") is not False
            found.append(Layer(entry["layer"], name, experts, top_k, status, detail, every_step))
    return found


def without_rows_missed(ledger: Sequence[Layer], there: Container[int], steps: int, where: str) -> list[Layer]:
    """The ledger, where a layer that is not `there`, though each of the `steps` should have rows of it, is missed,
    whatever the recorder expected."""
    detail = f"not one row in the {count(steps, 'step')} of {where}"
    return [
        replace(entry, status="missed", detail=detail)
        if entry.recorded and entry.every_step and entry.layer not in there
        else entry
        for entry in ledger
    ]


def _small(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= fmt.NO_LAYER
