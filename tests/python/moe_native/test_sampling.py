"""Which rows of a step are only counted, and where the others are."""

from __future__ import annotations

import numpy as np
import pytest

from moe_native import sampling as module
from moe_native.notes import COUNTED
from moe_native.runs import COUNTED_FLAG, RUN_DTYPE, UNKNOWN
from moe_native.sampling import Sampling
from moe_native.tier import Tier

RUNS = np.array([(7, 10, 3, 0, 0), (COUNTED, 0, 2, 0, 0), (UNKNOWN, UNKNOWN, 1, 0, 0), (8, 5, 4, 0, 0)], RUN_DTYPE)


def marked(sampling: Sampling, step: int = 0) -> list[bool]:
    runs = sampling.mark(step, RUNS)
    assert not RUNS["flags"].any(), "what the caller gave is not changed"
    return (runs["flags"] & COUNTED_FLAG != 0).tolist()


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        (Tier(("ids",)), [False, False, False, False]),
        (Tier(("ids",), sample=0.5), [False, True, True, False]),
        (Tier(("ids",), sample=0.0), [True] * 4),
        (Tier(("counts",)), [True] * 4),
    ],
)
def test_what_is_only_counted(tier, expected):
    assert marked(Sampling(tier)) == expected


def test_another_tier_holds_when_it_is_adopted():
    sampling, taken = Sampling(Tier(("ids",), sample=0.5)), []
    sampling.want(None, "0-2", 1)
    assert sampling.tier.sample == 0.5 and sampling.next == Tier(("ids",), frozenset((0, 1, 2)), 1.0)
    sampling.want("counts", "all", None)
    sampling.adopt(taken.append)
    sampling.adopt(taken.append)
    assert taken == [sampling.tier] == [Tier(("counts",), None, 1.0)]
    sampling.want("ids", None, None)
    sampling.adopt(taken.append)
    # Everything is stored again, but for requests that began before.
    assert marked(sampling) == [False, True, False, False]
    with pytest.raises(ValueError, match="idz"):
        sampling.want("idz", None, None)
    assert sampling.next is sampling.tier


def test_late_facts_of_sampled_steps_are_told_by_request_and_position(monkeypatch):
    sampling = Sampling(Tier(("ids",), sample=0.5))
    sampling.mark(4, RUNS)
    assert sampling.places(4, 1, 6) == [(7, 11, 2), (COUNTED, 0, 2), (8, 5, 1)]
    assert sampling.places(4, 8, 100) == [(8, 7, 2)]
    assert sampling.places(3, 0, 1) is None  # all of its rows are stored
    monkeypatch.setattr(module, "MOST_SAMPLED_STEPS", 2)
    for step in (5, 9):
        sampling.mark(step, RUNS)
    assert sampling.places(4, 1, 6) == []  # too long ago: better nothing than something of other rows
    assert sampling.places(6, 0, 1) is None and sampling.places(9, 0, 1) == [(7, 10, 1)]
    assert Sampling(Tier(("ids",))).places(9, 0, 1) is None
