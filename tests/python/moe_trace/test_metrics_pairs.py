"""Pairs of experts against counting by hand and in loops, and mutual information against scipy's entropies."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace import metrics
from moe_trace.metrics import arrays


@st.composite
def routed(draw, layers=1):
    """(ids of each layer, uint8 `[N, k]` with no expert twice in a row and some invalid ones; experts)."""
    experts, rows = draw(st.integers(2, 9)), draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(layers):
        k = draw(st.integers(1, min(experts, 4)))
        ids = np.argsort(rng.random((rows, experts)), axis=1)[:, :k].astype(np.uint8)
        ids[rng.random(ids.shape) < draw(st.sampled_from((0.0, 0.2)))] = 255
        found.append(ids)
    return found, experts


def test_coactivation_by_hand():
    ids = np.array([[0, 1], [1, 0], [0, 2], [255, 2]], np.uint8)
    joint = metrics.coactivation_counts(ids, 4)
    assert joint.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    share = metrics.coactivation(joint)
    assert share[0].tolist() == [1, 2 / 3, 1 / 3, 0] and share[1].tolist() == [1, 1, 0, 0]
    assert np.isnan(share[3]).all()


def test_adjacent_ranks_are_those_of_the_weights():
    ids, weights = np.array([[4, 2, 3]]), np.array([[0.2, 0.5, 0.3]])  # by rank: 2, 3, 4
    joint = metrics.adjacent_counts(ids, weights, 5)
    pairs = {(i, j) for i, j in np.argwhere(joint) if i < j}
    assert pairs == {(2, 3), (3, 4)} and np.diagonal(joint).tolist() == [0, 0, 1, 1, 1]
    assert {(i, j) for i, j in np.argwhere(metrics.coactivation_counts(ids, 5)) if i < j} == {(2, 3), (3, 4), (2, 4)}
    with pytest.raises(ValueError, match="weight"):
        metrics.adjacent_counts(ids, weights[:, :2], 5)


def test_transition_by_hand():
    joint = metrics.transition_counts([[0], [0], [1], [0]], [[1], [2], [0], [1]], 3)
    assert joint.tolist() == [[0, 2, 1], [1, 0, 0], [0, 0, 0]]
    assert metrics.transition(joint)[0].tolist() == [0, 2 / 3, 1 / 3]
    assert np.isnan(metrics.transition(joint)[2]).all()


def test_layers_of_different_widths_and_numbers_of_experts():
    joint = metrics.transition_counts([[0, 1]], np.array([[4, 2, 255]], np.uint8), 2, 5)
    assert joint.shape == (2, 5) and joint.tolist() == [[0, 0, 1, 0, 1]] * 2


@settings(deadline=None)
@given(routed())
def test_coactivation_is_counting_in_a_loop(case):
    (ids,), experts = case
    expected = np.zeros((experts, experts), int)
    for row in ids.tolist():
        for i, j in product([e for e in row if e != 255], repeat=2):
            expected[i, j] += 1
    joint = metrics.coactivation_counts(ids, experts)
    assert np.array_equal(joint, expected)
    if (ids != 255).all():  # each expert of a row has k in its row, itself included
        assert np.array_equal(joint.sum(axis=1), ids.shape[1] * np.diagonal(joint))
        assert np.diagonal(joint).sum() == ids.size


@settings(deadline=None)
@given(routed(layers=2))
def test_transition_is_counting_in_a_loop(case):
    (a, b), experts = case
    expected = np.zeros((experts, experts), int)
    for of_a, of_b in zip(a.tolist(), b.tolist(), strict=True):
        for i, j in product(of_a, of_b):
            if i != 255 and j != 255:
                expected[i, j] += 1
    joint = metrics.transition_counts(a, b, experts)
    assert np.array_equal(joint, expected)
    assert np.array_equal(metrics.transition_counts(b, a, experts), joint.T)
    sums = metrics.transition(joint).sum(axis=1)
    assert np.allclose(sums[joint.sum(axis=1) > 0], 1) and np.isnan(sums[joint.sum(axis=1) == 0]).all()


@settings(deadline=None)
@given(routed(layers=2), st.integers(0, 12), st.integers(0, 2**32))
def test_parts_add_up_and_experts_may_be_renamed(case, cut, seed):
    (a, b), experts = case
    for count in (
        lambda rows: metrics.coactivation_counts(a[rows], experts),
        lambda rows: metrics.transition_counts(a[rows], b[rows], experts),
    ):
        assert np.array_equal(count(slice(cut)) + count(slice(cut, None)), count(slice(None)))
    order = np.random.default_rng(seed).permutation(experts).astype(np.uint8)
    new_a, new_b = (np.where(ids == 255, 255, order[np.minimum(ids, experts - 1)]).astype(np.uint8) for ids in (a, b))
    joint, renamed = (metrics.transition_counts(x, y, experts) for x, y in ((a, b), (new_a, new_b)))
    assert np.array_equal(renamed[np.ix_(order, order)], joint)
    np.testing.assert_allclose(metrics.mutual_information(renamed), metrics.mutual_information(joint), atol=1e-12)


def test_leading_axes_are_kept_and_counting_in_pieces_is_counting(monkeypatch):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2, 3, 50, 16)), axis=-1)[..., :4]
    whole = metrics.coactivation_counts(ids, 16)
    assert whole.shape == (2, 3, 16, 16)
    monkeypatch.setattr("moe_trace.metrics.pairs.PAIRS_AT_ONCE", 20)
    for at in np.ndindex(2, 3):
        assert np.array_equal(metrics.coactivation_counts(ids[at], 16), whole[at])
    weights = rng.random(ids.shape)
    near = metrics.adjacent_counts(ids, weights, 16)
    by_rank = metrics.by_rank(ids, weights)
    expected = np.zeros_like(near)
    for at in np.ndindex(2, 3, 50):
        for i, j in combinations(range(4), 2):
            if j == i + 1:
                pair = by_rank[at][[i, j]]
                expected[at[:2]][tuple(pair)] += 1
                expected[at[:2]][tuple(pair[::-1])] += 1
        for e in ids[at]:
            expected[at[:2]][e, e] += 1
    assert np.array_equal(near, expected)


def test_mutual_information_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy gives the numbers to compare with")
    joint = np.random.default_rng(1).integers(0, 9, (4, 6, 7))
    expected = [stats.entropy(c.sum(axis=1)) + stats.entropy(c.sum(axis=0)) - stats.entropy(c.ravel()) for c in joint]
    np.testing.assert_allclose(metrics.mutual_information(joint), expected)


def test_mutual_information_of_what_is_known():
    assert metrics.mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    assert metrics.mutual_information(np.eye(8) * 5) == pytest.approx(np.log(8))
    assert np.isnan(metrics.mutual_information(np.zeros((3, 3))))


@pytest.mark.parametrize(
    ("ids", "why"), [([[0, 4]], "an id 4"), ([0, 1], "axes of rows"), ([[0.5]], "integers"), (3, "axis")]
)
def test_bad_ids_are_refused(ids, why):
    with pytest.raises(ValueError, match=why):
        metrics.coactivation_counts(ids, 4)


def test_the_mark_of_an_invalid_id_is_of_its_dtype():
    assert metrics.valid(np.array([254, 255], np.uint8)).tolist() == [True, False]
    assert metrics.valid(np.array([255, 65535], np.uint16)).tolist() == [True, False]
    assert metrics.valid([255, -1]).tolist() == [True, False]
    assert arrays.legal(np.array([3, 65535], np.uint16), 300).tolist() == [3, 300]
    with pytest.raises(ValueError, match="255"):
        arrays.legal(np.array([255], np.uint16), 60)
    with pytest.raises(ValueError, match="same tokens"):
        metrics.transition_counts([[0]], [[0], [1]], 3)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.integers(2, 4))
def test_expected_pairs_have_the_sums_and_the_form_of_independence(seed, experts, k):
    k = min(k, experts - 1)
    random = np.random.default_rng(seed)
    favour = random.uniform(0.5, 2, experts)
    ids = np.argsort(-favour - random.gumbel(size=(300, experts)), axis=1)[:, :k]
    seen = np.zeros((experts, experts))
    for i in range(k):
        for j in range(k):
            np.add.at(seen, (ids[:, i], ids[:, j]), 1)
    expected = metrics.coactivation_by_chance(seen)
    off = seen - np.diag(np.diag(seen))
    np.testing.assert_allclose(expected.sum(axis=0), off.sum(axis=0), rtol=1e-4, atol=1e-4)
    a = metrics.pair_factors(seen)
    assert (np.diag(expected) == 0).all() and np.allclose(expected, np.outer(a, a) * (1 - np.eye(experts)))
    order = random.permutation(experts)
    shuffled = metrics.coactivation_by_chance(seen[np.ix_(order, order)])
    np.testing.assert_allclose(shuffled, expected[np.ix_(order, order)], rtol=1e-5, atol=1e-6)


def test_a_uniform_router_chooses_pairs_as_often_as_expected():
    """N_i N_j / N would be wrong here: a token never chooses an expert twice."""
    ids = np.array(list(combinations(range(6), 2)))  # each pair once
    seen = np.zeros((6, 6))
    np.add.at(seen, (ids[:, 0], ids[:, 1]), 1)
    seen += seen.T + np.diag(np.full(6, 5))
    lift = metrics.lift(seen, metrics.coactivation_by_chance(seen))
    np.testing.assert_allclose(lift[~np.eye(6, dtype=bool)], 1, rtol=1e-6)
    assert np.isnan(np.diag(lift)).all()


def test_experts_that_nobody_chooses_have_no_lift():
    lift = metrics.lift(np.zeros((3, 3)), metrics.coactivation_by_chance(np.zeros((3, 3))))
    assert np.isnan(lift).all()
