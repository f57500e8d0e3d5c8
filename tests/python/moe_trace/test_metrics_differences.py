"""Flips against sets, divergence against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from moe_trace import metrics


def test_flips_by_hand():
    a = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [255, 3]], [[0, 255], [2, 3]]], np.uint8)
    b = np.array([[[1, 0], [3, 2]], [[0, 1], [2, 4]], [[0, 1], [2, 3]], [[0, 1], [2, 4]]], np.uint8)
    np.testing.assert_array_equal(metrics.flip_rate(a, b), [[0, 0], [0, 0.5], [0, np.nan], [np.nan, 0.5]])
    assert metrics.flipped_tokens(a, b) == pytest.approx(2 / 3)  # of the third it is not known
    assert np.isnan(metrics.flipped_tokens(a[2:3], b[2:3]))
    assert metrics.flipped_tokens(np.stack([a, b]), np.stack([b, b]))[1] == 0
    with pytest.raises(ValueError, match="shapes"):
        metrics.flip_rate(a, b[:2])
    with pytest.raises(ValueError, match="tokens and layers"):
        metrics.flipped_tokens([0, 1], [0, 1])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_flips_are_of_sets_and_experts_may_be_renamed(seed, k):
    rng = np.random.default_rng(seed)
    a, b = (np.argsort(rng.random((5, 3, 6)), axis=-1)[..., :k] for _ in range(2))
    flips = metrics.flip_rate(a, b)
    for at in np.ndindex(5, 3):
        assert flips[at] == pytest.approx(1 - len(set(a[at].tolist()) & set(b[at].tolist())) / k)
    order = rng.permutation(6)
    assert np.array_equal(metrics.flip_rate(order[a], order[b]), flips)
    assert np.array_equal(metrics.flip_rate(b, a), flips)
    assert metrics.flipped_tokens(a, b) == np.mean((flips > 0).any(axis=1))


counts = hnp.arrays(np.int64, (2, 3, 5), elements=st.integers(0, 10**6))


@settings(deadline=None)
@given(counts, st.integers(0, 2**32))
def test_divergence_against_scipy(of, seed):
    distance = pytest.importorskip("scipy.spatial.distance", reason="scipy gives the numbers to compare with")
    found = metrics.js_divergence(of[0], of[1])
    for value, a, b in zip(found, of[0], of[1], strict=True):
        if a.sum() and b.sum():
            assert value == pytest.approx(distance.jensenshannon(a, b) ** 2, abs=1e-9)
            assert 0 <= value <= np.log(2) + 1e-12
        else:
            assert np.isnan(value)
    np.testing.assert_allclose(metrics.js_divergence(of[1], of[0]), found, atol=1e-15)
    order = np.random.default_rng(seed).permutation(5)
    np.testing.assert_allclose(metrics.js_divergence(*of[..., order]), found, atol=1e-12)


def test_divergence_of_what_is_known():
    assert metrics.js_divergence([1, 2], [10, 20]) == pytest.approx(0, abs=1e-15)
    assert metrics.js_divergence([1, 0], [0, 7]) == pytest.approx(np.log(2))
    assert metrics.js_divergence([[1, 0], [1, 1]], [1, 1])[1] == 0  # windows against one
    with pytest.raises(ValueError, match="same experts"):
        metrics.js_divergence([1, 2], [1, 2, 3])


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers(0, 1000))
def test_total_variation_is_a_distance(first, seed):
    second = np.random.default_rng(seed).permutation(first)
    first = np.array(first)
    found = float(metrics.total_variation(first, second))
    if not first.any():
        assert np.isnan(found)
        return
    p, q = first / first.sum(), second / second.sum()
    subsets = [sum(p[i] - q[i] for i in range(len(p)) if mask >> i & 1) for mask in range(1 << len(p))]
    assert found == pytest.approx(max(subsets), abs=1e-12)  # its other definition: the largest difference of any event
    assert found == pytest.approx(float(metrics.total_variation(second, first)))


def test_total_variation_of_nothing_in_common():
    assert metrics.total_variation([3, 0, 0], [0, 1, 5]) == 1
    assert np.isnan(metrics.total_variation([0, 0], [1, 2]))


def test_chance_distance_is_what_independent_draws_show():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(40, 2.0))
    drawn = [(stats.multinomial.rvs(900, p, random_state=random), stats.multinomial.rvs(400, p, random_state=random))
             for _ in range(300)]  # fmt: skip
    seen = np.mean([metrics.total_variation(a, b) for a, b in drawn])
    expected = np.mean([metrics.total_variation_by_chance(a, b) for a, b in drawn])
    assert expected == pytest.approx(seen, rel=0.05)
    assert np.isnan(metrics.total_variation_by_chance([0, 0], [1, 2]))
