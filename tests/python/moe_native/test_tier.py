"""Which requests are kept follows from their names alone."""

from __future__ import annotations

import hashlib

import pytest

from moe_native.tier import Tier

NAMES = [f"cmpl-{i}-0" for i in range(20_000)]


def test_the_share_of_names_is_kept_and_a_larger_share_keeps_the_same_ones():
    kept = {share: {name for name in NAMES if Tier(("ids",), sample=share).keeps(name)} for share in (0.01, 0.1, 0.5)}
    for share, names in kept.items():
        deviation = (share * (1 - share) / len(NAMES)) ** 0.5
        assert abs(len(names) / len(NAMES) - share) < 5 * deviation
    assert kept[0.01] < kept[0.1] < kept[0.5]


def test_the_hash_is_the_one_of_the_documents():
    for name in NAMES[:500]:
        first = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        assert Tier(("ids",), sample=0.25).keeps(name) == (first[0] in "0123")


def test_the_ends():
    assert all(Tier(("ids",)).keeps(name) for name in NAMES[:100])
    for tier in (Tier(("ids",), sample=0.0), Tier(("counts",))):
        assert tier.counted and not any(tier.keeps(name) for name in NAMES[:100])
    assert not Tier(("ids",), sample=0.5).counted


@pytest.mark.parametrize("name", ["", "é" * 100, "\udcff"])
def test_any_name_can_be_hashed(name):
    assert Tier(("ids",), sample=0.5).keeps(name) in (True, False)


def test_what_goes_through_the_ring():
    assert Tier(("ids", "logits")).bits == 1 | 4
    assert Tier(("counts",)).bits == 1 | 2  # the weights are summed up
    assert Tier(("ids",)).takes(7) and not Tier(("ids",), frozenset({1})).takes(7)
