"""From a worker's arrays to tensors in its caller's process: captured through the ring, beside lists and bytes over a
pipe.

The worker is a process of its own that has one sample's rows of all layers, as a router or a layer would give them. The
clock runs from the caller's request until it has a tensor for each layer, and further until it has read each of them
once (`read`). Three ways:

- captured: the op copies the rows into the ring, the drain thread scatters them into memory that the caller maps;
- bytes: `tobytes()`, a pipe, `np.frombuffer(...).copy()`;
- lists: `tolist()`, a pickle through a pipe, `np.array`.

All rows come in one step; or in two chunks of the prompt and 20 decoding steps, in each of which three other requests
have rows as well. There bytes and lists put together what the steps gave first, as any caller must. The first transfer
is shown apart: its memory is new to the kernel, later ones use it again.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from medians import median

OTHERS = 3  # requests in each batch beside the sample
DECODED = 20
SHAPES = {"logits": (48, 1000, 128), "hidden": (32, 1000, 4096)}  # layers, rows, width

Array = npt.NDArray[np.float32]


def steps_of(rows: int, many: bool) -> list[tuple[int, int, int]]:
    """(first position, rows, rows of others behind them) of each step."""
    if not many:
        return [(0, rows, 0)]
    prompt = rows - DECODED
    chunks = [(0, prompt // 2, OTHERS), (prompt // 2, prompt - prompt // 2, OTHERS)]
    return chunks + [(prompt + n, 1, OTHERS) for n in range(DECODED)]


class Worker:
    """What a serving process has: for each step, an array a layer."""

    def __init__(self, field: str, shape: tuple[int, int, int], many: bool) -> None:
        import moe_native
        from moe_native.capturing import wanted

        layers, rows, width = shape
        self.field, self.layers, self.rows, self.wanted = field, layers, rows, wanted(field, None)
        random = np.random.default_rng(1)
        self.steps = steps_of(rows, many)
        self.given = [
            [torch.from_numpy(random.standard_normal((count + more, width), np.float32)) for _ in range(layers)]
            for _, count, more in self.steps
        ]
        self.ids = [torch.zeros((count + more, 1), dtype=torch.int32) for _, count, more in self.steps]
        self.weights = [torch.zeros((count + more, 1)) for _, count, more in self.steps]
        self.recorder = moe_native.Recorder(None)
        self.bindings = [self.recorder.bind(layer, experts=128, top_k=1) for layer in range(layers)]
        self.open: dict[str, int] = {}

    def begin(self) -> tuple[int, int, list[int]]:
        from moe_native.capturing import identity_of

        number, handle = self.recorder.captures.open(self.wanted)
        sample = self.recorder.request(f"{number}", prompt_len=1)
        self.recorder.captures.add(number, sample, sample=0, child=0, capacity=self.rows)
        self.recorder.captures.follow(True)
        self.open = {"number": number}
        return os.getpid(), handle, identity_of(handle)

    def captured(self) -> tuple[int, int]:
        number = self.open["number"]
        for (first, count, more), tensors, ids, weights in zip(
            self.steps, self.given, self.ids, self.weights, strict=True
        ):
            names = [f"{number}", *(f"other {n}" for n in range(more))]
            positions = [range(first, first + count), *([first] for _ in range(more))]
            with self.recorder.step(names, positions):
                for binding, tensor in zip(self.bindings, tensors, strict=True):
                    logits, hidden = (tensor, None) if self.field == "logits" else (None, tensor)
                    self.recorder.record(binding, ids, weights, logits, hidden)
        closed = self.recorder.captures.close(number)
        self.recorder.captures.follow(False)
        self.recorder.finish(f"{number}")
        return closed.index_at, closed.bytes

    def arrays(self) -> Iterator[Array]:
        """Of each layer, the sample's rows together."""
        for layer in range(self.layers):
            parts = [
                tensors[layer][:count].numpy() for (_, count, _), tensors in zip(self.steps, self.given, strict=True)
            ]
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)

    def answer(self, way: str, pipe: Connection) -> None:
        if way == "open":
            pipe.send(self.begin())
        elif way == "captured":
            pipe.send(self.captured())
        elif way == "bytes":
            for array in self.arrays():
                pipe.send_bytes(array.tobytes())
        elif way == "lists":
            for array in self.arrays():
                pipe.send(array.tolist())


def serve(pipe: Connection, field: str, shape: tuple[int, int, int], many: bool) -> None:
    torch.set_num_threads(1)
    worker = Worker(field, shape, many)
    pipe.send("ready")
    while (way := pipe.recv()) is not None:
        worker.answer(way, pipe)


class Caller:
    def __init__(self, field: str, shape: tuple[int, int, int], many: bool) -> None:
        self.field, self.shape = field, shape
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, field, shape, many))
        self._process.start()
        assert self._pipe.recv() == "ready"

    def time(self, way: str) -> tuple[dict[int, torch.Tensor], dict[str, float]]:
        """The tensors of one transfer, and seconds: until they are there, of these the caller's own part, and until
        they were read."""
        from moe_native.captures.regions import Memory

        layers, rows, width = self.shape
        start = time.perf_counter()
        if way == "captured":
            self._pipe.send("open")
            memory = Memory(*self._pipe.recv())
            self._pipe.send("captured")
            answer = self._pipe.recv()
            own = time.perf_counter()
            columns = memory.read(*answer)[0, 0]
            tensors = {layer: columns[self.field, layer].rows(0, rows) for layer in range(layers)}
        else:
            self._pipe.send(way)
            own = time.perf_counter()
            tensors = {}
            for layer in range(layers):
                if way == "bytes":
                    array = np.frombuffer(self._pipe.recv_bytes(), np.float32).reshape(rows, width).copy()
                else:
                    array = np.array(self._pipe.recv(), np.float32)
                tensors[layer] = torch.from_numpy(array)
        there = time.perf_counter()
        total = sum(float(tensor.sum()) for tensor in tensors.values())
        end = time.perf_counter()
        assert total == total
        return tensors, {"there": there - start, "own": there - own, "read": end - start}

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def measure(name: str, field: str, shape: tuple[int, int, int], many: bool, repeats: int) -> None:
    layers, rows, width = shape
    caller = Caller(field, shape, many)
    ways = ["captured", "bytes", "lists"]
    kept: dict[str, Any] = {way: caller.time(way) for way in ways}
    for layer in range(layers):
        assert torch.equal(kept["captured"][0][layer], kept["bytes"][0][layer])
    first = {way: kept[way][1]["there"] for way in ways}
    kept.clear()
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways:
            if way == "lists" and repeat > 0:
                continue  # they take so much longer than their noise
            seconds[way].append(caller.time(way)[1])
    caller.close()
    size = layers * rows * width * 4 / 1e6
    how = f"in {len(steps_of(rows, many))} steps" if many else "in one step"
    print(f"\n{layers} layers of ({rows}, {width}) {name}, {size:,.0f} MB, {how}")
    for way in ways:
        there, low, high = (1e3 * n for n in median([each["there"] for each in seconds[way]]))
        read, _, _ = (1e3 * n for n in median([each["read"] for each in seconds[way]]))
        note = ""
        if way == "captured":
            own, _, _ = median([each["own"] for each in seconds[way]])
            note = f", of these the caller's own part {own * 1e3:.2f} ms"
        print(
            f"  {way:9} {there:9.1f} ms [{low:.1f}, {high:.1f}]{note}; and read once {read:.1f} ms; "
            f"the first time {1e3 * first[way]:.1f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, help="of each layer, in place of 1,000")
    arguments = parser.parse_args()
    for field, many in itertools.product(SHAPES, (False, True)):
        layers, rows, width = SHAPES[field]
        rows = arguments.rows or rows
        name = "router logits" if field == "logits" else "hidden states"
        measure(name, field, (layers, rows, width), many, arguments.repeats)


if __name__ == "__main__":
    main()
