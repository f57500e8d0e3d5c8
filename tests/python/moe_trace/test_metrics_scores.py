"""Scores against scipy's softmax and entropy, and against sorting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_trace import metrics

logits_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32),
)


@settings(deadline=None)
@given(logits_arrays, st.integers(0, 2**32))
def test_against_scipy(logits, seed):
    special = pytest.importorskip("scipy.special", reason="scipy gives the numbers to compare with")
    stats = pytest.importorskip("scipy.stats", reason="scipy gives the numbers to compare with")
    p = special.softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(metrics.softmax(logits), p, atol=1e-300)
    np.testing.assert_allclose(metrics.confidence(logits), p.max(axis=-1))
    np.testing.assert_allclose(metrics.router_entropy(logits), stats.entropy(p, axis=-1), atol=1e-12)
    experts = logits.shape[-1]
    order = np.random.default_rng(seed).permutation(experts)
    for k in range(1, experts):
        down = -np.sort(-logits.astype(np.float64), axis=-1)
        value = metrics.margin(logits, k)
        np.testing.assert_array_equal(value, down[..., k - 1] - down[..., k])
        np.testing.assert_array_equal(metrics.margin(logits[..., order], k), value)


def test_by_hand():
    assert metrics.confidence([0, 0, 0, 0]) == 0.25
    assert metrics.router_entropy([0, 0, 0, 0]) == pytest.approx(np.log(4))
    assert metrics.confidence([np.log(3), 0.0]) == pytest.approx(0.75)
    assert metrics.margin([5.0, 1.0, 3.0], 1) == 2 and metrics.margin([5.0, 1.0, 3.0], 2) == 2
    assert metrics.margin([5, 3, 3], 2) == 0


def test_experts_that_cannot_be_chosen():
    assert metrics.confidence([0, 0, -np.inf]) == 0.5
    assert metrics.router_entropy([0, 0, -np.inf]) == pytest.approx(np.log(2))
    assert metrics.margin([1, 0, -np.inf], 2) == np.inf


def test_what_has_no_value_is_nan():
    for bad in ([0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3):
        assert np.isnan(metrics.confidence(bad)) and np.isnan(metrics.router_entropy(bad))
        assert np.isnan(metrics.margin(bad, 1))
    assert np.isnan(metrics.margin([[1, 2], [3, 4]], 2)).tolist() == [True, True]  # nothing is left out


@pytest.mark.parametrize("k", [0, 4])
def test_bad_arguments_are_refused(k):
    with pytest.raises(ValueError, match="of 3 experts"):
        metrics.margin([1, 2, 3], k)
    with pytest.raises(ValueError, match="axis of experts"):
        metrics.confidence(5.0)
