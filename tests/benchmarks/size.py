"""How many bytes a row takes in a trace, beside JSON lines of the same rows."""

from __future__ import annotations

import io
import tempfile

import torch

import moe_native
import moe_trace
from moe_trace.exchange import jsonl

LAYERS, EXPERTS, K, STEPS, ROWS = 24, 60, 4, 100, 256


def skewed_router(layer: int) -> torch.Tensor:
    """A bias per expert, so that some are used several times as often as others, as in trained models."""
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(layer)) * 0.7


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    biases = [skewed_router(layer) for layer in range(LAYERS)]
    with tempfile.TemporaryDirectory() as directory:
        with moe_native.Recorder(directory, overflow="block") as recorder:
            bindings = [recorder.bind(layer, experts=EXPERTS, top_k=K) for layer in range(LAYERS)]
            for step in range(STEPS):
                with recorder.step(requests=["r"], positions=[range(step * ROWS, (step + 1) * ROWS)]):
                    for bias, binding in zip(biases, bindings, strict=True):
                        logits = torch.randn(ROWS, EXPERTS, generator=generator) + bias
                        weights, ids = torch.topk(logits.softmax(-1), K)
                        recorder.record(binding, ids, weights)
        counters = recorder.counters()
        trace = moe_trace.open(directory)
        text = io.StringIO()
        for lines, _ in jsonl.jsonl(trace, trace.steps(0, 4), problems=[]):
            text.write(lines)
        rows = STEPS * ROWS * LAYERS
        ours = counters["stored_bytes"] / rows
        lines = len(text.getvalue()) / (4 * ROWS * LAYERS)
        print(f"\nrows of top-{K} of {EXPERTS} experts, ids and float16 weights, {rows:,} of them (tokens x layers)")
        print(f"  trace       {ours:8.2f} bytes a row")
        print(f"  JSON lines  {lines:8.2f} bytes a row ({lines / ours:.1f} times as much)")
        print(
            f"  drain thread {counters['raw_bytes'] / counters['drain_cpu_seconds'] / 1e6:,.0f} MB of ring a CPU second"
        )


if __name__ == "__main__":
    main()
