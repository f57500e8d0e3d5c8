"""Captures of a recorder: every row of the chosen requests is in the memory that their caller maps, as the router gave
it. What the trace has meanwhile is in test_capturing_trace.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_program import Captured, Model, serve, spans

import moe_native
import moe_trace
from moe_native.capturing import Capturing, wanted
from moe_native.runs import RUN_DTYPE
from moe_native.tier import Tier


@pytest.fixture(params=["trace", "no trace"])
def recorder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with moe_native.Recorder(tmp_path / "t" if request.param == "trace" else None) as recorder:
        yield recorder


def test_rows_of_several_requests_in_chunks_and_decode_steps(recorder: moe_native.Recorder) -> None:
    model = Model(recorder)
    capture = Captured(recorder).add("a", sample=3).add("b", sample=1, child=2)
    serve(model)
    found = capture.close()
    assert set(found) == {(3, 0), (1, 2)}
    assert spans(found[3, 0]) == ((0, 9),) and spans(found[1, 2]) == ((0, 10),)
    assert model.has(found[3, 0], "a", range(9)) and model.has(found[1, 2], "b", range(10))


@pytest.mark.parametrize("experts", [255, 256, 700])
@pytest.mark.parametrize(
    ("weights", "logits"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16,) * 2]
)
def test_dtypes_are_the_routers_own(experts: int, weights: torch.dtype, logits: torch.dtype) -> None:
    with moe_native.Recorder(None) as recorder:
        model = Model(recorder, [4], experts=experts, k=8, weights=weights, logits=logits, hidden=logits)
        capture = Captured(recorder).add("a", capacity=3)
        model.step(("a", range(3)))
        assert model.has(capture.close()[0, 0], "a", range(3))


def test_invalid_ids_are_marked(recorder: moe_native.Recorder) -> None:
    for layer, experts, invalid in ((0, 16, 255), (1, 300, -1)):
        binding = recorder.bind(layer, experts=experts, top_k=2)
        capture = Captured(recorder, "ids", [layer]).add("a")
        with recorder.step(requests=["a"], positions=[range(2)]):
            recorder.record(binding, torch.tensor([[1, experts], [-1, 2]]), torch.ones(2, 2))
        assert capture.close()[0, 0]["ids", layer].rows(0, 2).tolist() == [[1, invalid], [invalid, 2]]


def test_rows_that_come_out_of_order_and_again(recorder: moe_native.Recorder) -> None:
    model = Model(recorder)
    capture = Captured(recorder).add("a", capacity=12)
    model.step(("a", range(8, 14)))  # beyond the capacity there is no room
    model.step(("a", range(2, 5)))
    assert recorder.captures.under_way
    model.step(("a", [0]))
    model.step(("a", range(5, 8)))
    model.step(("a", range(3, 9), 1))  # executed again
    (columns,) = capture.close().values()
    assert spans(columns) == ((0, 1), (2, 12))
    for positions, again in (([0], 0), ([2], 0), (range(3, 9), 1), (range(9, 12), 0)):
        assert model.has(columns, "a", positions, again=again)


def test_several_captures_have_each_their_fields_layers_and_requests(recorder: moe_native.Recorder) -> None:
    model = Model(recorder)
    first = Captured(recorder, "logits", "0,2").add("a")
    second = Captured(recorder, ["weights"], [1]).add("a", sample=5).add("b", sample=6)
    model.step(("a", range(4)), ("b", range(3)))
    third = Captured(recorder, ("hidden",)).add("c")
    assert len(recorder.captures) == 3
    model.step(("c", range(6)), ("a", [4]), ("b", range(3, 6)))
    of_first = first.close()
    model.step(("a", [5]), ("b", [6]), ("c", [6]))
    of_second, of_third = second.close(), third.close()
    assert set(of_first) == {(0, 0)} == set(of_third) and set(of_second) == {(5, 0), (6, 0)}
    assert model.has(of_first[0, 0], "a", range(5), fields=["ids", "logits"], layers=[0, 2])
    assert model.has(of_second[5, 0], "a", range(6), fields=["ids", "weights"], layers=[1])
    assert model.has(of_second[6, 0], "b", range(7), fields=["ids", "weights"], layers=[1])
    assert model.has(of_third[0, 0], "c", range(7), fields=["ids", "hidden"])
    assert spans(of_first[0, 0]) == ((0, 5),) and spans(of_third[0, 0]) == ((0, 7),)


def test_a_router_that_is_bound_later_is_captured(recorder: moe_native.Recorder) -> None:
    model = Model(recorder, [0])
    capture = Captured(recorder).add("a")
    model.step(("a", [0]))
    model.layers, model.bindings[7] = [0, 7], model.bind(7)
    model.step(("a", [1]))
    columns = capture.close()[0, 0]
    assert spans(columns) == ((1, 2),)  # positions that all layers have
    assert model.has(columns, "a", [1])


def test_a_step_that_is_given_up_has_no_rows(recorder: moe_native.Recorder) -> None:
    model = Model(recorder)
    capture = Captured(recorder).add("a")
    model.step(("a", [0]))
    assert recorder.begin_step(1)
    model.forward([("a", [1])])
    recorder.abort_step()
    model.step(("a", [2]))
    columns = capture.close("1 step or layer could not be captured; the log says why")[0, 0]
    assert spans(columns) == ((0, 1), (2, 3)) and model.has(columns, "a", [2])
    capture = Captured(recorder).add("a")
    model.step(("a", [3]))
    assert spans(capture.close()[0, 0]) == ((3, 4),)  # that was before it


# A small ring.


def runs_of(recorder: moe_native.Recorder, request: str, rows: int) -> Any:
    return np.array([(recorder.request(request), 0, rows, 0, 0)], RUN_DTYPE)


def test_announced_rows_are_taken_while_the_step_is_open(recorder: moe_native.Recorder) -> None:
    model = Model(recorder)
    for early in (True, False):
        capture = Captured(recorder).add("a")
        assert recorder.begin_step(8)
        if early:
            recorder.announce(runs_of(recorder, "a", 8))
        model.forward([("a", range(8))])
        (columns,) = capture.close().values()
        assert spans(columns) == ((0, 8),) if early else columns == {}
        if early:
            assert model.has(columns, "a", range(8))
        assert recorder.end_step(runs_of(recorder, "a", 8)) is (recorder.directory is not None)
    capture = Captured(recorder).add("b")
    with recorder.step(requests=["b"], positions=[range(8)]):
        model.forward([("b", range(8))])
        assert model.has(capture.close()[0, 0], "b", range(8))


@pytest.mark.parametrize("how", ["step", "announced", "not announced"])
@pytest.mark.parametrize("has_trace", [True, False])
def test_a_step_larger_than_the_ring(tmp_path: Path, how: str, has_trace: bool) -> None:
    rows = 3000
    with moe_native.Recorder(tmp_path / "t" if has_trace else None, ring_bytes=1 << 16) as recorder:
        model = Model(recorder)
        capture = Captured(recorder).add("a", capacity=rows)
        if how == "step":
            assert model.step(("a", range(rows)))
        else:
            assert recorder.begin_step(rows)
            if how == "announced":
                recorder.announce(runs_of(recorder, "a", rows))
            model.forward([("a", range(rows))])
            assert recorder.end_step(runs_of(recorder, "a", rows)) is has_trace
        assert model.has(capture.close()[0, 0], "a", range(rows))
    if has_trace:
        trace = moe_trace.open(tmp_path / "t")
        assert trace.complete and trace.losses == {}
        for layer in model.layers:
            assert np.array_equal(trace.layer(layer).request("a").ids, model.rows("ids", layer, "a", range(rows)))


def test_nothing_is_dropped_while_something_is_captured(tmp_path: Path) -> None:
    steps, rows = 40, 100  # 50 times what the ring holds
    with moe_native.Recorder(tmp_path / "t", ring_bytes=1 << 16, overflow="drop") as recorder:
        model = Model(recorder)
        capture = Captured(recorder).add("a", capacity=steps * rows)
        for step in range(steps):
            assert model.step(("a", range(rows * step, rows * (step + 1))))
        assert recorder.counters()["lost"] == {}
        assert model.has(capture.close()[0, 0], "a", range(steps * rows))
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.request("a").rows == steps * rows


# Life and death.


def inode(handle: int) -> int:
    return os.fstat(handle).st_ino


def test_memory_is_used_again_when_its_reader_has_gone_and_not_before(recorder: moe_native.Recorder) -> None:
    model = Model(recorder)
    capture = Captured(recorder).add("a")
    model.step(("a", range(6)))
    memory = inode(capture.handle)
    columns: Any = capture.close()[0, 0]
    logits = columns["logits", 1].rows(0, 6)
    expected = model.rows("logits", 1, "a", range(6))
    del columns
    other = Captured(recorder).add("b")
    assert inode(other.handle) != memory
    model.step(("b", range(6)))
    assert model.has(other.close()[0, 0], "b", range(6))
    assert torch.equal(logits, expected)
    del logits
    again = Captured(recorder).add("c")
    assert inode(again.handle) == memory
    model.step(("c", range(2)))
    columns = again.close()[0, 0]
    assert spans(columns) == ((0, 2),) and model.has(columns, "c", range(2))


def test_a_forked_child_leaves_the_captures_alone(recorder: moe_native.Recorder) -> None:
    model = Model(recorder)
    capture = Captured(recorder).add("a")
    model.step(("a", range(3)))
    child = os.fork()
    if child == 0:
        right = 1
        try:
            with recorder.step(requests=["a"], positions=[[3]]) as recorded:
                right = int(recorded)
            for call in (lambda: recorder.captures.open(wanted("ids", None)), lambda: capture.close()):
                try:
                    call()
                    right = 2
                except RuntimeError:
                    pass
            recorder.close()
        finally:
            os._exit(right)
    assert os.waitpid(child, 0)[1] == 0
    model.step(("a", range(3, 5)))
    columns = capture.close()[0, 0]
    assert spans(columns) == ((0, 5),) and model.has(columns, "a", range(5))


# What goes wrong.


@pytest.mark.parametrize(
    ("fields", "layers", "said"),
    [
        ("ids,tokens", None, "'tokens' cannot be captured; use some of ids, weights, logits, hidden"),
        ("counts", None, "'counts' cannot be captured"),
        ("ids,wieghts", None, "'wieghts' is not a field"),
        ("ids", "4-", "layers is '4-'"),
        ("ids", [70000], "layers is"),
        ("ids", [], "no layer is named"),
        ("ids", "", "layers is '', which names none; leave it out, or name some"),
        ("ids", " ", "no layer is named"),
        ("", None, "fields is '', which names none; leave it out, or name some"),
        (",", None, "no field is named"),
    ],
)
def test_what_cannot_be_captured_is_refused(fields: Any, layers: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wanted(fields, layers)


def test_what_is_wanted() -> None:
    assert wanted("logits", None) == Tier(("ids", "logits"))
    assert wanted(None, None) == Tier(("ids", "weights", "logits"))
    assert wanted(np.array(["logits"]), np.array([1, 3])) == Tier(("ids", "logits"), frozenset({1, 3}))
    assert wanted(["hidden", "weights"], "3,5-6") == Tier(("ids", "weights", "hidden"), frozenset({3, 5, 6}))


def test_a_capture_that_is_not_open(recorder: moe_native.Recorder) -> None:
    number, _ = recorder.captures.open(wanted("ids", None))
    assert not recorder.captures.add(number + 1, 0, sample=0, child=0, capacity=1)
    with pytest.raises(LookupError, match=f"capture {number + 1} is not open"):
        recorder.captures.close(number + 1)
    recorder.captures.close(number)
    assert not recorder.captures.add(number, 0, sample=0, child=0, capacity=1)
    with pytest.raises(LookupError, match="is not open"):
        recorder.captures.close(number)
    assert len(recorder.captures) == 0


class Core:
    """The captures of a recorder, some of which its drain thread has dropped."""

    def __init__(self) -> None:
        self.alive: list[int] = []
        self.given: list[Any] = []

    def open_capture(self, bits: int, layers: list[int] | None) -> tuple[int, int]:
        self.alive.append(len(self.alive) + 1)
        return self.alive[-1], 99

    def captures(self) -> list[int]:
        return self.alive[1:]

    def counters(self) -> dict[str, int]:
        return {"lost_for_captures": 0}

    def catch_up(self, seconds: float) -> bool:
        return False

    def close_capture(self, number: int) -> tuple[int, int, str]:
        return 0, 64, "no memory"

    def add_captured(self, *_: int) -> None:
        raise IndexError

    def capture(self, bits: int) -> None:
        self.given.append(bits)

    def want(self, binding: int, wanted: bool) -> None:
        self.given.append((binding, wanted))


def test_captures_that_the_recorder_has_dropped_and_a_drain_thread_that_does_not_come() -> None:
    core = Core()
    captures = Capturing(core, {0: 3, 1: 4})  # type: ignore[arg-type]
    captures.open(wanted("hidden", None))
    second, _ = captures.open(wanted("logits", [4]))
    assert len(captures) == 1 and captures.changed
    captures.adopt()
    captures.follow(True)
    captures.adopt()
    assert core.given == [0, (0, False), (1, False), 1 | 4, (0, False), (1, True)] and not captures.changed
    captures.follow(True)
    assert not captures.changed
    assert not captures.add(second, 0, sample=0, child=0, capacity=1)
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        captures.close(second, timeout=0.5)
    assert len(captures) == 0 and captures.changed
