"""The arrays of an `.npz`, read by NumPy, against those that the trace was made of."""

from __future__ import annotations

import exchanged
import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import HealthCheck, given, settings

import moe_trace
from moe_trace import exchange


def read(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(made=exchanged.traces())
def test_arrays_are_those_of_the_trace(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("npz")
    trace, steps = exchanged.made(path / "t", **made, logits=True)
    done = exchange.export(trace, path / "x.npz")
    found = read(path / "x.npz")
    layers = made["layers"]
    for name in ("ids", "weights", "logits"):
        expected = np.stack([sb.of_rows(steps, layer, name) for layer in layers], axis=1)
        assert found[name].dtype == expected.dtype and np.array_equal(found[name], expected)
    assert found["layers"].tolist() == list(layers) and str(found["model"]) == "tiny"
    assert np.array_equal(found["positions"], sb.per_row(steps, "position"))
    names = [made["requests"][index] for index in sb.per_row(steps, "request")]
    assert [str(found["request_names"][i]) for i in found["request"]] == names
    assert np.array_equal(found["phase"], sb.per_row(steps, "class") & 3)
    assert np.array_equal(found["modality"], sb.per_row(steps, "class") >> 2 & 15)
    assert np.array_equal(found["step"], np.repeat([s.number for s in steps], [s.rows for s in steps]))
    assert found["flags"].sum() == 0 and (found["run_names"][found["run"]] == "run-1").all()
    assert (done.rows, done.problems) == (len(names), [])


def test_one_layer_keeps_its_axis_and_a_part_is_a_part(tmp_path):
    trace, steps = exchanged.made(tmp_path / "t")
    exchange.export(trace.layer(3).decode(), tmp_path / "x.npz")
    found = read(tmp_path / "x.npz")
    decode = sb.per_row(steps, "class") & 3 == 2
    assert np.array_equal(found["ids"], sb.of_rows(steps, 3)[decode][:, None]) and 0 < decode.sum() < 14
    assert (found["phase"] == 2).all() and found["layers"].tolist() == [3] and "logits" not in found


def test_requests_of_two_runs_are_told_apart_and_nobody_is(tmp_path):
    for seed, run in enumerate(("run-1", "run-2")):
        steps, notes = sb.make_steps([3], seed=seed, requests=("a",))
        steps[0].runs.append((sb.NOBODY, sb.NOBODY, 2, 0, 0))
        steps[0].layers = {
            layer: {n: np.tile(a, (2, 1))[:5] for n, a in of.items()} for layer, of in steps[0].layers.items()
        }
        exchanged.put(tmp_path / "t", steps, notes, run=run)
    exchange.export(moe_trace.open(tmp_path / "t"), tmp_path / "x.npz")
    found = read(tmp_path / "x.npz")
    assert found["run"].tolist() == [0] * 5 + [1] * 5 and found["run_names"].tolist() == ["run-1", "run-2"]
    assert found["request"].tolist() == [0, 0, 0, -1, -1] * 2 and found["request_names"].tolist() == ["a"]
    assert found["positions"].tolist() == [0, 1, 2, -1, -1] * 2


def test_an_empty_selection_has_empty_arrays(tmp_path):
    trace, _ = exchanged.made(tmp_path / "t")
    assert exchange.export(trace.since("2100-01-01"), tmp_path / "x.npz").rows == 0
    found = read(tmp_path / "x.npz")
    assert found["ids"].shape == (0, 2, 4) and found["positions"].shape == found["run"].shape == (0,)


def test_a_field_that_some_layers_lack_is_left_out_and_said(tmp_path):
    steps, notes = sb.make_steps([3, 2], logits=True)
    for step in steps:
        del step.layers[3]["logits"], step.layers[0]["weights"], step.layers[3]["weights"]
    done = exchange.export(moe_trace.open(exchanged.put(tmp_path / "t", steps, notes)), tmp_path / "x.npz")
    assert done.problems == ["logits are left out: not all rows of layer 3 have them"]
    assert not {"logits", "weights"} & set(read(tmp_path / "x.npz"))


def test_layers_with_other_rows_or_widths_are_refused(tmp_path):
    (wide,), notes = sb.make_steps([3])
    wide.layers[3] = {name: array[:, :2] for name, array in wide.layers[3].items()}
    with pytest.raises(moe_trace.TraceError, match="different widths: select one layer"):
        exchange.export(moe_trace.open(exchanged.put(tmp_path / "w", [wide], notes)), tmp_path / "x.npz")
    first, notes = sb.make_steps([3], layers=(0,))
    second, _ = sb.make_steps([2], first=1)
    trace = moe_trace.open(exchanged.put(tmp_path / "r", [*first, *second], notes, blocks=2))
    with pytest.raises(moe_trace.TraceError, match="not all of these layers have the same rows: select one layer"):
        exchange.export(trace, tmp_path / "x.npz")
    exchange.export(trace.layer(0), tmp_path / "x.npz")
    assert len(read(tmp_path / "x.npz")["ids"]) == 5
