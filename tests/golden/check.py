"""What the golden trace holds, by formula, and a check that a reader sees exactly that: `python check.py TRACE`. Needs
no torch."""

from __future__ import annotations

import sys

import numpy as np

import moe_trace

K = 4
LAYERS = (0, 2, 5)  # layers 1, 3 and 4 are dense
EXPERTS = {0: 60, 2: 60, 5: 512}
PROMPTS = {"a": 5, "b": 3}
# Each step: (request, first position, rows). Step 3 was aborted; step 4 follows it.
STEPS = ([("a", 0, 3)], [("a", 3, 2), ("b", 0, 3)], [("b", 3, 1), ("a", 5, 3)])
LAST = ([("a", 8, 1)], 4)


def routed(step: int, layer: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int32 `[rows, K]`, weights float32 (exact in float16) and logits float32 `[rows, experts]` of one layer of a
    step."""
    row, column = np.arange(rows)[:, None], np.arange(K)
    ids = ((row * 7 + layer * 13 + step * 5 + column * 11) % EXPERTS[layer]).astype(np.int32)
    weights = ((row + column + layer + step) % 32 + 1).astype(np.float32) / 64
    logits = (np.arange(EXPERTS[layer]) * 0.5 - row - step).astype(np.float32)
    return ids, weights, logits


def tokens(step: int, rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.uint32) * 1001 + step


def main() -> None:
    trace = moe_trace.open(sys.argv[1])
    steps = [(number, sum(count for _, _, count in step)) for number, step in enumerate(STEPS)] + [(LAST[1], 1)]
    positions = [p for step in (*STEPS, LAST[0]) for _, first, count in step for p in range(first, first + count)]
    names = [name for step in (*STEPS, LAST[0]) for name, _, count in step for _ in range(count)]
    assert trace.rows == len(names), trace.rows
    for layer in LAYERS:
        one = trace.layer(layer)
        ids, weights, logits = (
            np.concatenate(parts) for parts in zip(*(routed(s, layer, n) for s, n in steps), strict=True)
        )
        assert np.array_equal(one.ids, ids), layer
        assert np.array_equal(one.weights.astype(np.float32), weights), layer
        assert np.array_equal(one.logits, logits), layer
        assert np.array_equal(one.counts(), np.bincount(ids.ravel(), minlength=EXPERTS[layer])), layer
        assert one.positions.tolist() == positions and list(one.request_ids) == names
        assert np.array_equal(one.tokens, np.concatenate([tokens(s, n) for s, n in steps]))
        prompt = np.array([p < PROMPTS[name] for p, name in zip(positions, names, strict=True)])
        assert np.array_equal(one.prefill().ids, ids[prompt]) and np.array_equal(one.decode().ids, ids[~prompt])
        assert np.array_equal(one.request("b").ids, ids[[n == "b" for n in names]])
    assert {entry.layer: entry.status for entry in trace.coverage} == {0: "exact", 2: "exact", 5: "exact", 9: "missed"}
    assert not trace.complete, "a step was aborted and a layer was missed"
    print("the golden trace is read as it was written")


if __name__ == "__main__":
    main()
