"""The load metrics against scipy, against hand-computed numbers, and against their own identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_trace import metrics

counts_arrays = hnp.arrays(
    np.int64,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=9),
    elements=st.integers(min_value=0, max_value=10**9),
)
RATIOS = (
    metrics.imbalance,
    metrics.max_violation,
    metrics.normalized_entropy,
    metrics.effective_experts,
    metrics.entropy,
    metrics.cv,
    metrics.gini,
)


def test_by_hand():
    counts = [1, 1, 2, 0]
    assert metrics.shares(counts).tolist() == [0.25, 0.25, 0.5, 0.0]
    assert metrics.imbalance(counts) == 2.0
    assert metrics.entropy(counts) == pytest.approx(1.5 * np.log(2))
    assert metrics.normalized_entropy(counts) == pytest.approx(0.75)  # 1.5 bits of 2
    assert metrics.effective_experts(counts) == pytest.approx(2**1.5)
    assert metrics.dead_experts(counts) == 1
    # sorted 0 1 1 2: 2 * (2 + 3 + 8) / (4 * 4) - 5/4
    assert metrics.gini(counts) == pytest.approx(0.375)
    assert metrics.cv(counts) == pytest.approx(np.sqrt(0.5))
    assert metrics.cv(counts, ddof=1) == pytest.approx(np.sqrt(2 / 3))
    assert metrics.top(counts, 3).tolist() == [2, 0, 1]


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy gives the numbers to compare with")
    counts = np.random.default_rng(0).zipf(1.6, size=(24, 60)) % 10_000
    np.testing.assert_allclose(metrics.entropy(counts), stats.entropy(counts, axis=-1))
    np.testing.assert_allclose(metrics.normalized_entropy(counts), stats.entropy(counts, base=60, axis=-1))
    np.testing.assert_allclose(metrics.cv(counts), stats.variation(counts, axis=-1))
    np.testing.assert_allclose(metrics.cv(counts, ddof=1), stats.variation(counts, axis=-1, ddof=1))


def test_gini_is_half_the_relative_mean_absolute_difference():
    counts = np.random.default_rng(1).integers(0, 100, size=(3, 17))
    differences = np.abs(counts[:, :, None] - counts[:, None, :]).mean(axis=(1, 2))
    np.testing.assert_allclose(metrics.gini(counts), differences / (2 * counts.mean(axis=1)))


@pytest.mark.parametrize("experts", [2, 60, 512])
def test_even_load_and_one_expert_taking_all(experts):
    even, one = np.full(experts, 7), np.eye(experts, dtype=np.int64)[experts // 2]
    assert metrics.normalized_entropy(even) == pytest.approx(1)
    assert metrics.effective_experts(even) == pytest.approx(experts)
    assert metrics.imbalance(even) == metrics.gini(even) + 1 == pytest.approx(1)
    assert metrics.normalized_entropy(one) == 0
    assert metrics.effective_experts(one) == 1
    assert metrics.imbalance(one) == experts
    assert metrics.gini(one) == pytest.approx((experts - 1) / experts)
    assert metrics.dead_experts(one) == experts - 1


def test_no_assignments_have_no_ratio():
    counts = np.array([[0, 0, 0], [1, 2, 3]])
    for metric in RATIOS:
        value = metric(counts)
        assert np.isnan(value[0]) and np.isfinite(value[1]), metric.__name__
    assert np.isnan(metrics.shares(counts)[0]).all()
    assert metrics.dead_experts(counts).tolist() == [3, 0]


def test_one_expert_has_no_normalized_entropy():
    assert np.isnan(metrics.normalized_entropy([5]))
    assert np.isnan(metrics.cv([5], ddof=1))


@settings(deadline=None)
@given(counts_arrays)
def test_leading_axes_are_kept_and_do_not_mix(counts):
    rows = counts.reshape(-1, counts.shape[-1])
    for metric in (*RATIOS, metrics.dead_experts):
        whole = metric(counts)
        assert whole.shape == counts.shape[:-1]
        np.testing.assert_array_equal(np.ravel(whole), [metric(row) for row in rows])


@settings(deadline=None)
@given(counts_arrays)
def test_bounds(counts):
    experts = counts.shape[-1]
    used = counts[counts.sum(axis=-1) > 0]
    if len(used) == 0:
        return
    assert np.allclose(metrics.shares(used).sum(axis=-1), 1)
    for metric, low, high in (
        (metrics.imbalance, 1, experts),
        (metrics.normalized_entropy, 0, 1),
        (metrics.effective_experts, 1, experts),
        (metrics.gini, 0, (experts - 1) / experts),
    ):
        value = metric(used)
        assert (value >= low - 1e-9).all() and (value <= high + 1e-9).all(), metric.__name__


@settings(deadline=None)
@given(counts_arrays, st.integers(1, 12))
def test_top_is_pythons_sort(counts, n):
    got = metrics.top(counts, n).reshape(-1, min(n, counts.shape[-1]))
    for row, experts in zip(counts.reshape(-1, counts.shape[-1]), got, strict=True):
        assert experts.tolist() == sorted(range(len(row)), key=lambda e: (-row[e], e))[:n]


def test_top_is_exact_above_two_to_the_53():
    assert metrics.top(np.array([2**60, 2**60 + 1]), 1).tolist() == [1]
    assert metrics.top(np.array([0, 2**63], dtype=np.uint64), 1).tolist() == [1]


def test_balancedness_by_hand():
    load = [[1, 3], [2, 2], [0, 0]]  # means 2, 2, 0; maxima 3, 2, 0
    assert metrics.balancedness(load, "sglang") == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.balancedness(load, "vllm") == pytest.approx(4 / 5)
    assert np.isnan(metrics.balancedness([[0, 0]], "sglang")) and np.isnan(metrics.balancedness([[0, 0]], "vllm"))
    with pytest.raises(ValueError, match="sglang"):
        metrics.balancedness(load, "mean")
    with pytest.raises(ValueError, match="layers"):
        metrics.balancedness([1, 2], "vllm")


@settings(deadline=None)
@given(counts_arrays, st.integers(0, 2**32))
def test_the_order_of_experts_does_not_matter(counts, seed):
    order = np.random.default_rng(seed).permutation(counts.shape[-1])
    for metric in (*RATIOS, metrics.dead_experts):
        np.testing.assert_allclose(metric(counts[..., order]), metric(counts), rtol=1e-9, atol=1e-12)
    if counts.ndim > 1:
        for aggregation in ("sglang", "vllm"):
            value = metrics.balancedness(counts, aggregation)
            np.testing.assert_allclose(metrics.balancedness(counts[..., order], aggregation), value, rtol=1e-9)
            some = ~np.isnan(value)
            assert (value[some] <= 1 + 1e-9).all() and (value[some] >= 1 / counts.shape[-1] - 1e-9).all()


def test_one_layer_has_one_balancedness():
    counts = np.random.default_rng(2).integers(1, 99, (5, 1, 17))
    for aggregation in ("sglang", "vllm"):
        np.testing.assert_allclose(metrics.balancedness(counts, aggregation), 1 / metrics.imbalance(counts[:, 0]))
    np.testing.assert_allclose(metrics.max_violation(counts), metrics.imbalance(counts) - 1)


@pytest.mark.parametrize("bad", [5, [], [[], []], [1, -1], [1.0, np.nan], ["a", "b"]])
def test_bad_counts_are_refused(bad):
    for function in (metrics.shares, metrics.top, metrics.gini):
        with pytest.raises(ValueError, match="counts"):
            function(bad)


def test_top_needs_a_positive_number():
    with pytest.raises(ValueError, match="positive"):
        metrics.top([1, 2], 0)
