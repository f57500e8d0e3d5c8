"""What a token's experts have to do with others': by hand, in loops, and by drawing what chance is said to give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace import metrics


def test_the_first_choice_is_the_largest_weight_and_not_column_0():
    ids = np.array([[7, 3], [7, 3], [255, 3], [7, 255]], np.uint8)
    weights = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [0.9, 0.1]], np.float16)
    assert metrics.first_choice(ids, weights).tolist() == [3, 7, -1, 7]
    assert metrics.first_choice(ids[:1], np.array([[0.2, np.nan]])).tolist() == [-1]
    assert metrics.by_rank(ids[:1], weights[:1]).tolist() == [[3, 7]]
    with pytest.raises(ValueError, match="weight"):
        metrics.first_choice(ids, weights[:, :1])


def test_what_follows_what():
    requests = [0, 0, 0, 1, 1, -1, -1, 2, 2]
    positions = [4, 5, 7, 8, 9, 10, 11, -1, 0]
    assert np.flatnonzero(metrics.follows(requests, positions)).tolist() == [1, 4]
    assert metrics.follows([], []).tolist() == []


def test_repetition_by_hand():
    ids = np.array([[0, 1], [1, 2], [3, 4], [4, 3]])
    weights = np.array([[0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])  # first choices 1, 1, 3, 4
    every = [True] * 4
    assert metrics.repetition(ids, every) == pytest.approx(2 / 3)
    assert metrics.repetition(ids, every, "first", weights) == pytest.approx(1 / 3)
    assert metrics.repetition(ids, [True, False, True, True]) == pytest.approx(1 / 2)
    assert np.isnan(metrics.repetition(ids, [True, False, False, False]))
    with pytest.raises(ValueError, match="weights"):
        metrics.repetition(ids, every, "first")
    with pytest.raises(ValueError, match="second"):
        metrics.repetition(ids, every, "second")


def test_what_is_not_known_does_not_count_as_a_repetition():
    ids = np.array([[0, 255], [0, 255], [0, 1], [0, 1]], np.uint8)
    weights = np.array([[0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    assert metrics.repetition(ids, [True] * 4) == 1 and metrics.repetition(ids[:3], [True] * 3) != 1  # 1 pair, none
    assert np.isnan(metrics.repetition(ids[:3], [True] * 3))
    assert metrics.repetition(ids, [True] * 4, "first", weights) == 1
    assert np.isnan(metrics.repetition(ids[:2], [True] * 2, "first", weights[:2]))


def test_repetition_by_chance_is_mixtrals_and_what_draws_give():
    assert metrics.repetition_by_chance(8, 2, "first") == 0.125
    assert metrics.repetition_by_chance(8, 2) == pytest.approx(0.46, abs=0.005)  # as the paper says
    rng = np.random.default_rng(0)
    ids, weights = np.argsort(rng.random((100_000, 10)), axis=1)[:, :3], rng.random((100_000, 3))
    follows = np.ones(100_000, bool)
    five_sigma = 5 * 0.5 / np.sqrt(100_000)
    assert metrics.repetition(ids, follows) == pytest.approx(metrics.repetition_by_chance(10, 3), abs=five_sigma)
    first = metrics.repetition(ids, follows, "first", weights)
    assert first == pytest.approx(metrics.repetition_by_chance(10, 3, "first"), abs=five_sigma)
    assert metrics.repetition_by_chance(4, 3) == 1
    with pytest.raises(ValueError, match="9 of 8"):
        metrics.repetition_by_chance(8, 9)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_repetition_is_a_loop(seed, k):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((3, 12, 6)), axis=-1)[..., :k]
    ids[rng.random(ids.shape) < 0.1] = -1
    weights, follows = rng.random(ids.shape), rng.random((3, 12)) < 0.7
    for layer in range(3):
        any_, first, pairs_any, pairs_first = 0, 0, 0, 0
        for n in range(1, 12):
            now, old = set(ids[layer, n].tolist()), set(ids[layer, n - 1].tolist())
            tops = [ids[layer, m, weights[layer, m].argmax()] for m in (n, n - 1)]
            if follows[layer, n] and -1 not in now | old:
                pairs_any, any_ = pairs_any + 1, any_ + bool(now & old)
            if follows[layer, n] and -1 not in tops:
                pairs_first, first = pairs_first + 1, first + (tops[0] == tops[1])
        for value, n, of in (
            (metrics.repetition(ids, follows), any_, pairs_any),
            (metrics.repetition(ids, follows, "first", weights), first, pairs_first),
        ):
            assert value.shape == (3,)
            np.testing.assert_equal(value[layer], n / of if of else np.nan)


def test_saturation():
    early, final = np.array([[0, 1], [2, 3], [4, 255]], np.uint8), np.array([[1, 0], [3, 4], [4, 5]], np.uint8)
    assert metrics.saturation(early, final) == pytest.approx((1 + 0.5) / 2)
    assert metrics.saturation(final, final) == 1
    assert np.isnan(metrics.saturation(early[2:], final[2:]))
    assert metrics.saturation(np.stack([final, final]), np.stack([final, final + 10])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="shapes"):
        metrics.saturation(early, final[:, :1])


def test_specialization_by_hand():
    counts = metrics.counts_by_group([0, 0, 1, -1], np.array([[0, 1], [0, 2], [1, 255], [3, 2]], np.uint8), 4)
    assert counts.tolist() == [[2, 1, 1, 0], [0, 1, 0, 0]]
    share = metrics.specialization(counts, [2, 1])
    assert share.tolist() == [[1, 0.5, 0.5, 0], [0, 1, 0, 0]]
    assert metrics.vocabulary_specialization(counts, [2, 1]) == 1
    assert metrics.vocabulary_specialization(counts * 3 // 2, [6, 1], least=2) == pytest.approx(3 / 6)
    assert np.isnan(metrics.specialization([[0, 0]], [0])).all()
    assert np.isnan(metrics.vocabulary_specialization(counts, [2, 1], least=3))
    with pytest.raises(ValueError, match="group 1"):
        metrics.counts_by_group([0, 1], [[0], [0]], 4, n=1)
    with pytest.raises(ValueError, match="shapes"):
        metrics.counts_by_group([0, 1], [[0]], 4)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 30))
def test_identities_of_counts(seed, rows, cut):
    """Each token has k assignments; counts of parts add up; groups add up to the total."""
    rng = np.random.default_rng(seed)
    ids, groups = np.argsort(rng.random((rows, 7)), axis=1)[:, :3], rng.integers(0, 4, rows)
    counts = metrics.counts_by_group(groups, ids, 7, 4)
    assert np.array_equal(counts.sum(axis=1), 3 * np.bincount(groups, minlength=4))
    assert np.array_equal(counts.sum(axis=0), np.bincount(ids.ravel(), minlength=7))
    parts = (metrics.counts_by_group(groups[part], ids[part], 7, 4) for part in (slice(cut), slice(cut, None)))
    assert np.array_equal(sum(parts), counts)
    share = metrics.specialization(counts, np.bincount(groups, minlength=4))
    some = np.isin(range(4), groups)
    assert np.allclose(share[some].sum(axis=1), 3) and np.isnan(share[~some]).all()


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30))
def test_distinct_experts_are_the_sizes_of_sets(seed, rows):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((rows, 9)), axis=1)[:, :2].astype(np.uint16)
    ids[rng.random(ids.shape) < 0.2] = 65535
    steps = rng.integers(0, 5, rows)
    labels, sizes, distinct = metrics.distinct_experts(ids, steps, 9)
    assert labels.tolist() == sorted(set(steps.tolist()))
    for label, size, n in zip(labels, sizes, distinct, strict=True):
        mine = ids[steps == label]
        assert size == len(mine) and n == len(set(mine.ravel().tolist()) - {65535})


def test_distinct_by_chance_is_what_draws_give():
    assert metrics.distinct_by_chance(10, 3, [0, 1]).tolist() == pytest.approx([0, 3])
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((4000 * 5, 20)), axis=1)[:, :4]
    _, sizes, distinct = metrics.distinct_experts(ids, np.repeat(range(4000), 5), 20)
    assert (sizes == 5).all()
    error = 5 * distinct.std() / np.sqrt(4000)
    assert distinct.mean() == pytest.approx(float(metrics.distinct_by_chance(20, 4, 5)), abs=error)


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_overlap_is_the_size_of_the_intersection(seed):
    rng = np.random.default_rng(seed)
    a = np.argsort(rng.random((8, 9)), axis=1)[:, :3].astype(np.uint8)
    b = np.argsort(rng.random((8, 9)), axis=1)[:, :4]
    a[rng.random(a.shape) < 0.1] = 255
    for x, y, shared in zip(a.tolist(), b.tolist(), metrics.overlap(a, b), strict=True):
        np.testing.assert_equal(shared, np.nan if 255 in x else len(set(x) & set(y)))
    np.testing.assert_array_equal(metrics.overlap(b, a), metrics.overlap(a, b))
