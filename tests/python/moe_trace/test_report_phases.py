"""The test of prefill against decode: that it is as sure as it says."""

from __future__ import annotations

import numpy as np
import pytest

from moe_trace.report import phases
from moe_trace.report.findings import difference


def groups_of(random, shift, *, requests=20, experts=16, layers=1):
    """Requests that differ among themselves; `shift`: how much prefill and decode do. Decode is a quarter as long."""
    found = {}
    for layer in range(layers):
        base, change = random.normal(0, 1, experts), random.normal(0, shift, experts)
        tables = np.zeros((requests + 3, 2, experts), np.int64)  # some groups without a token
        for request in range(requests):
            own = random.normal(0, 0.5, experts)
            for phase, length in ((0, 200), (1, 50)):
                p = np.exp(base + own + phase * change)
                tables[request, phase] = random.multinomial(length, p / p.sum())
        found[layer] = tables
    return found


def test_a_real_difference_is_found():
    test = phases.swap_test(groups_of(np.random.default_rng(0), 1.0, layers=3))
    assert test.groups == 20 and test.layers == (0, 1, 2)
    assert (test.p <= 0.005).all()
    assert difference(test).startswith("In all 3 layers this is more than swapping")


def test_without_a_difference_it_errs_as_rarely_as_it_says():
    """At 5 % for all layers together, of 200 traces without a difference about 10 are called different."""
    random = np.random.default_rng(1)
    wrong = sum((phases.swap_test(groups_of(random, 0.0, layers=2), seed=n).p <= 0.05).any() for n in range(200))
    assert 2 <= wrong <= 21  # 99.9 % of what a binomial of 5 % gives


def test_where_only_some_layers_differ_it_says_which():
    random = np.random.default_rng(2)
    groups = {0: groups_of(random, 0.0)[0], 3: groups_of(random, 1.5)[0]}
    test = phases.swap_test(groups)
    assert test.p[0] > 0.05 >= test.p[1]
    assert difference(test).startswith("In 1 of 2 layers (3) this is more")


def test_few_requests_say_nothing():
    few = groups_of(np.random.default_rng(3), 1.0, requests=phases.FEWEST - 1)
    assert phases.swap_test(few) is None and "too few requests" in difference(None)
    assert phases.swap_test({}) is None


@pytest.mark.parametrize("layers", [1, 2])
def test_no_difference_is_said(layers):
    groups = groups_of(np.random.default_rng(5), 0.0, layers=layers)
    test = phases.swap_test({layer: table[:, [0, 0]] for layer, table in groups.items()})
    assert (test.p == 1).all() and difference(test).startswith("This is not more than")
