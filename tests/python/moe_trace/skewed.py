"""Traces with skewed random routing: some experts are favoured, others dead, prompts and generation differ, favour
moves over time, and some pairs of experts go together. What pictures and the report are tried on.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import segment_bytes as sb

from moe_trace import format as fmt
from moe_trace.writer import SegmentWriter

NS = 1_800_000_000_000_000_000


def write(
    path: Path,
    *,
    experts=60,
    layers=(0, 1, 2, 3),
    k=4,
    requests=12,
    prompt=40,
    generated=20,
    seed=0,
    image=False,
    dead=2,
    metadata=None,
    losses=(),
    seconds=1.0,
):
    """A trace of one rank. Each request is a step for its prompt; then all generate together, a row each in a step.

    image: the middle third of each prompt is an image's; dead: how many experts of each layer are never chosen.
    """
    rng = np.random.default_rng(seed)
    layers = list(layers)
    runs, steps = [], []
    for request in range(requests):
        parts = [(0, prompt, 1)]
        if image:
            parts = [
                (0, prompt // 3, 1),
                (prompt // 3, prompt // 3, 2),
                (2 * (prompt // 3), prompt - 2 * (prompt // 3), 1),
            ]
        runs += [(request, first, count, sb.cls(1, modality), 0) for first, count, modality in parts]
        steps.append((len(steps), NS + int(len(steps) * seconds * 1e9), prompt, len(parts), 0))
    for token in range(generated):
        runs += [(request, prompt + token, 1, sb.DECODE, 0) for request in range(requests)]
        steps.append((len(steps), NS + int(len(steps) * seconds * 1e9), requests, requests, 0))
    runs = np.array(runs, fmt.TABLES[fmt.RUNS])
    steps = np.array(steps, fmt.TABLES[fmt.STEPS])
    classes = np.repeat(runs["cls"], runs["count"])
    when = np.repeat(np.linspace(0, 1, len(steps)), steps["rows"])
    rows = len(classes)
    columns = {}
    for layer in layers:
        base = -np.log(np.arange(1, experts + 1)) * rng.uniform(0.1, 0.9)
        base = base[rng.permutation(experts)]
        drift, decode, sight = (rng.normal(0, scale, experts) for scale in (0.4, 0.5, 0.8))
        scores = base + np.outer(when, drift) + np.outer(classes & 3 == 2, decode)
        scores += np.outer(classes >> 2 & 15 == 2, sight)
        friends = rng.permutation(experts)[: experts // 8 * 2].reshape(2, -1)
        shared = rng.normal(0, 1.2, (rows, friends.shape[1]))
        scores[:, friends[0]] += shared
        scores[:, friends[1]] += shared
        scores[:, rng.permutation(experts)[:dead]] = -1e9
        noisy = scores + rng.gumbel(size=(rows, experts))
        ids = np.argpartition(-noisy, k - 1, axis=1)[:, :k]
        ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(noisy, ids, 1), axis=1), 1)
        top = np.take_along_axis(scores, ids, 1)
        top = np.exp(top - top.max(axis=1, keepdims=True))
        columns[fmt.IDS, layer] = ids.astype(np.uint8 if experts <= 255 else np.uint16)
        columns[fmt.WEIGHTS, layer] = (top / top.sum(axis=1, keepdims=True)).astype(np.float16)
    metadata = {
        "model": f"made-up {experts}x{len(layers)}",
        "versions": {"vllm": "0.32.0"},
        "fields": ["ids", "weights"],
        "layers": sb.ledger(layers, k, experts),
        **(metadata or {}),
    }
    notes = [{"type": "request", "index": i, "id": f"chat-{i}", "prompt_len": prompt} for i in range(requests)]
    rank = path / "run-20270115T080000Z-1" / "rank-0"
    rank.mkdir(parents=True)
    writer = SegmentWriter(rank, metadata=metadata)
    half = len(steps) // 2  # two blocks
    at_run, at_row = int(steps["runs"][:half].sum()), int(steps["rows"][:half].sum())
    lost = np.array(list(losses), fmt.TABLES[fmt.LOSSES])
    for part, of_runs, of_rows, said in (
        (steps[:half], runs[:at_run], slice(0, at_row), notes),
        (steps[half:], runs[at_run:], slice(at_row, rows), ()),
    ):
        writer.add({key: v[of_rows] for key, v in columns.items()}, part, of_runs, notes=said, losses=lost)
    writer.close()
    head = {"format": "moe-native rank", "version": 1, "run_id": "0" * 32, "rank": "rank-0", "owner": sb.dead_owner()}
    (rank / "rank.json").write_text(json.dumps({**head, "ring": None, "closed": True, "metadata": metadata}))
    return path
