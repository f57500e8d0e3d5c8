"""Counts by group of requests: those of the requests themselves, however the work is divided."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import segment_bytes as sb
from analysis_traces import LAYERS, in_turn, opened

import moe_trace
from moe_trace import analysis, metrics
from moe_trace.analysis import one_pass
from moe_trace.analysis.groups import GROUPS, group_of


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("groups"), 0, 30, 4)


@pytest.mark.parametrize("jobs", [1, 4])
def test_groups_are_sums_of_requests(trace, jobs):
    found, requests = analysis.GroupCounts(), analysis.RequestCounts()
    with mock.patch.object(one_pass, "_in_processes", in_turn):
        notes = analysis.fill(trace, found, requests, jobs=jobs)
    for layer in LAYERS:
        expected = np.zeros((GROUPS, requests.counts(layer).shape[1]), np.int64)
        for (_, _, name, _), of_one in zip(requests.requests, requests.counts(layer), strict=True):
            expected[group_of(name)] += of_one
        np.testing.assert_array_equal(found.counts[layer], expected)
        assert found.rows[layer] == requests.rows.sum() + found.nobodys and found.width == 2
        there = expected[expected.any(axis=1)]
        assert len(there) == 3  # three names, each in both engines
        np.testing.assert_array_equal(found.groups(layer), there)
        share = found.shares(layer)
        np.testing.assert_array_equal(share.value, metrics.shares(there.sum(axis=0)))
        np.testing.assert_array_equal(share.low, metrics.bootstrap_ratio(there, there.sum(axis=1)).low)
    assert found.nobodys > 0 and f"{found.nobodys} rows belong to no request" in notes[-1]


def test_a_name_has_one_group_everywhere():
    assert [group_of(name) for name in ("0", "chat-17", "ü\ud800")] == [33, 9, 14]
    assert {group_of(str(n)) for n in range(5000)} == set(range(GROUPS))


def test_without_requests_there_are_no_groups(tmp_path):
    steps, _ = sb.make_steps([4], layers=[0])
    steps[0].runs[:] = [(sb.NOBODY, sb.NOBODY, 4, sb.cls(attributed=False), 0)]
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([sb.rows_block(steps)], {"layers": sb.ledger([0])})])
    found = analysis.GroupCounts()
    analysis.fill(moe_trace.open(tmp_path), found)
    assert (found.groups(0).shape, found.groups(7).shape, found.rows) == ((0, 60), (0, 0), {0: 4})
