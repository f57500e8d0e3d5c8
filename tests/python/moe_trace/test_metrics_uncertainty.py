"""Intervals against scipy's bootstrap and by how often they hold; tests by how often chance passes them."""

from __future__ import annotations

import numpy as np
import pytest

from moe_trace import metrics


def sample(requests, seed):
    rng = np.random.default_rng(seed)
    totals = rng.integers(5, 50, requests)
    return rng.binomial(totals, np.clip(rng.normal(0.3, 0.1, requests), 0, 1)), totals


def test_the_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy gives the numbers to compare with")
    sums, totals = sample(60, 0)
    found = metrics.bootstrap_ratio(sums, totals, resamples=20_000)
    theirs = stats.bootstrap(
        (sums, totals), lambda s, t, axis: s.sum(axis=axis) / t.sum(axis=axis), paired=True, vectorized=True,
        n_resamples=20_000, method="percentile", random_state=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert found.value == sums.sum() / totals.sum()
    assert abs(found.low - theirs.low) < 0.05 * width and abs(found.high - theirs.high) < 0.05 * width


def test_the_interval_holds_as_often_as_it_says():
    """200 samples of 80 requests from a known share: 95 % intervals miss it about 10 times. 26 is beyond 5 sigma."""
    missed = 0
    for seed in range(200):
        found = metrics.bootstrap_ratio(*sample(80, seed), resamples=400, seed=seed)
        missed += not found.low <= 0.3 <= found.high
    assert 0 < missed < 26


def test_the_same_seed_gives_the_same_whatever_is_beside_it(monkeypatch):
    sums, totals = sample(30, 2)
    both = np.stack([sums, totals - sums, 0 * sums], axis=1)
    found = metrics.bootstrap_ratio(both, totals)
    alone = metrics.bootstrap_ratio(both[:, 1], totals)
    assert found.low[1] == pytest.approx(alone.low) and found.high[1] == pytest.approx(alone.high)
    assert found.low[0] == pytest.approx(1 - found.high[1])
    assert found.value[2] == found.low[2] == found.high[2] == 0
    monkeypatch.setattr("moe_trace.metrics.uncertainty._CELLS_AT_ONCE", 100)
    again = metrics.bootstrap_ratio(both, totals)
    np.testing.assert_allclose((again.low, again.high), (found.low, found.high))
    assert metrics.bootstrap_ratio(sums, totals, seed=3).low != metrics.bootstrap_ratio(sums, totals).low


def test_totals_may_lack_the_last_axes():
    sums = np.arange(24.0).reshape(4, 2, 3)
    totals = sums.sum(axis=2)
    found = metrics.bootstrap_ratio(sums, totals)
    assert found.value.shape == found.low.shape == (2, 3)
    np.testing.assert_allclose(found.value.sum(axis=1), 1)


def test_what_has_no_interval():
    one = metrics.bootstrap_ratio([3], [4])
    assert one.value == 0.75 and np.isnan(one.low) and np.isnan(one.high)
    none = metrics.bootstrap_ratio([0, 0], [0, 0])
    assert np.isnan([none.value, none.low, none.high]).all()
    assert metrics.bootstrap_ratio([2, 0], [4, 0]).low == 0.5  # draws without any total are left out
    for bad in ({"level": 1}, {"resamples": 0}):
        with pytest.raises(ValueError, match="level"):
            metrics.bootstrap_ratio([1, 2], [3, 4], **bad)
    with pytest.raises(ValueError, match="shapes"):
        metrics.bootstrap_ratio([1, 2], [3])
    with pytest.raises(ValueError, match="finite"):
        metrics.bootstrap_ratio([1, np.nan], [3, 4])


def specialised(requests, strength, seed):
    """Counts of requests of two domains; `strength` of their tokens go to the domain's own half of the experts."""
    rng = np.random.default_rng(seed)
    labels = np.arange(requests) % 2
    own = np.repeat(np.eye(2), 4, axis=1) / 4
    p = strength * own[labels] + (1 - strength) * rng.dirichlet(np.ones(8), requests)  # each request has a taste
    return np.stack([rng.multinomial(100, of) for of in p]), labels


def test_specialisation_is_found_and_chance_is_not():
    counts, labels = specialised(40, 0.3, 0)
    found = metrics.permutation_test(counts, labels, shuffles=199)
    assert found.p == 1 / 200 and found.value > found.null.max() and found.null.shape == (199,)
    # Without it p is uniform: 100 tests at 5 % find about 5; 16 is beyond 5 sigma.
    false = [metrics.permutation_test(*specialised(20, 0, seed), shuffles=99, seed=seed).p for seed in range(1, 101)]
    assert np.mean(np.array(false) <= 0.05) < 0.16 and min(false) < 0.5 < max(false)


def test_a_statistic_of_several_figures_and_of_labels_that_all_agree():
    counts, labels = specialised(40, 0.5, 0)
    rows = np.bincount(labels) * 100
    found = metrics.permutation_test(counts, labels, lambda c: metrics.specialization(c, rows), shuffles=99)
    assert found.p.shape == (2, 8) and (found.p[0, :4] < 0.05).all() and (found.p[0, 4:] > 0.5).all()
    assert metrics.permutation_test(counts, np.zeros(40, int), shuffles=9).p == 1  # nothing to shuffle
    assert np.isnan(metrics.permutation_test(counts * 0, labels, shuffles=9).p)
    for bad in (labels[:3], labels - 1, labels * 0.5):
        with pytest.raises(ValueError, match="label"):
            metrics.permutation_test(counts, bad)
    with pytest.raises(ValueError, match="shuffles"):
        metrics.permutation_test(counts, labels, shuffles=0)


def test_an_interval_of_any_statistic_is_scipys():
    """Two sets of different requests: the difference of their imbalance."""
    stats = pytest.importorskip("scipy.stats", reason="scipy gives the numbers to compare with")
    rng = np.random.default_rng(0)
    a, b = rng.poisson(np.arange(1, 5), (50, 4)), rng.poisson(np.arange(2, 6), (70, 4))

    def statistic(x, y):
        return metrics.imbalance(y) - metrics.imbalance(x)

    def of_requests(x, y, axis):
        return statistic(a[x].sum(axis=-2), b[y].sum(axis=-2))

    found = metrics.bootstrap(statistic, a, b, resamples=20_000)
    theirs = stats.bootstrap(
        (np.arange(50), np.arange(70)), of_requests, n_resamples=20_000, method="basic", vectorized=True,
        random_state=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert found.value == statistic(a.sum(axis=0), b.sum(axis=0))
    assert abs(found.low - theirs.low) < 0.05 * width and abs(found.high - theirs.high) < 0.05 * width


def test_what_is_drawn_together_has_no_difference(monkeypatch):
    counts = np.random.default_rng(0).poisson(5, (30, 6))

    def difference(x, y):
        return metrics.shares(y) - metrics.shares(x)

    same = metrics.bootstrap(difference, counts, counts, paired=True)
    assert (same.value == 0).all() and (same.low == 0).all() and (same.high == 0).all()
    apart = metrics.bootstrap(difference, counts, counts)
    assert apart.value.shape == (6,) and (apart.low < 0).all() and (apart.high > 0).all()
    monkeypatch.setattr("moe_trace.metrics.uncertainty._CELLS_AT_ONCE", 6 * 30 * 7)
    again = metrics.bootstrap(difference, counts, counts)  # a few draws at a time: other draws, of the same sets
    np.testing.assert_allclose(again.high, apart.high, atol=0.3 * (apart.high - apart.low).max())
    assert metrics.bootstrap(difference, counts, counts, seed=1).low[0] != apart.low[0]


def test_what_has_no_interval_of_its_own():
    alone = metrics.bootstrap(metrics.gini, [[1, 2, 3]])
    assert alone.value == metrics.gini([1, 2, 3]) and np.isnan(alone.low) and np.isnan(alone.high)
    some = metrics.bootstrap(metrics.imbalance, [[0, 0], [2, 1]])  # draws without any counts are left out
    assert some.low == some.value == some.high == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="level"):
        metrics.bootstrap(metrics.gini, [[1, 2]], level=0)
    for bad in ((), (3,)):
        with pytest.raises(ValueError, match="counts of each request"):
            metrics.bootstrap(metrics.gini, *bad)
    with pytest.raises(ValueError, match="counts of each request"):
        metrics.bootstrap(metrics.total_variation, [[1, 2]], [[1, 2], [3, 4]], paired=True)
