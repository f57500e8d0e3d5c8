"""A program whose rows are known beforehand, and captures of it that are read in its own process."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import moe_native
from moe_native.captures.regions import Column, Key, Memory
from moe_native.capturing import identity_of, wanted

ALL = ("ids", "weights", "logits", "hidden")
MOST = 1 << 12  # positions of a request
HIDDEN = 12

Part = tuple[str, Iterable[int]] | tuple[str, Iterable[int], int]  # request, positions, how often they were executed


class Model:
    """A stand-in for a model: what a row is follows from its layer, request and position, and from how often it was
    executed before."""

    def __init__(
        self,
        recorder: moe_native.Recorder,
        layers: Sequence[int] = (0, 1, 2),
        *,
        experts: int = 16,
        k: int = 2,
        weights: torch.dtype = torch.float32,
        logits: torch.dtype = torch.bfloat16,
        hidden: torch.dtype = torch.float16,
    ) -> None:
        self.recorder = recorder
        self.layers = list(layers)
        self.experts, self.k = experts, k
        self.dtypes = {"weights": weights, "logits": logits, "hidden": hidden}
        self.bindings = {layer: self.bind(layer) for layer in layers}
        self._tables: dict[tuple[int, str, int], dict[str, torch.Tensor]] = {}

    def bind(self, layer: int) -> int:
        return self.recorder.bind(layer, experts=self.experts, top_k=self.k, name=f"layers.{layer}")

    def rows(self, field: str, layer: int, request: str, positions: Iterable[int], again: int = 0) -> torch.Tensor:
        """`[positions, width]` as the router gives them."""
        key = layer, request, again
        if key not in self._tables:
            random = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
            logits = torch.randn(MOST, self.experts, generator=random)
            weights, ids = logits.softmax(-1).topk(self.k)
            hidden = torch.randn(MOST, HIDDEN, generator=random)
            columns = {"weights": weights, "logits": logits, "hidden": hidden}
            self._tables[key] = {"ids": ids, **{name: c.to(self.dtypes[name]) for name, c in columns.items()}}
        return self._tables[key][field][list(positions)]

    def forward(self, batch: Sequence[Part], padding: int = 0, kept: slice = slice(None)) -> None:
        """The routers of all layers, over what is in the batch: of its rows those that are `kept`."""
        for layer in self.layers:
            columns = []
            for field in ALL:
                column = torch.cat([self.rows(field, layer, *part) for part in batch])[kept]
                columns.append(torch.cat([column, column[:1].expand(padding, -1)]) if padding else column)
            self.recorder.record(self.bindings[layer], *columns)

    def step(self, *batch: Part, prompts: dict[str, int] | None = None, padding: int = 0) -> bool:
        """A step of the recorder, which tells captures early whose rows it has. Whether it was recorded."""
        names, positions = [part[0] for part in batch], [part[1] for part in batch]
        with self.recorder.step(requests=names, positions=positions, prompt_lens=prompts) as recorded:
            self.forward(batch, padding)
        return recorded

    def has(
        self,
        columns: dict[tuple[str, int], Column],
        request: str,
        positions: Sequence[int],
        *,
        fields: Sequence[str] = ALL,
        layers: Sequence[int] | None = None,
        again: int = 0,
    ) -> bool:
        """Whether a capture's columns are these fields and layers and no others, and have exactly these rows of the
        request at `positions`, which follow each other. Else an assertion says what is wrong."""
        layers = self.layers if layers is None else layers
        assert set(columns) == {(field, layer) for field in fields for layer in layers}
        first, end = positions[0], positions[-1] + 1
        for (field, layer), column in columns.items():
            rows = column.rows(first, end)
            expected = self.rows(field, layer, request, positions, again)
            if field == "ids":
                assert rows.dtype == (torch.uint8 if self.experts < 256 else torch.int16)
                expected = expected.to(rows.dtype)
            assert rows.dtype == expected.dtype and torch.equal(rows, expected), (field, layer, request)
        return True


class Captured:
    """A capture of a recorder, whose caller is this process."""

    def __init__(self, recorder: moe_native.Recorder, fields: Any = ALL, layers: Any = None) -> None:
        self.recorder = recorder
        self.number, self.handle = recorder.captures.open(wanted(fields, layers))
        self.memory = Memory(os.getpid(), self.handle, identity_of(self.handle))

    def add(self, request: str, *, sample: int = 0, child: int = 0, capacity: int = 64) -> Captured:
        index = self.recorder.request(request)
        assert self.recorder.captures.add(self.number, index, sample=sample, child=child, capacity=capacity)
        self.recorder.captures.follow(True)
        return self

    def close(self, problem: str = "") -> dict[Key, dict[tuple[str, int], Column]]:
        closed = self.recorder.captures.close(self.number)
        assert closed.problem == problem
        return self.memory.read(closed.index_at, closed.bytes)


def spans(columns: dict[tuple[str, int], Column]) -> tuple[tuple[int, int], ...]:
    """The positions that a request has rows of."""
    (found,) = {column.spans for column in columns.values()}
    return found


PROMPTS = {"a": 5, "b": 7, "other": 3}


def serve(model: Model) -> None:
    """Two requests that are prefilled in chunks and decode, a third one, and rows that are nobody's."""
    model.step(("a", range(5)), ("other", range(3)), ("b", range(4)), prompts=PROMPTS, padding=4)
    model.step(("b", range(4, 7)), ("a", [5]), ("other", [3]), prompts=PROMPTS)
    with model.recorder.step(rows=2):
        model.forward([("nobody", range(2))])
    for i in range(3):
        model.step(("b", [7 + i]), ("other", [4 + i]), ("a", [6 + i]))
