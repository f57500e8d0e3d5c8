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
