"""Which lines are of one row: against a search that follows the rule word by word."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_trace.exchange import spool as module
from moe_trace.exchange.lines import Malformed, Route
from moe_trace.exchange.spool import Spool

PAIRS = st.tuples(st.sampled_from([None, "a", "b"]), st.integers(-1, 2))


def fill(directory, lines, flush_every=1000):
    """A spool of lines (layer, (request, token_idx)); None is a line that was skipped. The number of a line is its
    expert, so that it can be found again.
    """
    spool = Spool(directory)
    for number, line in enumerate(lines):
        if line is None:
            spool.skipped()
        else:
            layer, (request, at) = line
            spool.add(number, Route(None, request, at, layer, [number], None))
        if number % flush_every == 0:
            spool.flush()
    spool.flush()
    return spool


def rows_of(spool, at_once=1000, unique=False):
    """Each row as {layer: number of its line}."""
    found = []
    for records in spool.rows(at_once, unique):
        assert len({len(of) for of in records.values()}) == 1 and 0 < len(next(iter(records.values()))) <= at_once
        for row in range(len(next(iter(records.values())))):
            found.append({layer: int(of["ids"][row, 0]) for layer, of in records.items()})
    return found


def by_the_rule(lines):
    """The n-th line of a pair goes with the n-th of the others; where a layer has the pair less often, none does."""
    rows, alone = {}, []
    often = {}
    for layer, pair in lines:
        often.setdefault(pair, {}).setdefault(layer, 0)
        often[pair][layer] += 1
    seen = {}
    for number, (layer, pair) in enumerate(lines):
        nth = seen[layer, pair] = seen.get((layer, pair), -1) + 1
        if len(set(often[pair].values())) > 1:
            alone.append({layer: number})
        else:
            rows.setdefault((pair, nth), {})[layer] = number
    return list(rows.values()), alone


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(PAIRS, min_size=1, max_size=5), st.booleans()), min_size=1, max_size=5),
    st.integers(1, 3), st.sampled_from([1, 2, 1000]), st.sampled_from([1, 3, 1000]),
)  # fmt: skip
def test_layers_of_the_same_pairs_are_matched_in_any_order_of_lines(tmp_path_factory, steps, layers, every, at_once):
    """Layers within tokens, or tokens within layers, step by step: each row has its own lines, in the file's order."""
    lines, expected = [], []
    for pairs, tokens_first in steps:
        order = [(layer, t) for t in range(len(pairs)) for layer in range(layers)]
        order = order if tokens_first else sorted(order)
        start = len(lines)
        lines += [(layer, pairs[token]) for layer, token in order]
        expected += [{layer: start + order.index((layer, t)) for layer in range(layers)} for t in range(len(pairs))]
    spool = fill(tmp_path_factory.mktemp("spool"), lines, every)
    assert rows_of(spool, at_once) == expected and (spool.partial, spool.apart) == (0, 0)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 2), PAIRS), min_size=1, max_size=14))
def test_any_lines_are_matched_by_the_rule(tmp_path_factory, lines):
    """Where layers differ from the beginning on, so that nothing is taken as the same before that."""
    lines = [(0, ("first", 0)), (1, ("second", 0)), (2, ("third", 0)), *lines]
    rows, alone = by_the_rule(lines)
    spool = fill(tmp_path_factory.mktemp("spool"), lines)
    found = rows_of(spool)
    apart = len(alone)
    key = lambda row: sorted(row.items())  # noqa: E731
    assert sorted(found[: len(found) - apart], key=key) == sorted(rows, key=key)
    assert [min(row.values()) for row in found[: len(found) - apart]] == sorted(min(row.values()) for row in rows)
    assert found[len(found) - apart :] == sorted(alone, key=lambda row: (min(row), min(row.values())))
    assert spool.apart == apart and spool.partial == sum(len(row) < 3 for row in found)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), PAIRS), min_size=1, max_size=14), st.integers(1, 4))
def test_no_line_is_lost_or_doubled_or_moved_in_its_layer(tmp_path_factory, lines, compared):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COMPARED", compared)
        found = rows_of(fill(tmp_path_factory.mktemp("spool"), lines), at_once=3)
    numbers = [number for row in found for number in row.values()]
    assert sorted(numbers) == list(range(len(lines)))
    assert all(lines[number][0] == layer for row in found for layer, number in row.items())
    assert all(len({lines[number][1] for number in row.values()}) == 1 for row in found), "lines of one pair"


def test_after_a_skipped_line_repeated_pairs_are_not_matched(tmp_path):
    pair = ("r1", 0)
    lines = [(0, pair), (1, pair), (0, pair), None, (0, pair), (1, pair)]
    spool = fill(tmp_path, lines)
    assert rows_of(spool) == [{0: 0, 1: 1}, {0: 2}, {0: 4}, {1: 5}] and (spool.partial, spool.apart) == (3, 3)


def test_after_a_skipped_line_pairs_that_are_unique_are(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lines = [(0, ("r", 0)), (1, ("r", 0)), None, (1, ("r", 1)), (0, ("r", 2)), (1, ("r", 2))]
    matched = fill(tmp_path / "a", lines)
    assert rows_of(matched, unique=True) == [{0: 0, 1: 1}, {1: 3}, {0: 4, 1: 5}] and matched.apart == 0
    assert rows_of(fill(tmp_path / "b", lines)) == [{0: 0, 1: 1}, {1: 3}, {0: 4}, {1: 5}], "if they are known to be"


def test_a_layer_that_is_first_met_after_a_skipped_line(tmp_path):
    pair = ("r1", 0)
    assert rows_of(fill(tmp_path, [(0, pair), None, (1, pair)])) == [{0: 0}, {1: 2}]


def test_weights_that_come_and_go_cut_the_rows(tmp_path):
    spool = Spool(tmp_path)
    for number, has in enumerate([False, True, True, False]):
        for layer in (0, 1):
            weights = [0.5] if has and layer == 1 else None
            spool.add(2 * number + layer, Route(None, "a", number, layer, [number], weights))
    spool.flush()
    parts = list(spool.rows(100, True))
    assert [len(part[0]) for part in parts] == [1, 2, 1]
    assert [np.isnan(part[1]["weights"]).all() for part in parts] == [True, False, True] and spool.has_weights


def test_a_layer_keeps_its_k(tmp_path):
    spool = Spool(tmp_path)
    spool.add(0, Route(None, "a", 0, 3, [1, 2], None))
    with pytest.raises(Malformed, match="it has 1 experts, and the lines of layer 3 before it have 2"):
        spool.add(1, Route(None, "a", 1, 3, [1], None))
    assert spool.lines == {3: 1}
