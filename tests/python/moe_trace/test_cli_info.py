"""`moe-native info`, against what the trace was made of and the files that it consists of."""

from __future__ import annotations

import json

import numpy as np
import pytest
import segment_bytes as sb
from command_line import LAYERS, META, ok, write
from ring_bytes import RingFile, finished_process


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "trace")


def test_info(trace):
    of = json.loads(ok("info", trace, "--json"))
    file = next(trace.rglob("*.moe"))
    assert (of["rows"], of["steps"], of["layer_rows"], of["requests"]) == (103, 8, 309, 3)
    assert of["recorded"] == {"ids": "uint8", "weights": "float16"}
    assert of["metadata"] == {key: value for key, value in META.items() if key != "layers"}
    assert of["bytes"] == file.stat().st_size and of["bytes_per_layer_row"] == of["bytes"] / 309
    (rank,) = of["rank_list"]
    assert (rank["run"], rank["rank"], rank["state"], rank["ring"]) == (file.parts[-3], "rank-0", "closed", None)
    (segment,) = rank["segments"]
    assert segment == {
        "file": "000000.moe",
        "number": 0,
        "bytes": of["bytes"],
        "closed": True,
        "blocks": 2,
        "steps": 8,
        "rows": 103,
    }
    text = ok("info", trace)
    for word in ("tiny-moe", "vllm 0.32.0, torch 2.13.0", "ids (uint8), weights (float16)", "000000.moe", "seed"):
        assert word in text


def test_info_of_a_crash_has_what_the_ring_has(tmp_path):
    ring = RingFile(owner=finished_process(), directory=tmp_path)
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    step = sb.Step(0, [(0, 0, 3, sb.PREFILL, 0)], {0: {"ids": ids, "weights": np.ones((3, 4), np.float16)}})
    ring.whole(step)
    place = ring.write(tmp_path / "moe-native-0123456789abcdef.ring")
    metadata = {**META, "layers": sb.ledger((0,))}
    segments = [sb.segment([], metadata, closed=False)]
    path = write(tmp_path / "t", metadata=metadata, segments=segments, closed=False, ring=place, owner=ring.owner)
    of = json.loads(ok("info", path, "--json"))
    assert (of["state"], of["steps"], of["rows"]) == ("crashed", 1, 3)
    assert (of["rank_list"][0]["ring_steps"], of["rank_list"][0]["ring_rows"]) == (1, 3)
    assert "in its ring" in ok("info", path) and "to be recovered" in ok("info", path)
    assert ok("recover", path) == "recovered 1 step (3 rows) of a process that died\n"
    of = json.loads(ok("info", path, "--json"))
    assert (of["state"], of["steps"], of["rows"]) == ("closed", 1, 3)
    assert of["rank_list"][0]["ring_steps"] == 0


def test_info_counts_a_step_that_was_written_in_pieces_once(tmp_path):
    (big,), notes = sb.make_steps([50], layers=LAYERS)
    pieces = [sb.fragment(big, [(layer, first, 20) for layer in LAYERS], i) for i, first in enumerate((0, 20))]
    last = sb.completing(big, [(layer, 40, 10) for layer in LAYERS], 2, 2, notes=notes)
    path = write(tmp_path / "t", segments=[sb.segment([*pieces, last], META)])
    of = json.loads(ok("info", path, "--json"))
    assert (of["steps"], of["rows"]) == (1, 50)
    (segment,) = of["rank_list"][0]["segments"]
    assert (segment["blocks"], segment["steps"], segment["rows"]) == (3, 1, 50)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '{"a": [NaN]}'])
def test_numbers_that_are_no_json(tmp_path, value):
    path = write(tmp_path / "t", metadata={**META, "odd": 123456})
    for file in path.rglob("rank.json"):
        file.write_text(file.read_text().replace("123456", value))
    expected = {"a": [None]} if "{" in value else None
    assert json.loads(ok("info", path, "--json"), parse_constant=pytest.fail)["metadata"]["odd"] == expected
    ok("summary", path, "--json")
    assert "odd" in ok("info", path)
