"""The JSON lines, parsed again, against the arrays they were made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_trace.exchange import jsonl


def batch(rows, layers, k, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 60, (rows, layers, k)).astype(dtype)
    weights = rng.random((rows, layers, k)).astype(np.float16)
    names = np.array([f'r"{i % 3}\n' for i in range(rows)], dtype=object)
    return names, np.arange(rows, dtype=np.int64) + 7, ids, weights


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4), st.sampled_from([np.uint8, np.uint16]))
def test_lines_are_the_arrays(rows, layers, k, dtype):
    names, positions, ids, weights = batch(rows, layers, k, dtype)
    indices = [3 * i + 1 for i in range(layers)]
    columns = [(layer, ids[:, i], weights[:, i]) for i, layer in enumerate(indices)]
    lines = [json.loads(line) for line in jsonl.route_lines(names, positions, columns)]
    assert lines == [
        {
            "type": "route",
            "req_id": names[row],
            "token_idx": row + 7,
            "layer": layer,
            "topk_ids": ids[row, i].tolist(),
            "topk_weights": [round(float(w), 4) for w in weights[row, i]],
        }
        for row in range(rows)
        for i, layer in enumerate(indices)
    ]


def test_pieces_join(monkeypatch):
    names, positions, ids, weights = batch(100, 2, 4)
    arguments = names, positions, [(0, ids[:, 0], weights[:, 0]), (1, ids[:, 1], weights[:, 1])]
    whole = list(jsonl.route_lines(*arguments))
    monkeypatch.setattr(jsonl, "LINES_AT_ONCE", 6)
    assert list(jsonl.route_lines(*arguments)) == whole


def test_what_is_not_known_is_null():
    ids = np.array([[1, 255], [2, 3]], dtype=np.uint8)
    weights = np.array([[0.5, np.nan], [np.inf, 0.25]], dtype=np.float32)
    lines = jsonl.route_lines(np.array([None, ""], dtype=object), np.array([-1, 3]), [(4, ids, weights)])
    first, second = (json.loads(line) for line in lines)
    assert (first["req_id"], first["token_idx"]) == (None, None)
    assert (first["topk_ids"], first["topk_weights"]) == ([1, -1], [0.5, None])
    assert (second["req_id"], second["token_idx"], second["topk_weights"]) == (None, 3, [None, 0.25])
    (bare,) = jsonl.route_lines(np.array(["a"]), np.array([0]), [(4, ids[1:], None)])
    assert json.loads(bare)["topk_weights"] is None


def test_255_is_an_expert_among_uint16():
    wide, narrow = np.array([[255, 65535]], dtype=np.uint16), np.array([[255]], dtype=np.uint8)
    lines = [json.loads(line) for line in jsonl.route_lines(["a"], np.array([0]), [(0, wide, None), (1, narrow, None)])]
    assert [line["topk_ids"] for line in lines] == [[255, -1], [-1]]


@pytest.mark.parametrize(("layers", "top_k"), [({0: 4, 1: 4}, 4), ({3: 4, 9: 8}, [4, 8]), ({}, None)])
def test_meta(layers, top_k):
    metadata = {"model": "m", "device": "cpu", "seed": 1234, "versions": {"vllm": "0.32.0", "torch": "2.13.0"}}
    assert json.loads(jsonl.meta_line(metadata, layers)) == {
        "type": "meta",
        "model_id": "m",
        "vllm_version": "0.32.0",
        "torch_version": "2.13.0",
        "device": "cpu",
        "seed": 1234,
        "layers_logged": list(layers),
        "top_k": top_k,
    }
    assert set(json.loads(jsonl.meta_line({}, layers))) == set(json.loads(jsonl.meta_line(metadata, layers)))
