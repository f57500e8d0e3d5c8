"""Which layer of a model a module belongs to, from the module's name."""

from __future__ import annotations

import itertools

# The part of a name after which the layer's number stands, in the model families of vLLM and transformers.
_LAYER_LISTS = ("layers", "h", "blocks", "layer")


def layer_number(name: str, default: int) -> int:
    """The model's own layer index in a module's name, such as `model.layers.12.mlp`; else `default`."""
    parts = name.split(".")
    for before, part in itertools.pairwise(parts):
        if before in _LAYER_LISTS and part.isdigit():
            return int(part)
    return next((int(part) for part in parts if part.isdigit()), default)
