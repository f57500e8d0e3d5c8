"""Single lines of logs: what is read, and what is malformed and why."""

from __future__ import annotations

import json
import math

import exchanged
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_trace.exchange import lines
from moe_trace.exchange.lines import INVALID, Malformed, Reader, Route


def read(line, experts=None, before=()):
    reader = Reader(experts)
    for text in before:
        assert reader.read(json.dumps(text).encode()) is None
    return reader.read(line if isinstance(line, bytes) else json.dumps(line).encode())


FULL = exchanged.route("a", 3, 7, [5, 1], [0.75, 0.25])


def test_a_whole_line():
    assert read(FULL) == Route(None, "a", 3, 7, [5, 1], [0.75, 0.25])
    assert read(FULL | {"run": "run-1", "time": 4}) == Route("run-1", "a", 3, 7, [5, 1], [0.75, 0.25])


@pytest.mark.parametrize("key", ["req_id", "token_idx", "topk_weights", "run"])
def test_null_and_missing_are_one(key):
    missing = {k: v for k, v in FULL.items() if k != key}
    assert read(FULL | {key: None}) == read(missing)
    route = read(missing)
    assert {"req_id": route.request, "token_idx": route.at, "topk_weights": route.weights, "run": route.run}[key] in (
        None, -1
    )  # fmt: skip


def test_what_others_write():
    assert read({k: v for k, v in FULL.items() if k != "type"}) == read(FULL)
    assert read(FULL | {"req_id": 12}).request == "12" and read(FULL | {"req_id": ""}).request is None
    assert read(FULL | {"token_idx": -1}).at == -1
    assert read(FULL | {"topk_weights": [1, 0]}).weights == [1.0, 0.0]
    assert read(FULL | {"topk_ids": [-1, None]}).ids == [INVALID, INVALID]
    numbers = read(
        b'{"type": "route", "layer": 0, "topk_ids": [1, 2, 3], "topk_weights": [NaN, Infinity, null]}'
    ).weights
    assert len(numbers) == 3 and all(map(math.isnan, numbers))
    no_layer = {k: v for k, v in FULL.items() if k != "layer"}
    assert read(no_layer, before=[{"type": "meta", "layers_logged": [4]}]).layer == 4
    for meta in ({"type": "meta", "layers_logged": [4, 5]}, {"type": "meta", "layers_logged": [4], "x": 1}):
        if len(meta["layers_logged"]) == 2:
            with pytest.raises(Malformed, match="its layer is null"):
                read(no_layer, before=[meta])
    reader = Reader(None)
    reader.read(b'{"type": "meta", "layers_logged": [4]}')
    reader.begin()
    with pytest.raises(Malformed, match="its layer is null"):  # another file's meta line says nothing of this one
        reader.read(json.dumps(no_layer).encode())


def test_meta_lines_add_up():
    reader = Reader(None)
    for meta in ({"model_id": None, "seed": 1}, {"model_id": "m", "num_experts": 8}, {"seed": 2}):
        reader.read(json.dumps({"type": "meta", **meta}).encode())
    assert (reader.meta["model_id"], reader.meta["seed"], reader.experts) == ("m", 1, 8)
    with pytest.raises(Malformed, match="of the model 'n', and what came before of 'm': import them apart"):
        reader.read(b'{"type": "meta", "model_id": "n"}')
    told = Reader(60)
    told.read(b'{"type": "meta", "num_experts": 8}')
    assert told.experts == 60, "who imports knows better"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "it is no JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b"\xff", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[1]", "it is no JSON object"),
        (b"{}", "its type is null, neither meta nor route"),
        ({"type": "step"}, 'its type is "step", neither meta nor route'),
        (FULL | {"layer": None}, "its layer is null, and should be a number from 0 to 65534"),
        (FULL | {"layer": 65535}, "its layer is 65535"),
        (FULL | {"layer": True}, "its layer is true"),
        (FULL | {"layer": "7"}, 'its layer is "7"'),
        (FULL | {"topk_ids": []}, "it has no list topk_ids"),
        (FULL | {"topk_ids": 3}, "it has no list topk_ids"),
        (FULL | {"topk_ids": [1, 2.0]}, "topk_ids has 2.0, which is no number of an expert"),
        (FULL | {"topk_ids": [True, 2]}, "topk_ids has true, which is no number of an expert"),
        (FULL | {"topk_ids": [1, -2]}, "topk_ids has -2, and experts are numbered from 0 to 65534"),
        (FULL | {"topk_ids": [1, 65535]}, "topk_ids has 65535, and experts are numbered from 0 to 65534"),
        (FULL | {"token_idx": 1.5}, "its token_idx is 1.5, and should be a number from 0 on"),
        (FULL | {"token_idx": -2}, "its token_idx is -2"),
        (FULL | {"token_idx": 2**32 - 1}, "its token_idx is 4294967295"),
        (FULL | {"topk_weights": [1]}, "topk_weights is no list of 2 numbers, as many as topk_ids has"),
        (FULL | {"topk_weights": 0.5}, "topk_weights is no list of 2 numbers"),
        (FULL | {"topk_weights": ["a", 1]}, "topk_weights has something that is no number"),
        (FULL | {"topk_weights": [10**400, 1]}, "topk_weights has a number that is too large"),
        (FULL | {"req_id": [1]}, "its req_id is [1], and should be a name"),
        (FULL | {"run": 1.5}, "its run is 1.5, and should be a name"),
        (FULL | {"req_id": "\ud800"}, "its req_id is no text: half of a surrogate pair"),
    ],
)
def test_malformed_lines_say_why(line, why):
    with pytest.raises(Malformed) as error:
        read(line)
    assert str(error.value).startswith(why) and "\n" not in str(error.value)


def test_an_expert_beyond_those_that_there_are():
    assert read(FULL, experts=6).ids == [5, 1]
    for arguments in ({"experts": 5}, {"before": [{"type": "meta", "num_experts": 5}]}):
        with pytest.raises(Malformed, match="topk_ids has 5, and experts are numbered from 0 to 4"):
            read(FULL, **arguments)


@given(st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
       lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(list(FULL)), x, max_size=6)))  # fmt: skip
def test_nothing_but_malformed_is_raised(line):
    try:
        read(line if isinstance(line, bytes) else json.dumps(line).encode())
    except Malformed as error:
        assert str(error)


def test_lines_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MOST_BYTES", 8)
    path = tmp_path / "x"
    path.write_bytes(b"one\n\n  \r\n" + b"x" * 30 + b"\n1234567\n12345678\nend")
    assert list(lines.lines_of(path)) == [(1, b"one\n"), (4, None), (5, b"1234567\n"), (6, None), (7, b"end")]
    with pytest.raises(Malformed, match="longer than 8 bytes"):
        Reader(None).read(None)
