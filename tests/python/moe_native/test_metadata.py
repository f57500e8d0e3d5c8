"""Items are merged one level deep, and only JSON gets in."""

from __future__ import annotations

import json

import pytest

from moe_native.metadata import Metadata
from moe_native.tier import Tier


def test_items_and_the_ledger():
    metadata = Metadata(Tier(("ids",)), "float16", {"model": "m", "versions": {"vllm": "0.32"}})
    assert not metadata.stale
    metadata.add_layer(3, "layers.3", 60, 4, "exact", "")
    metadata.add_layer(4, "layers.4", 60, 4, "exact", "", every_step=False)
    assert metadata.stale
    content = json.loads(metadata.text())
    assert not metadata.stale
    assert content["model"] == "m" and content["fields"] == ["ids"]
    assert set(content["versions"]) == {"moe_native", "torch", "python", "vllm"}
    line = {"name": "layers.3", "experts": 60, "top_k": 4, "status": "exact", "detail": ""}
    assert content["layers"][0] == {"layer": 3, **line}
    assert content["layers"][1]["every_step"] is False


@pytest.mark.parametrize("item", [object(), float("inf"), {1, 2}])
def test_what_is_no_json_is_refused(item):
    metadata = Metadata(Tier(("ids",)), "float16", {})
    before = metadata.text()
    with pytest.raises((TypeError, ValueError)):
        metadata.merge({"model": "m", "x": item})
    assert metadata.text() == before


def test_a_tier_that_leaves_a_layer_out_makes_it_skipped():
    metadata = Metadata(Tier(("ids",), frozenset({3})), "float16", {})
    metadata.add_layer(3, "layers.3", 60, 4, "derived", "from logits")
    metadata.add_layer(4, "layers.4", 60, 4, "exact", "")
    metadata.add_layer(5, "layers.5", 0, 0, "missed", "a fused kernel")

    def standing():
        content = json.loads(metadata.text())
        return content["fields"], content["sample"], [(line["status"], line["detail"]) for line in content["layers"]]

    skipped, missed = ("skipped", "not among the layers asked for"), ("missed", "a fused kernel")
    assert standing() == (["ids"], 1.0, [("derived", "from logits"), skipped, missed])
    metadata.tier(Tier(("counts",), frozenset({4}), 0.5))
    assert metadata.stale
    assert standing() == (["counts"], 0.5, [skipped, ("exact", ""), missed])
