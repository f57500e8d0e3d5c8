"""Logs into traces: ours, and logs as others write them."""

from __future__ import annotations

import json
import tracemalloc

import exchanged
import numpy as np
import pytest
import segment_bytes as sb
from exchanged import log, route
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_trace
from moe_trace import exchange, summary
from moe_trace.exchange import load_jsonl


def load(path, *logs, **more):
    """(what was loaded, the trace) of logs given as lists of lines."""
    files = [log(path / f"log{i}.jsonl", lines) for i, lines in enumerate(logs)]
    done = exchange.load(files, path / "t", **more)
    return done, moe_trace.open(path / "t")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    made=exchanged.traces(weights=st.booleans()),
    at_once=st.sampled_from([1, 7, 1 << 14]),
    block=st.sampled_from([64, 1 << 22]),
)
def test_round_trip(made, at_once, block, tmp_path_factory):
    """All that the format carries: ids, weights to 4 decimals, requests, positions, order; and once more, exactly."""
    path = tmp_path_factory.mktemp("jsonl")
    trace, _ = exchanged.made(path / "t", **made)
    exchange.export(trace, path / "x.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_jsonl, "LINES_AT_ONCE", at_once)
        patch.setattr(load_jsonl, "BLOCK_BYTES", block)
        done = exchange.load([path / "x.jsonl"], path / "back", experts=made["experts"])
    back = moe_trace.open(path / "back")
    assert back.layers == trace.layers and back.complete and not done.problems
    assert np.array_equal(back.ids.astype(int), trace.ids.astype(int))
    assert np.array_equal(back.positions, trace.positions)
    assert back.request_ids.tolist() == trace.request_ids.tolist() and list(back.requests) == [
        name for name in trace.requests if name in set(trace.request_ids)
    ]
    assert np.array_equal(back.counts(), trace.counts()) and back.metadata["model"] == "tiny"
    if made["weights"]:
        assert back.weights.dtype == np.float32
        assert np.array_equal(back.weights, np.round(trace.weights.astype(np.float64), 4).astype(np.float32))
    assert (done.rows, done.lines, done.skipped) == (len(back.positions), len(back.positions) * len(back.layers), 0)
    exchange.export(back, path / "again.jsonl")
    meta, again = ((path / name).read_text().splitlines() for name in ("x.jsonl", "again.jsonl"))
    assert meta[1:] == again[1:] and {**json.loads(meta[0])} == {**json.loads(again[0])}


def test_it_is_a_trace_like_others(tmp_path):
    lines = [route("a", at, layer, [at, 7], [0.9, 0.1]) for at in range(3) for layer in (1, 4)]
    done, trace = load(
        tmp_path, [{"type": "meta", "model_id": "m", "vllm_version": "0.9", "seed": 3}, *lines], experts=8
    )
    assert trace.counts().tolist() == [[1, 1, 1, 0, 0, 0, 0, 3]] * 2
    assert trace.layer(1).request("a").first_choice_counts().tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert trace.sequence("a").ids[:, 0, 0].tolist() == [0, 1, 2] and trace.sequence("a").complete
    assert trace.phase("unknown").rows == 3 and trace.decode().rows == 0 and trace.modality("text").rows == 0
    of, _ = summary.summarize(trace, trace, {})
    assert of["complete"] and of["first_time"] is None and of["layers"][0]["top_k"] == 2
    assert np.isnat(trace.times).all() and trace.since("1d").rows == 0
    assert trace.metadata["versions"] == {"vllm": "0.9"} and trace.metadata["seed"] == 3
    imported = trace.metadata["imported"]
    assert (imported["format"], imported["lines"]) == ("jsonl", 6) and imported["files"][0].endswith("log0.jsonl")
    assert imported["notes"] == done.notes == [
        "the log does not say phases, modalities, times and steps: a step here is a block of rows"
    ]  # fmt: skip
    assert trace.metadata["weights_dtype"] == "float32" and trace.weights.dtype == np.float32
    assert str(done) == f"{tmp_path / 't'}: 3 rows, 2 layers, 1 request, in {done.runs[0]}"


def per_step_log(layers=(0,), request="r1"):
    """A log of the kind that counts tokens anew in each call of the router: a prompt of 3, then 2 tokens."""
    lines, expert = [], 0
    for rows in (3, 1, 1):
        for layer in layers:
            for at in range(rows):
                lines.append(route(request, at, layer, [expert], [0.123456789]))
                expert += 1
    return lines


def test_a_token_idx_that_restarts_is_no_position(tmp_path):
    done, trace = load(tmp_path, per_step_log(layers=(0, 2)))
    assert trace.positions.tolist() == [-1] * 5 and set(trace.request_ids) == {"r1"}
    assert trace.layer(0).ids[:, 0].tolist() == [0, 1, 2, 6, 8] and trace.layer(2).ids[:, 0].tolist() == [3, 4, 5, 7, 9]
    assert trace.weights.dtype == np.float32 and (trace.weights == np.float32(0.123456789)).all()
    place = f"{tmp_path / 'log0.jsonl'}:7"
    assert done.notes[1] == (
        f"token_idx is no position, because it restarts (request 'r1' has 0 after 2 in {place}): positions are unknown"
    )
    assert done.notes[2] == "the log does not say how many experts there are; the largest id is 9"
    assert trace.complete and not trace.experts


def test_one_restart_speaks_for_the_log(tmp_path):
    lines = [route("a", 0, 0, [1]), route("a", 1, 0, [1]), route("b", 5, 0, [1]), route("b", 5, 0, [2])]
    _, trace = load(tmp_path, lines)
    assert trace.positions.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("token_idx", "positions"), [("auto", [-1, -1, -1]), ("position", [0, 1, 1]), ("step", [-1] * 3)]
)
def test_who_imports_may_know_what_token_idx_is(tmp_path, token_idx, positions):
    done, trace = load(tmp_path, [route("a", at, 0, [at]) for at in (0, 1, 1)], token_idx=token_idx)
    assert trace.positions.tolist() == positions
    if token_idx == "position":
        assert "is repeated" in done.notes[1] and trace.sequence("a").ids.tolist() == [[[0]], [[1]]]


def test_said_to_be_no_position(tmp_path):
    done, trace = load(tmp_path, [route("a", at, 0, [at]) for at in (0, 1)], token_idx="step")
    assert trace.positions.tolist() == [-1, -1]
    assert done.notes[1] == "token_idx was said to be no position: positions are unknown"


def test_nothing_is_invented(tmp_path):
    """No request, no token_idx, no weights, no meta line, no type."""
    done, trace = load(tmp_path, [{"layer": 3, "topk_ids": [2, 1]}, {"layer": 3, "topk_ids": [0, -1], "token_idx": 9}])
    assert trace.request_ids.tolist() == [None, None] and trace.positions.tolist() == [-1, -1]
    assert trace.ids.tolist() == [[[2, 1]], [[0, 255]]] and trace.stats()[3].invalid == 1
    assert trace.metadata["fields"] == ["ids"] and "model" not in trace.metadata and not trace.requests
    assert set(trace.rows_by_class) == {0}
    with pytest.raises(moe_trace.TraceError, match="weights were not recorded"):
        _ = trace.weights
    assert done.requests == 0


def test_one_layer_in_each_file(tmp_path):
    files = [[{"type": "meta", "model_id": "m", "layers_logged": [layer], "top_k": 1}] for layer in (5, 0)]
    for layer, lines in zip((5, 0), files, strict=True):
        lines += [line for line in per_step_log(layers=(0, 5)) if line["layer"] == layer]
    done, trace = load(tmp_path, *files)
    assert trace.layers == (0, 5) and trace.ids[:, :, 0].tolist() == [[0, 3], [1, 4], [2, 5], [6, 7], [8, 9]]
    assert (done.rows, done.lines) == (5, 10) and len(trace.runs) == 1


def test_parts_one_after_the_other(tmp_path):
    parts = [[route("a", at, 0, [at]) for at in range(3)], [route("a", at, 0, [at]) for at in range(3, 5)]]
    _, trace = load(tmp_path, *parts)
    assert trace.positions.tolist() == [0, 1, 2, 3, 4] == trace.ids[:, 0, 0].tolist()


def test_requests_that_take_turns(tmp_path):
    lines = [route(request, at, layer, [at]) for at in range(4) for request in "ab" for layer in (0, 1)]
    _, trace = load(tmp_path, lines)
    assert trace.positions.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and trace.request_ids.tolist() == list("ab") * 4
    assert trace.request("b").positions.tolist() == [0, 1, 2, 3]


def test_layers_with_other_k_and_more_than_256_experts(tmp_path):
    lines = [line for at in range(2) for line in (route("a", at, 0, [at, 3]), route("a", at, 1, [300, -1, 254]))]
    _, trace = load(tmp_path, lines, experts=400)
    assert trace.layer(0).ids.dtype == np.uint8 and trace.layer(1).ids.dtype == np.uint16
    assert trace.layer(1).ids.tolist() == [[300, 65535, 254]] * 2 and trace.counts().shape == (2, 400)
    (tmp_path / "u").mkdir()
    _, trace = load(tmp_path / "u", [route("a", 0, 0, [255])])
    assert trace.ids.tolist() == [[[255]]] and trace.ids.dtype == np.uint16 and trace.stats()[0].invalid == 0


def test_a_layer_that_stops_early_is_said(tmp_path):
    lines = [route("a", at, layer, [at]) for at in range(3) for layer in (0, 1)]
    done, trace = load(tmp_path, lines[:-1])
    assert trace.layer(0).rows == 3 and trace.layer(1).rows == 2
    assert "layer 1 has fewer lines (2) than others (3)" in done.notes
    assert trace.complete, "the log says no more than that"


def test_weights_that_are_in_some_lines_only(tmp_path):
    lines = [route("a", at, 0, [at], None if at < 2 else [0.5]) for at in range(4)]
    _, trace = load(tmp_path, lines)
    batches = list(trace.batches())
    assert [batch.rows for batch in batches] == [2, 2] and batches[1].weights.tolist() == [[[0.5]], [[0.5]]]
    assert trace.stats()[0].weight_sums.tolist() == [0, 0, 0.5, 0.5]


def test_runs_stay_runs(tmp_path):
    for seed, run in enumerate(("run-1", "run-2")):
        steps, notes = sb.make_steps([3, 2], seed=seed, requests=("a", "b"))
        exchanged.put(tmp_path / "from", steps, notes, run=run)
    trace = moe_trace.open(tmp_path / "from")
    exchange.export(trace, tmp_path / "x.jsonl")
    done = exchange.load([tmp_path / "x.jsonl"], tmp_path / "t")
    back = moe_trace.open(tmp_path / "t")
    assert done.runs == ["run-1", "run-2"] == [run.name for run in back.runs] and done.requests == 2
    for run in done.runs:
        assert np.array_equal(back.run(run).ids, trace.run(run).ids)
        assert np.array_equal(back.run(run).positions, trace.run(run).positions)
    assert back.requests["a"].runs == ("run-1", "run-2") and back.metadata["imported"]["run"] == "run-2"


# -- malformed lines


GOOD = [route("a", at, layer, [at], [1.0]) for at in range(4) for layer in (0, 1)]


def test_a_malformed_line_is_an_error_with_its_place(tmp_path):
    with pytest.raises(ValueError) as error:
        load(tmp_path, GOOD, [GOOD[0] | {"token_idx": 9}, "", '{"type": "rou'])
    assert str(error.value) == (
        f"{tmp_path / 'log1.jsonl'}:3: the line cannot be imported: it is no JSON (Unterminated string starting at "
        "column 10). To skip and count such lines, keep going (--keep-going)"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log0.jsonl", "log1.jsonl"]


def test_keep_going_counts_and_says_what_it_skipped(tmp_path):
    bad = [
        "no line",
        *GOOD[:4],
        GOOD[4] | {"topk_ids": [1, 2], "topk_weights": None},
        *GOOD[5:],
        '{"type": "route", "req',
    ]
    done, trace = load(tmp_path, bad, keep_going=True)
    name = tmp_path / "log0.jsonl"
    assert (done.skipped, done.lines, done.rows) == (3, 7, 4)
    assert done.problems == [
        f"3 malformed lines of the imported log were skipped, first {name}:1: it is no JSON (Expecting value at column "
        "1)"
    ]
    assert trace.problems == done.problems and not trace.complete
    imported = trace.metadata["imported"]
    assert imported["skipped"] == 3 and imported["skipped_first"] == [
        f"{name}:1: it is no JSON (Expecting value at column 1)",
        f"{name}:6: it has 2 experts, and the lines of layer 0 before it have 1",
        f"{name}:10: it is no JSON (Unterminated string starting at column 19)",
    ]
    assert trace.layer(0).positions.tolist() == [0, 1, 3] and trace.layer(1).positions.tolist() == [0, 1, 2, 3]


def test_after_a_skipped_line_repeated_pairs_are_kept_apart_and_said(tmp_path):
    lines = [route("r1", 0, layer, [step], [1.0]) for step in range(4) for layer in (0, 1)]
    done, trace = load(tmp_path, [*lines[:3], "torn", *lines[4:]], keep_going=True)
    assert trace.layer(0).ids.ravel().tolist() == [0, 1, 2, 3] and trace.layer(1).ids.ravel().tolist() == [0, 2, 3]
    assert done.problems[1] == (
        "5 lines of the imported log are rows of one layer each: they could not be matched with those of the other "
        "layers"
    )
    assert trace.problems == done.problems and trace.layer(0).counts().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("lines", "why"), [([], "no line is a route"), ([{"type": "meta"}], "no line is a route")])
def test_a_log_without_routes(tmp_path, lines, why):
    with pytest.raises(ValueError, match=f"nothing to import in .*log0.jsonl: {why}"):
        load(tmp_path, lines)
    with pytest.raises(ValueError, match=r"no line is a route \(1 malformed line\)"):
        load(tmp_path, [*lines, "x"], keep_going=True)


def test_a_log_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        exchange.load([tmp_path / "nowhere.jsonl"], tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_larger_log_needs_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(load_jsonl, "LINES_AT_ONCE", 500)
    monkeypatch.setattr(load_jsonl, "BLOCK_BYTES", 20_000)
    peaks = []
    for tokens in (2_000, 16_000):
        path = log(
            tmp_path / f"{tokens}.jsonl",
            (route("a", at, layer, [at % 60, 1], [0.5, 0.25]) for at in range(tokens) for layer in (0, 1)),
        )
        tracemalloc.start()
        exchange.load([path], tmp_path / str(tokens))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert moe_trace.open(tmp_path / str(tokens)).rows == tokens
    assert peaks[1] < 2 * peaks[0] and peaks[1] < path.stat().st_size / 2, peaks
