"""Whose rows a vLLM step has, on batches in the shapes of both of vLLM's model runners."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_native.runs import RUN_DTYPE, UNKNOWN, row_class
from moe_native.vllm.steps import Steps, external_id

PREFILL, DECODE = row_class("prefill", "text", True), row_class("decode", "text", True)
IMAGE = row_class("prefill", "image", True)


class FakeRecorder:
    """Takes what `Steps` gives a `Recorder`, and checks what a recorder would refuse."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}  # of all requests there ever were
        self.info: dict[str, dict[str, Any]] = {}
        self.active: dict[str, int] = {}
        self.open_rows: int | None = None
        self.admit = True
        self.steps: list[list[tuple[Any, ...]]] = []
        self.tokens: list[list[int] | None] = []
        self.begun = 0
        self.fields: tuple[str, ...] = ("ids", "weights")
        self.amended: list[tuple[int, int, int, list[str]]] = []

    @property
    def step_number(self) -> int:
        return self.begun - 1

    def amend(self, step: int, row: int, count: int, flags: list[str]) -> None:
        self.amended.append((step, row, count, flags))

    def begin_step(self, rows: int) -> bool:
        assert self.open_rows is None
        self.begun += 1
        if self.admit:
            self.open_rows = rows
        return self.admit

    def end_step(self, runs: np.ndarray, tokens: np.ndarray | None = None) -> bool:
        assert runs.dtype == RUN_DTYPE
        if runs["count"].sum() != self.open_rows:
            raise ValueError("the runs do not cover the step's rows")
        self.open_rows = None
        self.steps.append([(self.names.get(run[0]), *run[1:]) for run in runs.tolist()])
        self.tokens.append(None if tokens is None else tokens.tolist())
        return True

    def abort_step(self) -> None:
        self.open_rows = None

    def request(self, id: str, **info: Any) -> int:
        index = self.active.setdefault(id, len(self.names))
        self.names[index] = id
        self.info.setdefault(id, {}).update(info)
        return index

    def finish(self, id: str) -> None:
        del self.active[id]


class Engine:
    """A scheduler and a model runner, as far as `Steps` looks at them."""

    def __init__(self, kind: str = "older") -> None:
        self.kind = kind
        self.recorder = FakeRecorder()
        self.runner = SimpleNamespace()
        self.steps = Steps(self.recorder, self.runner)  # type: ignore[arg-type]

    def step(
        self,
        scheduled: dict[str, tuple[int, int]],  # request -> (first position, count), in the order of the batch
        new: dict[str, int | SimpleNamespace] | None = None,  # request -> prompt's length
        finished: tuple[str, ...] = (),
        padding: int = 3,
        drafts: dict[str, int] | None = None,  # request -> how many of its tokens are drafts
    ) -> list[tuple[Any, ...]] | None:
        positions = [p for first, count in scheduled.values() for p in range(first, first + count)] + [0] * padding
        tokens = torch.tensor([1000 + p for p in positions], dtype=torch.int32)
        batch = SimpleNamespace(req_ids=list(scheduled), num_reqs=len(scheduled))
        if self.kind == "older":
            # A tensor, and a buffer with a host side; the batch has room for more requests than there are.
            batch.req_ids.append(None)
            self.runner.input_batch = batch
            self.runner.positions = torch.tensor(positions)
            self.runner.input_ids = SimpleNamespace(cpu=tokens)
            self.runner.execute_model_state = SimpleNamespace(scheduler_output=None)
        else:
            batch.positions, batch.input_ids = torch.tensor(positions), tokens
            self.runner.execute_model_state = SimpleNamespace(input_batch=batch)
        output = SimpleNamespace(
            finished_req_ids=set(finished),
            scheduled_new_reqs=[
                data
                if isinstance(data, SimpleNamespace)
                else SimpleNamespace(req_id=name, prompt_token_ids=[0] * data, mm_features=[])
                for name, data in (new or {}).items()
            ],
            num_scheduled_tokens={name: count for name, (_, count) in sorted(scheduled.items())},
            scheduled_spec_decode_tokens={name: [7] * count for name, count in (drafts or {}).items()},
            total_num_scheduled_tokens=sum(count for _, count in scheduled.values()),
        )
        if not self.steps.begin(output):
            return None
        assert self.steps.end(output)
        return self.recorder.steps[-1]


@pytest.fixture(params=["older", "newer"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


A, B, C = "a-0123abcd", "b-89abcdef", "c-00000000"


def test_a_request_from_its_prompt_to_its_end(engine: Engine) -> None:
    assert engine.step({A: (0, 5)}, new={A: 5}) == [("a", 0, 5, PREFILL, 0)]
    assert engine.step({A: (5, 1)}) == [("a", 5, 1, DECODE, 0)]
    assert engine.step({A: (6, 1)}) == [("a", 6, 1, DECODE, 0)]
    assert engine.step({}, finished=(A,)) is None
    assert engine.recorder.info == {"a": {"internal": A, "prompt_len": 5}}
    assert not engine.recorder.active


def test_requests_of_a_batch_come_in_the_order_of_its_rows(engine: Engine) -> None:
    engine.step({A: (0, 4)}, new={A: 4})
    assert engine.step({B: (0, 3), A: (4, 1)}, new={B: 7}) == [("b", 0, 3, PREFILL, 0), ("a", 4, 1, DECODE, 0)]
    # The batch is reordered, and another request joins.
    assert engine.step({A: (5, 1), C: (2, 2), B: (3, 4)}, new={C: 4}) == [
        ("a", 5, 1, DECODE, 0),
        ("c", 2, 2, PREFILL, 0),  # its first two positions were in the prefix cache
        ("b", 3, 4, PREFILL, 0),
    ]
    assert engine.step({A: (6, 1), C: (4, 1)}) == [("a", 6, 1, DECODE, 0), ("c", 4, 1, DECODE, 0)]


def test_the_phase_changes_exactly_at_the_prompts_end(engine: Engine) -> None:
    engine.step({A: (0, 2)}, new={A: 5})
    # Speculative decoding puts drafts behind the last piece of a prompt.
    assert engine.step({A: (2, 6)}) == [("a", 2, 3, PREFILL, 0), ("a", 5, 3, DECODE, 0)]


def test_positions_executed_before_are_marked(engine: Engine) -> None:
    engine.step({A: (0, 4)}, new={A: 4})
    engine.step({A: (4, 1)})
    engine.step({A: (5, 1)})
    # Preempted, and taken up again from the start: the scheduler sends it as new, or just goes on with it.
    assert engine.step({A: (0, 6)}, new={A: 4}) == [("a", 0, 4, PREFILL, 1), ("a", 4, 2, DECODE, 1)]
    assert engine.step({A: (6, 1)}) == [("a", 6, 1, DECODE, 0)]
    assert engine.step({A: (5, 4)}) == [("a", 5, 2, DECODE, 1), ("a", 7, 2, DECODE, 0)]


def test_positions_that_were_cached_are_not_marked_when_they_are_executed_at_last(engine: Engine) -> None:
    engine.step({A: (4, 2)}, new={A: 8})  # four positions came from the prefix cache
    assert engine.step({A: (0, 8)}, new={A: 8}) == [
        ("a", 0, 4, PREFILL, 0),
        ("a", 4, 2, PREFILL, 1),
        ("a", 6, 2, PREFILL, 0),
    ]


def test_rejected_drafts_are_amended_when_the_request_goes_on(engine: Engine) -> None:
    engine.step({A: (0, 4), B: (0, 4)}, new={A: 4, B: 4})
    engine.recorder.admit = False
    engine.step({A: (4, 1), B: (4, 1)})  # step 1 is refused
    engine.recorder.admit = True
    engine.step({A: (5, 4), B: (5, 3), C: (0, 2)}, new={C: 2}, drafts={A: 3, B: 2})  # step 2: drafts in rows 1-3, 5-6
    assert engine.recorder.amended == []
    # One of a's drafts was accepted, both of b's were.
    engine.step({B: (8, 3), A: (7, 1), C: (2, 1)}, drafts={B: 2})
    assert engine.recorder.amended == [(2, 2, 2, ["rejected"])]
    # b is preempted: what became of its drafts is not known.
    engine.step({B: (0, 4), A: (8, 1)})
    assert len(engine.recorder.amended) == 1
    engine.step({A: (9, 3)}, drafts={A: 2})
    engine.step({B: (4, 1)}, finished=(A,))
    assert len(engine.recorder.amended) == 1 and not engine.steps._drafts


def test_drafts_are_not_judged_by_a_step_that_was_not_seen(engine: Engine) -> None:
    engine.step({A: (0, 4)}, new={A: 4})
    engine.step({A: (4, 4)}, drafts={A: 3})
    engine.recorder.admit = False
    engine.step({A: (5, 2)})  # all of them were rejected, but this step is refused
    engine.recorder.admit = True
    engine.step({A: (7, 1)})  # which looks as if two had been accepted
    assert engine.recorder.amended == []


def test_image_positions_of_a_prompt_have_their_modality(engine: Engine) -> None:
    picture = SimpleNamespace(modality="image", mm_position=SimpleNamespace(offset=2, length=3))
    depth = SimpleNamespace(modality="depth", mm_position=SimpleNamespace(offset=6, length=1))
    new = SimpleNamespace(req_id=A, prompt_token_ids=[0] * 8, mm_features=[picture, depth])
    assert engine.step({A: (0, 4)}, new={A: new}) == [("a", 0, 2, PREFILL, 0), ("a", 2, 2, IMAGE, 0)]
    assert engine.step({A: (4, 5)}) == [
        ("a", 4, 1, IMAGE, 0),
        ("a", 5, 1, PREFILL, 0),
        ("a", 6, 1, row_class("prefill", "unknown", True), 0),
        ("a", 7, 1, PREFILL, 0),
        ("a", 8, 1, DECODE, 0),
    ]


def test_a_request_that_was_there_before_has_no_phase(engine: Engine) -> None:
    assert engine.step({A: (7, 2)}) == [("a", 7, 2, row_class("unknown", "text", True), 0)]


def test_two_requests_of_one_name_stay_apart(engine: Engine) -> None:
    first, second = "same-00000001", "same-00000002"
    assert engine.step({first: (0, 2), second: (0, 3)}, new={first: 2, second: 3}) == [
        ("same", 0, 2, PREFILL, 0),
        (second, 0, 3, PREFILL, 0),
    ]
    engine.step({}, finished=(first, second))
    assert engine.step({"same-00000003": (0, 2)}, new={"same-00000003": 2}) == [("same", 0, 2, PREFILL, 0)]


def test_slots_are_used_again_and_clean(engine: Engine) -> None:
    for n in range(300):
        name = f"r{n}-0000000f"
        previous = (f"r{n - 1}-0000000f",) if n else ()
        assert engine.step({name: (0, 3)}, new={name: 3}, finished=previous) == [(f"r{n}", 0, 3, PREFILL, 0)]
    assert len(engine.steps._index) == 64
    many = {f"m{n}-0000000f": (0, 1) for n in range(200)}
    assert engine.step(many, new=dict.fromkeys(many, 1)) == [(f"m{n}", 0, 1, PREFILL, 0) for n in range(200)]


def test_the_name_of_a_request_that_ends_is_not_kept_for_the_next_in_its_place(engine: Engine) -> None:
    engine.step({A: (0, 2)}, new={A: 2})
    # The same internal id comes back as a new request, in a batch that looks like the one before.
    assert engine.step({A: (0, 2)}, new={A: 2}, finished=(A,)) == [("a", 0, 2, PREFILL, 0)]
    assert len(engine.recorder.names) == 2


def test_rows_that_do_not_add_up_are_nobodys(engine: Engine) -> None:
    engine.step({A: (0, 2)}, new={A: 2})
    output = SimpleNamespace(
        finished_req_ids=set(), scheduled_new_reqs=[], num_scheduled_tokens={A: 1}, total_num_scheduled_tokens=5
    )
    assert engine.steps.begin(output) and engine.steps.end(output)
    assert engine.recorder.steps[-1] == [(None, UNKNOWN, 5, 0, 0)]


@pytest.mark.parametrize("kind", ["older", "newer"])
def test_tokens_are_those_of_the_rows_without_padding(kind: str) -> None:
    engine = Engine(kind)
    engine.recorder.fields = ("ids", "tokens")  # may change while serving, so it is asked at each step
    engine.step({A: (0, 3), B: (0, 2)}, new={A: 3, B: 2})
    assert engine.recorder.tokens == [[1000, 1001, 1002, 1000, 1001]]


def test_a_refused_step_is_not_closed(engine: Engine) -> None:
    engine.recorder.admit = False
    assert engine.step({A: (0, 2)}, new={A: 2}) is None
    engine.recorder.admit = True
    assert engine.step({A: (2, 1)}) == [("a", 2, 1, DECODE, 0)]


def test_external_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    assert external_id("chatcmpl-1234-0a1b2c3d") == "chatcmpl-1234"
    assert external_id("0_parent-0a1b2c3d") == "0_parent"  # one of several samples of a request
    assert external_id("no-suffix") == "no-suffix"
    assert external_id("upper-0A1B2C3D") == "upper-0A1B2C3D"
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    assert external_id("mine-0a1b2c3d") == "mine-0a1b2c3d"


def test_vllm_still_makes_ids_this_way() -> None:
    processor = pytest.importorskip("vllm.v1.engine.input_processor", reason="vLLM is not installed here")
    request = SimpleNamespace(request_id="mine", external_req_id=None)
    processor.InputProcessor.assign_request_id(request)
    assert request.request_id != "mine"
    assert external_id(request.request_id) == "mine"
