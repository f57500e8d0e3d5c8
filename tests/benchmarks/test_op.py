"""What one call of the op costs, beside an empty op, a plain copy, and the logger that people write themselves.

Each group has the same rows: top-8 ids (int32) and weights (float32) of one layer. Compare the medians within a group:
absolute times on a shared machine vary by 5 to 10 % and more.
"""

from __future__ import annotations

import io
import itertools
import json

import pytest
import torch

import moe_native
from moe_native import ops

EXPERTS, K = 128, 8
ROWS = [1, 64, 8192]
NOBODY = -1  # a binding of no router: the op returns as soon as its arguments are unpacked


@pytest.fixture(params=ROWS, ids=lambda rows: f"{rows} rows")
def routed(request, benchmark):
    benchmark.group = f"one layer, {request.param} rows of top-{K}"
    logits = torch.randn(request.param, EXPERTS, generator=torch.Generator().manual_seed(0))
    weights, ids = torch.topk(logits.softmax(-1), K)
    return ids.to(torch.int32), weights


def rounds_for(rows):
    """Calls a round and rounds: enough calls to rise above the clock, few enough to fit in the ring."""
    return (500, 60) if rows <= 64 else (20, 60)


def test_empty_op(benchmark, routed):
    ids, weights = routed
    calls, rounds = rounds_for(len(ids))
    benchmark.pedantic(ops.record, (ids, weights, None, None, NOBODY), iterations=calls, rounds=rounds, warmup_rounds=3)


def test_record(benchmark, routed, tmp_path):
    ids, weights = routed
    rows = len(ids)
    calls, rounds = rounds_for(rows)
    with moe_native.Recorder(tmp_path / "trace", ring_bytes=256 << 20, flush_seconds=3600) as recorder:
        binding = recorder.bind(0, experts=EXPERTS, top_k=K)

        def new_step():
            recorder.abort_step()
            recorder.flush()  # empties the ring: the round measures the op, not a full ring
            assert recorder.begin_step(rows * calls)
            return (ids, weights, None, None, binding), {}

        # pedantic's setup allows one call a round, so a round loops by itself.
        def many(*arguments):
            for _ in range(calls):
                ops.record(*arguments)

        benchmark.pedantic(many, setup=new_step, rounds=rounds, warmup_rounds=3)
        assert "ring_full" not in recorder.counters()["lost"]
        recorder.abort_step()
    benchmark.extra_info["calls a round"] = calls
    scale(benchmark, calls)


def scale(benchmark, calls):
    """Turn times of a round into times of a call."""
    benchmark.stats.stats.data[:] = [seconds / calls for seconds in benchmark.stats.stats.data]


def test_plain_copy(benchmark, routed):
    """The same bytes, narrowed and copied by torch into memory that is there already, elsewhere at each call as in the
    ring."""
    ids, weights = routed
    slots = max(1, (64 << 20) // (ids.numel() * 5))
    narrow = torch.zeros(slots, *ids.shape, dtype=torch.uint8)
    copy = torch.zeros(slots, *weights.shape)
    places = itertools.cycle(zip(narrow.unbind(), copy.unbind(), strict=True))
    calls, rounds = rounds_for(len(ids))

    def both():
        narrow_to, copy_to = next(places)
        narrow_to.copy_(ids)
        copy_to.copy_(weights)

    benchmark.pedantic(both, iterations=calls, rounds=rounds, warmup_rounds=3)


def test_json_lines(benchmark, routed):
    """A line a token, as the logs of METRICS in published work have them, into memory."""
    ids, weights = routed

    def log():
        out = io.StringIO()
        for token, (row_ids, row_weights) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
            line = {
                "type": "route",
                "req_id": "0",
                "token_idx": token,
                "layer": 0,
                "topk_ids": row_ids,
                "topk_weights": [round(w, 4) for w in row_weights],
            }
            out.write(json.dumps(line) + "\n")

    benchmark.pedantic(log, iterations=1, rounds=20 if len(ids) <= 64 else 5, warmup_rounds=1)
