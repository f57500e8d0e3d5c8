"""Makes the golden trace: `python make.py` writes `trace/`, in the format of the day, by the C++ recorder.

The files are committed, so that every later reader is held to what was written once. Make them anew only when the
format's version changes, beside the old ones. What is in them is given by the formulas of check.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import check
import torch

import moe_native


def main() -> None:
    path = Path(__file__).with_name("trace")
    shutil.rmtree(path, ignore_errors=True)
    metadata = {"model": "golden", "device": "cpu", "dtype": "float32", "seed": 1}
    with moe_native.Recorder(
        path, fields=["ids", "weights", "logits", "tokens"], metadata=metadata, run="run-golden"
    ) as recorder:
        bindings = [
            recorder.bind(layer, experts=check.EXPERTS[layer], top_k=check.K, name=f"layers.{layer}")
            for layer in check.LAYERS
        ]
        recorder.miss(9, name="layers.9", detail="its kernel hides the routing")
        for number, step in enumerate(check.STEPS):
            names = [name for name, _, _ in step]
            positions = [range(first, first + count) for _, first, count in step]
            rows = sum(count for _, _, count in step)
            with recorder.step(
                names, positions, prompt_lens=check.PROMPTS, tokens=check.tokens(number, rows), modality="text"
            ):
                for layer, binding in zip(check.LAYERS, bindings, strict=True):
                    ids, weights, logits = check.routed(number, layer, rows)
                    recorder.record(binding, torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(logits))
            if number == 1:
                recorder.flush()  # a second block
        recorder.amend(2, 0, 1, ["rejected"])
        try:
            with recorder.step(rows=3):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        with recorder.step(["a"], [[8]], prompt_lens=check.PROMPTS, tokens=check.tokens(4, 1), modality="text"):
            for layer, binding in zip(check.LAYERS, bindings, strict=True):
                recorder.record(binding, *(torch.from_numpy(x) for x in check.routed(4, layer, 1)))


if __name__ == "__main__":
    main()
