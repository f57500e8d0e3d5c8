"""What a trace has while something is captured: what it would have without. And a recorder that has no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capture_program import ALL, Captured, Model, serve, spans

import moe_native
import moe_trace
from moe_native.capturing import wanted
from moe_native.runs import RUN_DTYPE


def same(trace: moe_trace.Trace, other: moe_trace.Trace, columns: tuple[str, ...]) -> None:
    assert trace.complete and trace.losses == {} == other.losses
    assert [entry.layer for entry in trace.coverage] == [entry.layer for entry in other.coverage]
    for layer, stats in other.stats().items():
        assert trace.stats()[layer].rows == stats.rows
        one, whole = trace.layer(layer), other.layer(layer)
        assert np.array_equal(one.counts(), whole.counts())
        for column in ("positions", "step_numbers", "flags", *columns):
            assert np.array_equal(getattr(one, column), getattr(whole, column)), (column, layer)
    for absent in {"weights", "logits", "hidden"}.difference(columns):
        with pytest.raises(moe_trace.TraceError, match=f"{absent} w(as|ere) not recorded"):
            getattr(trace.layer(1), absent)


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"fields": "ids"}, ("ids",)),
        ({"fields": "ids,weights", "layers": [1]}, ("ids", "weights")),
        ({"fields": "hidden", "weights_dtype": "exact"}, ("ids", "hidden")),
        ({"sample": 0.5}, ("ids", "weights")),
    ],
)
def test_the_trace_is_as_it_is_set(tmp_path: Path, settings: dict[str, Any], columns: tuple[str, ...]) -> None:
    traces = []
    for captured in (True, False):
        with moe_native.Recorder(tmp_path / str(captured), **settings) as recorder:
            model = Model(recorder)
            capture = Captured(recorder, ALL, "0-1").add("a").add("b", sample=1) if captured else None
            serve(model)
            if capture is not None:
                found = capture.close()
                assert model.has(found[0, 0], "a", range(9), layers=[0, 1])
                assert model.has(found[1, 0], "b", range(10), layers=[0, 1])
        traces.append(moe_trace.open(tmp_path / str(captured)))
    same(*traces, columns)
    assert set(traces[0].requests) == set(traces[1].requests)


@pytest.mark.parametrize("settings", [{"fields": "counts"}, {"sample": 0}])
def test_a_trace_of_counts_stays_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    with moe_native.Recorder(tmp_path / "t", **settings) as recorder:
        model = Model(recorder)
        capture = Captured(recorder, "logits").add("b")
        serve(model)
        assert model.has(capture.close()[0, 0], "b", range(10), fields=["ids", "logits"])
    trace = moe_trace.open(tmp_path / "t")
    assert (trace.rows, trace.executed_rows, trace.requests) == (0, 28, {}) and trace.complete
    ids = model.rows("ids", 1, "b", range(10)).flatten()
    assert trace.layer(1).counts().sum() == 28 * 2 and (trace.layer(1).counts() >= np.bincount(ids, minlength=16)).all()


def test_a_pause_is_the_traces_alone(tmp_path: Path) -> None:
    with moe_native.Recorder(tmp_path / "t") as recorder:
        model = Model(recorder)
        capture = Captured(recorder).add("a")
        recorder.pause()
        assert model.step(("a", range(3)), ("b", range(2)))
        assert recorder.begin_step(1)
        model.forward([("a", [3])])
        runs = np.array([(recorder.request("a"), 3, 1, 0, 0)], RUN_DTYPE)
        assert not recorder.end_step(runs, tokens=np.zeros(1))  # the trace does not have it
        recorder.resume()
        assert model.step(("a", range(4, 6)))
        assert model.has(capture.close()[0, 0], "a", range(6))
        recorder.captures.follow(False)
        recorder.pause()
        assert not model.step(("a", [6]))
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.losses == {} and (trace.paused.steps, trace.paused.rows) == (3, 7)
    assert trace.request("a").positions.tolist() == [4, 5] and trace.request("b").rows == 0


# Without a trace.


def rings() -> set[str]:
    """The files of rings that this process has mapped."""
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".ring")}


def test_without_a_trace_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = rings()
    with moe_native.Recorder(None, ring_dir=tmp_path) as recorder:
        model = Model(recorder)
        capture = Captured(recorder).add("a")
        serve(model)
        recorder.flush()
        assert rings() == before and list(tmp_path.iterdir()) == []
        assert model.has(capture.close()[0, 0], "a", range(9))
    assert list(tmp_path.iterdir()) == []
    with moe_native.Recorder(tmp_path / "t"):  # as a trace has them
        assert len(rings() - before) == 1 and list(tmp_path.iterdir()) == [tmp_path / "t"]


def test_without_a_trace_nothing_is_recorded_but_what_is_captured() -> None:
    recorder = moe_native.Recorder(None, fields="ids", metadata={"model": "m"})
    model = Model(recorder)
    assert recorder.path is None and recorder.directory is None
    assert repr(recorder) == "<moe_native.Recorder idle, without a trace: 0 captures>"
    recorder.resume()  # there is nothing to resume
    assert not model.step(("a", range(3)))
    capture = Captured(recorder)
    assert not model.step(("a", range(3)))  # nothing is asked for yet
    capture.add("a")
    assert model.step(("a", range(3, 6)))
    assert repr(recorder).endswith("without a trace: 1 capture>")
    recorder.pause()
    assert model.step(("a", range(6, 8)))
    columns = capture.close()[0, 0]
    assert spans(columns) == ((3, 8),) and model.has(columns, "a", range(3, 8))
    assert not model.step(("a", [8]))
    status = recorder.status()
    assert status["directory"] is None and status["fields"] == ["ids"]
    assert (status["steps"], status["rows"], status["rows_stored"], status["lost"]) == (0, 0, 0, {})
    recorder.update_metadata(seed=1)
    recorder.close()
    recorder.close()
    assert recorder.status()["state"] == "closed" and repr(recorder).startswith("<moe_native.Recorder closed")
    with pytest.raises(RuntimeError, match="closed"):
        recorder.captures.open(wanted("ids", None))
