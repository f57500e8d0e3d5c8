"""Traces to export, and logs to import, for the tests of `moe_trace.exchange`."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import segment_bytes as sb
from hypothesis import strategies as st

import moe_trace


def made(path, sizes=(6, 3, 1, 4), *, layers=(0, 3), k=4, experts=60, blocks=2, meta=None, run="run-1", **more):
    """(a trace, its steps): the steps in several blocks."""
    steps, notes = sb.make_steps(sizes, layers=layers, k=k, experts=experts, **more)
    return moe_trace.open(put(path, steps, notes, blocks=blocks, k=k, experts=experts, meta=meta, run=run)), steps


def put(path, steps, notes=(), *, blocks=1, k=4, experts=60, meta=None, run="run-1"):
    layers = sorted({layer for step in steps for layer in step.layers})
    metadata = {"model": "tiny", "layers": sb.ledger(layers, k, experts), **(meta or {})}
    cuts = np.linspace(0, len(steps), blocks + 1).astype(int).tolist()
    packed = [sb.rows_block(steps[a:b], i, notes=notes) for i, (a, b) in enumerate(pairwise(cuts))]
    sb.write_rank(path / run / "rank-0", [sb.segment(packed, metadata)], metadata=metadata)
    return path


@st.composite
def traces(draw, **more):
    """Arguments of `made`."""
    experts = draw(st.sampled_from([8, 60, 255, 256, 400]))
    return {
        "sizes": draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)),
        "layers": tuple(sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=3)))),
        "k": draw(st.integers(1, 5)),
        "experts": experts,
        "blocks": 1,
        "seed": draw(st.integers(0, 1000)),
        "requests": draw(st.sampled_from([("a",), ("a", "b"), ("ü/%", 'q"\n', "c")])),
        **{key: draw(value) for key, value in more.items()},
    }


def route(request, at, layer, ids, weights=None, **more):
    line = {"type": "route", "req_id": request, "token_idx": at, "layer": layer, "topk_ids": ids}
    return line | {"topk_weights": weights} | more


def log(path, lines):
    """A file of lines: objects, or text as it is."""
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path
