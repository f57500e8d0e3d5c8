"""Logits as safetensors, read by the package of that name, against the arrays that the trace was made of."""

from __future__ import annotations

import json
import tracemalloc

import exchanged
import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import HealthCheck, given, settings

import moe_trace
from moe_trace import exchange

safetensors = pytest.importorskip("safetensors", reason="needs safetensors to read what was written")


def read(path):
    with safetensors.safe_open(path, "np") as file:
        about = dict(file.metadata())
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(made=exchanged.traces())
def test_tensors_are_those_of_the_trace(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("logits")
    trace, steps = exchanged.made(path / "t", **made, logits=True)
    done = exchange.export(trace, path / "x.safetensors")
    found, about = read(path / "x.safetensors")
    layers = made["layers"]
    for layer in layers:
        expected = sb.of_rows(steps, layer, "logits")
        assert found[f"layers.{layer}.logits"].dtype == np.float32
        assert np.array_equal(found[f"layers.{layer}.logits"], expected)
    assert set(found) == {f"layers.{layer}.logits" for layer in layers} | {"positions", "request", "run"}
    assert np.array_equal(found["positions"], sb.per_row(steps, "position"))
    names = json.loads(about["requests"])
    assert [names[i] for i in found["request"]] == [made["requests"][i] for i in sb.per_row(steps, "request")]
    assert json.loads(about["layers"]) == list(layers) and about["model"] == "tiny"
    assert json.loads(about["runs"]) == ["run-1"] and not found["run"].any() and done.rows == len(found["run"])


def test_float16_stays_and_bfloat16_is_widened_exactly(tmp_path):
    steps, notes = sb.make_steps([4, 3], logits=True)
    rng = np.random.default_rng(0)
    for step in steps:
        step.layers[0]["logits"] = step.layers[0]["logits"].astype(np.float16)
        step.layers[3]["logits"] = rng.integers(0, 0x7F80, (step.rows, 60)).astype(np.uint32)  # upper halves of float32
    exchange.export(moe_trace.open(exchanged.put(tmp_path / "t", steps, notes)), tmp_path / "x.safetensors")
    found, _ = read(tmp_path / "x.safetensors")
    assert found["layers.0.logits"].dtype == np.float16
    assert np.array_equal(found["layers.0.logits"], sb.of_rows(steps, 0, "logits"))
    assert np.array_equal(found["layers.3.logits"], sb.exact(sb.of_rows(steps, 3, "logits")))


def test_torch_reads_it(tmp_path):
    load = pytest.importorskip("safetensors.torch", reason="needs torch").load_file
    trace, steps = exchanged.made(tmp_path / "t", logits=True)
    exchange.export(trace, tmp_path / "x.safetensors")
    assert np.array_equal(load(tmp_path / "x.safetensors")["layers.3.logits"].numpy(), sb.of_rows(steps, 3, "logits"))


def test_logits_that_were_not_recorded(tmp_path):
    trace, _ = exchanged.made(tmp_path / "t")
    with pytest.raises(moe_trace.TraceError, match=r"not recorded for all rows of layers 0, 3\. To record them, set"):
        exchange.export(trace, tmp_path / "x.safetensors")
    first, notes = sb.make_steps([3], logits=True)
    second, _ = sb.make_steps([3], first=1)
    trace = moe_trace.open(exchanged.put(tmp_path / "u", first + second, notes, blocks=2))
    with pytest.raises(moe_trace.TraceError, match="select other layers or times"):
        exchange.export(trace, tmp_path / "x.safetensors")
    assert exchange.export(trace.steps(0, 1), tmp_path / "x.safetensors").rows == 3
    with pytest.raises(moe_trace.TraceError, match="no rows to export: the selection is empty"):
        exchange.export(trace.steps(7), tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_logits_of_two_dtypes_are_refused(tmp_path):
    steps, notes = sb.make_steps([3, 3], layers=(0,), logits=True)
    steps[1].layers[0]["logits"] = steps[1].layers[0]["logits"].astype(np.float16)
    trace = moe_trace.open(exchanged.put(tmp_path / "t", steps, notes, blocks=2))
    with pytest.raises(moe_trace.TraceError, match="layer 0 have different widths or types over time: select"):
        exchange.export(trace, tmp_path / "x.safetensors")


def test_a_larger_trace_needs_no_more_memory(tmp_path):
    peaks = []
    for blocks in (4, 32):
        trace, _ = exchanged.made(tmp_path / str(blocks), [200] * blocks, blocks=blocks, logits=True)
        tracemalloc.start()
        exchange.export(trace, tmp_path / f"{blocks}.safetensors")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "32.safetensors").stat().st_size > 10 * max(peaks), "it is not all in memory"
    assert peaks[1] < 2 * peaks[0], peaks
