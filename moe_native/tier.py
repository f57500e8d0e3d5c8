"""How much is stored of what is executed: which fields, which layers, and of which share of requests. All rows are
counted in any case."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from moe_native.config import COUNTS, FIELDS

_BITS = {name: 1 << bit for bit, name in enumerate(FIELDS)}  # csrc/core/step_recorder.h


@dataclass(frozen=True)
class Tier:
    """What a recorder stores from some step on.

    Attributes:
        fields: names of columns, or `("counts",)` for no row at all.
        layers: the model's own indices; None for all.
        sample: the share of requests whose rows are stored, 0 to 1.
    """

    fields: tuple[str, ...]
    layers: frozenset[int] | None = None
    sample: float = 1.0

    @staticmethod
    def layer_set(layers: Iterable[int] | None) -> frozenset[int] | None:
        """`layers` from a list of them."""
        return None if layers is None else frozenset(layers)

    @property
    def counted(self) -> bool:
        """Whether no row is stored."""
        return self.fields == COUNTS or self.sample == 0

    @property
    def bits(self) -> int:
        """The fields that go through the ring."""
        return sum(_BITS[name] for name in (("ids", "weights") if self.fields == COUNTS else self.fields))

    def takes(self, layer: int) -> bool:
        """Whether a layer is recorded."""
        return self.layers is None or layer in self.layers

    def keeps(self, request: str) -> bool:
        """Whether the rows of a request are stored. The same in every process and at any time: it follows from the
        name."""
        if self.counted or self.sample >= 1:
            return not self.counted
        digest = hashlib.blake2b(request.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.sample * 2**64
