"""vLLM's arrays of routed experts, read by NumPy, against the arrays that the trace was made of."""

from __future__ import annotations

from urllib.parse import unquote

import exchanged
import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import HealthCheck, given, settings

import moe_trace
from moe_trace import exchange


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(made=exchanged.traces())
def test_files_are_the_requests(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm")
    steps, notes = sb.make_steps(
        made["sizes"], layers=made["layers"], k=made["k"], experts=made["experts"], seed=made["seed"],
        requests=made["requests"],
    )  # fmt: skip
    notes = [{**note, "prompt_len": 1} for note in notes]
    trace = moe_trace.open(exchanged.put(path / "t", steps, notes, k=made["k"], experts=made["experts"]))
    done = exchange.export(trace, path / "x", "vllm")
    owners, positions = sb.per_row(steps, "request"), sb.per_row(steps, "position")
    found = {unquote(file.stem): np.load(file, allow_pickle=False) for file in (path / "x").iterdir()}
    assert set(found) == {made["requests"][i] for i in set(owners.tolist())}
    for name, array in found.items():
        mine = owners == made["requests"].index(name)
        assert positions[mine].tolist() == list(range(mine.sum()))
        expected = np.stack([sb.of_rows(steps, layer)[mine] for layer in made["layers"]], axis=1)
        assert array.dtype == (np.uint8 if made["experts"] <= 256 else np.uint16) and np.array_equal(array, expected)
    assert done.rows == sum(made["sizes"]) and len(done.problems) == len(made["requests"]) - len(found)


def one(tmp_path, runs, note=None, rows=6, layers=(0, 1)):
    (step,), notes = sb.make_steps([rows], layers=layers, requests=("a", "b"))
    step.runs = runs
    return step, [{**n, "prompt_len": 1, **(note or {})} for n in notes]


def test_a_request_that_lacks_rows_is_left_out_and_said(tmp_path):
    hole, notes = one(tmp_path, [(0, 0, 2, sb.PREFILL, 0), (0, 3, 1, sb.PREFILL, 0), (1, 0, 3, sb.PREFILL, 0)])
    trace = moe_trace.open(exchanged.put(tmp_path / "t", [hole], notes))
    done = exchange.export(trace, tmp_path / "x", "vllm")
    assert done.problems == ["request 'a' is left out: 1 position missing of 4"]
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["b.npy"] and done.rows == 3
    with pytest.raises(moe_trace.TraceError, match="no request is whole: request 'a' is left out"):
        exchange.export(trace.request("a"), tmp_path / "y", "vllm")
    assert not (tmp_path / "y").exists()


def test_a_prompt_that_ends_early_and_an_id_that_is_no_experts(tmp_path):
    step, notes = one(tmp_path, [(0, 0, 3, sb.PREFILL, 0), (1, 0, 3, sb.PREFILL, 0)])
    notes[0]["prompt_len"] = 5
    step.layers[1]["ids"][4, 2] = 255
    trace = moe_trace.open(exchanged.put(tmp_path / "t", [step], notes))
    with pytest.raises(moe_trace.TraceError, match="it has 3 of the 5 positions of its prompt"):
        exchange.export(trace, tmp_path / "x", "vllm")
    with pytest.raises(moe_trace.TraceError, match="1 id of it is no expert's"):
        exchange.export(trace.request("b"), tmp_path / "x", "vllm")
    assert exchange.export(trace.request("b").layer(0), tmp_path / "x", "vllm").rows == 3


def test_cached_positions_are_those_of_the_request_that_computed_them(tmp_path):
    step, notes = one(tmp_path, [(0, 0, 4, sb.PREFILL, 0), (1, 3, 2, sb.PREFILL, 0)])
    notes[1]["cached"] = [[0, 3, 0]]
    exchange.export(moe_trace.open(exchanged.put(tmp_path / "t", [step], notes)), tmp_path / "x", "vllm")
    ids = np.stack([step.layers[layer]["ids"] for layer in (0, 1)], axis=1)
    assert np.array_equal(np.load(tmp_path / "x" / "b.npy"), ids[[0, 1, 2, 4, 5]])


def test_layers_that_are_not_all_are_said(tmp_path):
    step, notes = one(tmp_path, [(0, 0, 6, sb.PREFILL, 0)], layers=(1, 2))
    trace = moe_trace.open(exchanged.put(tmp_path / "t", [step], notes))
    assert exchange.export(trace, tmp_path / "x", "vllm").notes == [
        "the 2 layers of these arrays are layers 1 to 2 of the model; vLLM's own arrays have zeros for the others"
    ]


def test_what_is_refused(tmp_path):
    step, notes = one(tmp_path, [(0, 0, 3, sb.PREFILL, 0), (1, 0, 3, sb.PREFILL, 0)])
    for run in ("run-1", "run-2"):
        exchanged.put(tmp_path / "t", [step], notes, run=run)
    trace = moe_trace.open(tmp_path / "t")
    with pytest.raises(moe_trace.TraceError, match="select by layer, request and run only"):
        exchange.export(trace.decode(), tmp_path / "x", "vllm")
    with pytest.raises(moe_trace.TraceError, match="'a' is the name of 2 requests"):
        exchange.export(trace, tmp_path / "x", "vllm")
    assert exchange.export(trace.run(-1), tmp_path / "x", "vllm").rows == 6
    with pytest.raises(moe_trace.TraceError, match="is there already"):
        exchange.export(trace.run(-1), tmp_path / "x", "vllm")
    step.runs = [(sb.NOBODY, sb.NOBODY, 6, 0, 0)]
    nobody = moe_trace.open(exchanged.put(tmp_path / "n", [step]))
    with pytest.raises(moe_trace.TraceError, match="has no request with a name"):
        exchange.export(nobody, tmp_path / "y", "vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n", "t", "x"]
