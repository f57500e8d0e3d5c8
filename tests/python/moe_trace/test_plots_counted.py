"""Pairs against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import segment_bytes as sb
import skewed

import moe_trace
from moe_trace.plots import counted


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return moe_trace.open(skewed.write(tmp_path_factory.mktemp("counted") / "t", experts=12, k=3, layers=[2, 5]))


def test_pairs_are_counted(trace):
    ids = trace.layer(2).ids.astype(int)
    expected = np.zeros((12, 12), int)
    for row in ids:
        for i, j in combinations(row, 2):
            expected[i, j] += 1
            expected[j, i] += 1
        expected[row, row] += 1
    found, left_out = counted.pairs(trace, 2, 14)
    np.testing.assert_array_equal(found, np.pad(expected, (0, 2)))
    assert left_out == []


def test_invalid_ids_are_in_no_pair(tmp_path):
    ids = np.array([[0, 1, 255], [255, 255, 2], [0, 2, 1]], np.uint8)
    step = sb.Step(0, [(0, 0, 3, sb.PREFILL, 0)], {0: {"ids": ids}})
    metadata = {"layers": sb.ledger([0], 3, 4)}
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([sb.rows_block([step])], metadata)])
    found, _ = counted.pairs(moe_trace.open(tmp_path), 0, 4)
    assert found.tolist() == [[2, 2, 1, 0], [2, 2, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0]]


def test_pairs_of_a_sample_say_nothing_of_what_is_not_stored(tmp_path):
    steps, notes = sb.make_steps([20, 20], layers=[0])
    block = sb.sampled_block(steps, {0}, notes=notes)
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([block], {"layers": sb.ledger([0])})])
    trace = moe_trace.open(tmp_path)
    assert trace.executed_rows > trace.stored_rows > 0
    found, left_out = counted.pairs(trace, 0, 60)
    assert np.trace(found) == 4 * trace.stored_rows and left_out == []
