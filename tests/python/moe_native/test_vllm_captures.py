"""The worker's side of captures: which requests are whose, and what `Steps` does for them. The rows themselves are read
in test_capture_call.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from capture_program import Model, spans
from fake_llm import SamplingParams, scheduled
from test_steps import DECODE, PREFILL
from test_steps import Engine as StepsEngine

import moe_native
import moe_trace
from moe_native.captures.regions import Memory
from moe_native.capturing import identity_of
from moe_native.runs import RECOMPUTED, RUN_DTYPE
from moe_native.vllm.captures import Captures
from moe_native.vllm.steps import Steps

MOST = 40
TOKEN = 1 << 61
LAYERS = [(0, 16, 2, "layers.0"), (1, 16, 2, "layers.1")]
A, B, C = "0-0123abcd", "1-89abcdef", "2-00000000"


class Recorder(moe_native.Recorder):
    """A recorder that says what it was told."""

    def __init__(self, path: Any = None, **settings: Any) -> None:
        super().__init__(path, **settings)
        self.told: list[tuple[Any, ...]] = []

    def begin_step(self, n_rows: int, spans: Any = None) -> bool:
        self.told.append(("begin", n_rows))
        return super().begin_step(n_rows, spans)

    def announce(self, runs: Any) -> None:
        self.told.append(("announce", np.frombuffer(runs, RUN_DTYPE).tolist()))
        super().announce(runs)

    def end_step(self, runs: Any, tokens: Any = None) -> bool:
        self.told.append(("end", np.frombuffer(runs, RUN_DTYPE).tolist()))
        return super().end_step(runs, tokens)


class Worker:
    """Steps of batches that a test writes down."""

    def __init__(self, recorder: Recorder, kind: str = "older") -> None:
        self.recorder, self.kind = recorder, kind
        self.model = Model(recorder, [0, 1])
        self.captures = Captures(recorder, MOST, layers=LAYERS, missed={5: "monolithic"})
        self.runner = SimpleNamespace(execute_model_state=None)
        self.steps = Steps(recorder, self.runner, captures=self.captures)
        self.announces = True

    def open(self, token: int = TOKEN, fields: Any = ("ids", "logits"), layers: Any = None) -> Memory:
        answer = self.captures.obey("open", token=token, fields=list(fields), layers=layers)
        return Memory(answer["process"], answer["handle"], answer["identity"])

    def close(self, memory: Memory, token: int = TOKEN, problem: str = "") -> tuple[Any, list[dict[str, Any]]]:
        answer = self.captures.obey("close", token=token)
        assert answer["problem"] == problem
        return memory.read(answer["index_at"], answer["bytes"]), answer["requests"]

    def step(self, *batch: tuple[str, Sequence[int]], new: Sequence[Any] = (), finished: Sequence[str] = ()) -> bool:
        output = scheduled([(name, rows) for name, rows in batch], new, set(finished))  # type: ignore[misc]
        positions = torch.tensor([position for _, rows in batch for position in rows])
        rows = SimpleNamespace(req_ids=[name for name, _ in batch], num_reqs=len(batch))
        if self.kind == "older":
            self.runner.input_batch, self.runner.positions, self.runner.input_ids = rows, positions, positions
        else:
            rows.positions = rows.input_ids = positions
        if not self.steps.begin(output):
            return False
        if self.announces:
            self.steps.announce()
        self.model.forward(batch)
        if self.kind == "newer":
            self.runner.execute_model_state = SimpleNamespace(input_batch=rows)
        assert self.steps.end(output)
        return True


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Recorder() as recorder:
        yield Worker(recorder)


def new(name: str, prompt: int = 3, mark: Any = (TOKEN, 0, 1), max_tokens: int | None = 4, **more: Any) -> Any:
    params = SamplingParams(max_tokens, extra_args=None if mark is None else {"moe_native": mark})
    return SimpleNamespace(
        **{"req_id": name, "prompt_len": prompt, "mm_features": [], "sampling_params": params} | more,
        num_computed_tokens=0,
        block_ids=([],),
    )


def rows_of(worker: Worker, found: Any, request: str, positions: range) -> bool:
    return spans(found) == ((positions.start, positions.stop),) and worker.model.has(
        found, request, positions, fields=["ids", "logits"]
    )


# What callers are told.


def test_what_a_caller_is_told(worker: Worker) -> None:
    opened = worker.captures.obey("open", token=TOKEN, fields=["ids"], layers=[1])
    assert opened == {
        "process": os.getpid(),
        "handle": opened["handle"],
        "identity": identity_of(opened["handle"]),
        "layers": [list(layer) for layer in LAYERS],
        "missed": [[5, "monolithic"]],
    }
    assert os.fstat(opened["handle"]).st_size >= 0
    closed = worker.captures.obey("close", token=TOKEN)
    assert set(closed) == {"index_at", "bytes", "problem", "requests"} and closed["requests"] == []


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("stop", {}, "'stop' is neither open nor close"),
        ("close", {"token": 5}, "there is no capture 5"),
        ("open", {"token": 5, "fields": ["tokens"], "layers": None}, "'tokens' cannot be captured"),
        ("open", {"token": 5}, "missing 2 required"),
    ],
)
def test_what_cannot_be_done_is_told(worker: Worker, command: str, arguments: Any, said: str) -> None:
    assert said in worker.captures.obey(command, **arguments)["error"]
    assert worker.captures.idle and len(worker.recorder.captures) == 0


def test_a_capture_is_closed_once(worker: Worker) -> None:
    worker.close(worker.open())
    assert "there is no capture" in worker.captures.obey("close", token=TOKEN)["error"]


# Whose rows they are.


def test_marked_requests_are_captured_and_others_are_not(worker: Worker) -> None:
    first, second = worker.open(), worker.open(TOKEN + 1)
    fresh = [new(A), new(B, mark=None), new(C, mark=[TOKEN + 1, 4, 1])]
    assert worker.step((B, range(3)), (A, range(3)), (C, range(2)), new=fresh)
    assert worker.step((A, [3]), (B, [3]), (C, range(2, 3)))
    found, requests = worker.close(first)
    assert set(found) == {(0, 0)} and rows_of(worker, found[0, 0], A, range(4))
    assert requests == [{"sample": 0, "child": 0, "prompt": 3, "media": []}]
    found, requests = worker.close(second, TOKEN + 1)
    assert set(found) == {(4, 0)} and rows_of(worker, found[4, 0], C, range(3))
    assert requests == [{"sample": 4, "child": 0, "prompt": 3, "media": []}]


def test_samplings_are_numbered_by_their_names(worker: Worker) -> None:
    memory = worker.open()
    names = ["0_7-0123abcd", "11_7-0123abcd", "3_x-0123abcd"]
    fresh = [new(names[0], mark=[TOKEN, 2, 12]), new(names[1], mark=[TOKEN, 2, 12]), new(names[2], mark=[TOKEN, 5, 1])]
    worker.step(*((name, range(3)) for name in names), new=fresh)
    found, requests = worker.close(memory)
    assert [(request["sample"], request["child"]) for request in requests] == [(2, 0), (2, 11), (5, 0)]
    assert all(
        rows_of(worker, found[key], name, range(3)) for key, name in zip([(2, 0), (2, 11), (5, 0)], names, strict=True)
    )


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "capacity"), [(3, 4, 7), (3, None, MOST), (30, 20, MOST), (-1, 4, MOST), (30, 10, MOST)]
)
def test_the_room_for_a_request(worker: Worker, prompt: int, max_tokens: int | None, capacity: int) -> None:
    memory = worker.open()
    worker.step((A, range(2)), new=[new(A, prompt, max_tokens=max_tokens)])
    found, requests = worker.close(memory)
    assert {column.capacity for column in found[0, 0].values()} == {capacity} and requests[0]["prompt"] == prompt


def test_media_are_told(worker: Worker) -> None:
    memory = worker.open()
    picture = SimpleNamespace(modality="image", mm_position=SimpleNamespace(offset=1, length=2))
    worker.step((A, range(3)), new=[new(A, mm_features=[picture])])
    assert worker.close(memory)[1] == [{"sample": 0, "child": 0, "prompt": 3, "media": [[1, 3, "image"]]}]


def test_a_request_that_starts_over_stays_one(worker: Worker) -> None:
    memory = worker.open()
    worker.step((A, range(3)), new=[new(A)])
    worker.step((A, [3]))
    worker.step((A, range(2)), new=[new(A)])  # preempted, and sent as new
    worker.step((A, range(2, 5)))
    found, requests = worker.close(memory)
    assert len(requests) == 1 and rows_of(worker, found[0, 0], A, range(5))


def test_requests_of_a_capture_that_is_closed_are_nobodys(worker: Worker) -> None:
    worker.close(worker.open())
    memory = worker.open(TOKEN + 1)
    worker.step((A, range(3)), (B, [0]), new=[new(A), new(B, mark=[TOKEN + 1, 0, 1])])
    found, requests = worker.close(memory, TOKEN + 1)
    assert rows_of(worker, found[0, 0], B, range(1)) and len(requests) == 1


@pytest.mark.parametrize(
    "mark", [None, "on", 7, [], [TOKEN], [TOKEN, 0], [TOKEN, 0, 1, 1], ["x", 0, 1], [float("inf"), 0, 1], {"a": 1}]
)
def test_a_mark_of_somebody_else_is_passed_over(worker: Worker, mark: Any) -> None:
    """A server's clients can put what they like into `extra_args`."""
    memory = worker.open()
    assert not worker.step((A, range(3)), new=[new(A, mark=mark)])
    worker.step((A, [3]), (B, range(2)), new=[new(B)])
    found, requests = worker.close(memory)
    assert set(found) == {(0, 0)} and rows_of(worker, found[0, 0], B, range(2)) and len(requests) == 1


def test_requests_without_sampling_parameters(worker: Worker) -> None:
    memory = worker.open()
    assert not worker.step((A, range(3)), new=[new(A, sampling_params=None)])  # pooling
    assert not worker.step((B, range(3)), new=[new(B, mark=None)])
    assert worker.close(memory) == ({}, [])


# When steps are opened.


def test_without_a_trace_steps_are_opened_for_captured_requests_alone(worker: Worker) -> None:
    recorder, steps = worker.recorder, worker.steps
    assert not worker.step((A, range(3)), new=[new(A, mark=None)])
    assert not worker.step((A, [3])) and recorder.told == [] and len(steps._requests) == 0
    memory = worker.open()
    assert not worker.step((A, [4]))  # nobody that it wants has come yet
    assert recorder.told == [("begin", 1)] and not recorder.captures.under_way
    assert worker.step((A, [5]), (B, range(3)), new=[new(B)]) and recorder.captures.under_way
    assert worker.step((A, [6]), (B, [3]))
    found, _ = worker.close(memory)
    assert rows_of(worker, found[0, 0], B, range(4))
    recorder.told.clear()
    assert not worker.step((A, [7]), finished=[B])
    assert not recorder.captures.under_way and recorder.told == [("begin", 1)]
    recorder.told.clear()
    assert not worker.step((A, [8]))  # which goes on, and is nobody's concern any more
    assert recorder.told == [] and len(steps._requests) == 0
    assert not worker.step(finished=[A])
    assert not worker.step((C, range(3)), new=[new(C, mark=None)])
    assert recorder.told == [] and worker.captures.idle and len(steps._requests) == 0


def test_a_request_that_is_still_under_way_keeps_the_worker_awake(worker: Worker) -> None:
    memory = worker.open()
    worker.step((A, range(3)), new=[new(A)])
    worker.close(memory)
    assert not worker.captures.idle
    assert worker.step((A, [3])) is False  # nobody wants its rows any more
    worker.step(finished=[A])
    assert worker.captures.idle


def test_with_a_trace_each_step_is_opened_and_the_trace_has_it_all(tmp_path: Any) -> None:
    with Recorder(tmp_path / "t", fields="ids") as recorder:
        worker = Worker(recorder)
        assert worker.step((A, range(3)), new=[new(A, mark=None)])
        memory = worker.open()
        assert worker.step((A, [3]), (B, range(3)), new=[new(B)])
        assert worker.step((B, [3]), (A, [4]))
        found, _ = worker.close(memory)
        assert rows_of(worker, found[0, 0], B, range(4))
        assert worker.step((A, [5]), finished=[B])
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.rows == 10
    assert trace.request("0").positions.tolist() == list(range(6))
    assert trace.request("1").positions.tolist() == list(range(4))


# Rows that are announced.


@pytest.mark.parametrize("announces", [True, False])
def test_announced_runs_are_those_of_the_end_and_told_once(worker: Worker, announces: bool) -> None:
    worker.announces = announces
    memory = worker.open()
    worker.step((A, range(3)), (B, range(2)), new=[new(A), new(B, mark=None)])
    worker.step((B, [2]), (A, range(2, 5)))
    told = [
        [(0, 0, 3, PREFILL, 0), (1, 0, 2, PREFILL, 0)],
        # The third one for the second time: were it attributed twice, all of a's would be.
        [(1, 2, 1, PREFILL, 0), (0, 2, 1, PREFILL | RECOMPUTED, 1), (0, 3, 2, DECODE, 0)],
    ]
    said = [(what, runs) for what, runs in worker.recorder.told if what != "begin"]
    whats = ["announce", "end"] if announces else ["end"]
    assert said == [(what, runs) for runs in told for what in whats]
    assert rows_of(worker, worker.close(memory)[0][0, 0], A, range(5))


def test_a_model_that_calls_itself_announces_once(worker: Worker) -> None:
    memory = worker.open()
    output = scheduled([(A, range(3))], [new(A)], set())
    worker.runner.input_batch = SimpleNamespace(req_ids=[A], num_reqs=1)
    worker.runner.positions = worker.runner.input_ids = torch.arange(3)
    assert worker.steps.begin(output)
    worker.steps.announce()
    worker.steps.announce()
    worker.steps.end(output)
    worker.steps.announce()  # outside a step, as in a warm-up
    assert [what for what, _ in worker.recorder.told] == ["begin", "announce", "end"]
    worker.close(memory)


def test_a_batch_that_is_there_only_afterwards_is_not_announced() -> None:
    with Recorder() as recorder:
        worker = Worker(recorder, "newer")
        memory = worker.open()
        worker.step((A, range(3)), new=[new(A)])
        worker.step((A, [3]))
        assert [what for what, _ in recorder.told] == ["begin", "end"] * 2
        assert rows_of(worker, worker.close(memory)[0][0, 0], A, range(4))


def test_what_cannot_be_attributed_early_is_nobodys_in_the_end(worker: Worker) -> None:
    memory = worker.open()
    worker.step((A, range(3)), new=[new(A)])
    output = scheduled([(A, [3])], [], set())  # type: ignore[list-item]
    output.total_num_scheduled_tokens = 2
    assert worker.steps.begin(output)
    for tell in (worker.steps.announce, lambda: worker.steps.end(output)):
        with pytest.raises(ValueError, match="have 1 rows, the step has 2"):
            tell()
    assert worker.steps.end_as_nobodys(output)
    found, _ = worker.close(memory, problem="1 step or layer could not be captured; the log says why")
    assert rows_of(worker, found[0, 0], A, range(3))


def test_announced_rows_of_a_step_that_cannot_be_ended_are_captured_all_the_same(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the drain thread comes before the step ends or, as most often, only afterwards."""
    batch = worker.steps._batch

    def gone() -> Any:
        if worker.steps._announced is not None:
            raise LookupError("a fault of ours")
        return batch()

    memory = worker.open()
    monkeypatch.setattr(worker.steps, "_batch", gone)
    worker.runner.input_batch = SimpleNamespace(req_ids=[A], num_reqs=1)
    for step in range(4):
        rows = range(3 * step, 3 * step + 3)
        worker.runner.positions = worker.runner.input_ids = torch.tensor(rows)
        output = scheduled([(A, rows)], [] if step else [new(A, 12)], set())
        assert worker.steps.begin(output)
        worker.steps.announce()
        worker.model.forward([(A, rows)])
        if step % 2:
            assert worker.recorder._core.catch_up(60)
        with pytest.raises(LookupError, match="a fault of ours"):
            worker.steps.end(output)
        assert worker.steps.end_as_nobodys(output)
    assert rows_of(worker, worker.close(memory)[0][0, 0], A, range(12))


@pytest.mark.parametrize("taken", [True, False])
def test_a_step_that_is_given_up_after_it_was_announced_is_a_problem_of_the_capture(
    worker: Worker, taken: bool
) -> None:
    """Whatever the drain thread had taken of it: rows of some layers, of all, or none."""
    memory = worker.open()
    worker.step((A, range(3)), new=[new(A)])
    worker.runner.input_batch = SimpleNamespace(req_ids=[A], num_reqs=1)
    worker.runner.positions = worker.runner.input_ids = torch.tensor([3])
    assert worker.steps.begin(scheduled([(A, range(3, 4))], [], set()))
    worker.steps.announce()
    rows = [worker.model.rows(field, 0, A, [3]) for field in ("ids", "weights", "logits", "hidden")]
    worker.recorder.record(worker.model.bindings[0], *rows)  # the second layer raises
    if taken:
        assert worker.recorder._core.catch_up(60)
    worker.steps.abort()
    worker.step((A, range(4, 6)))
    found, _ = worker.close(memory, problem="1 step or layer could not be captured; the log says why")
    assert {column.spans for column in found[0, 0].values()} == {((0, 3), (4, 6))}


def test_steps_without_captures_are_not_announced() -> None:
    engine = StepsEngine("older")
    engine.recorder.announce = lambda runs: pytest.fail("it was announced")  # type: ignore[attr-defined]
    engine.step({A: (0, 2)}, new={A: 2})
    engine.steps.announce()
    engine.recorder.directory = None  # and with neither trace nor captures there are no steps, and nobody is followed
    assert engine.step({A: (2, 1)}) is None and engine.recorder.active == {}
    engine.step({}, finished=(A,))
    assert engine.step({B: (0, 2)}, new={B: 2}) is None and engine.recorder.active == {}
