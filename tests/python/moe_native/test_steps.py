"""Whose rows a vLLM step has, on batches in the shapes of both of vLLM's model runners."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_native.runs import DRAFT, RECOMPUTED, RUN_DTYPE, UNKNOWN, row_class
from moe_native.vllm import layout
from moe_native.vllm.prefix import BlockOwners
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
        self.directory: Path | None = Path("trace")
        self.captures = SimpleNamespace(under_way=False, lose_step=lambda: None)

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

    def end_step(self, runs: np.ndarray | bytes, tokens: np.ndarray | None = None) -> bool:
        if isinstance(runs, bytes):
            runs = np.frombuffer(runs, RUN_DTYPE)
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

    def __init__(self, kind: str = "older", **options: Any) -> None:
        self.kind = kind
        self.recorder = FakeRecorder()
        self.runner = SimpleNamespace()
        self.steps = Steps(self.recorder, self.runner, **options)  # type: ignore[arg-type]

    def step(
        self,
        scheduled: dict[str, tuple[int, int]],  # request -> (first position, count), in the order of the batch
        new: dict[str, int | SimpleNamespace] | None = None,  # request -> prompt's length
        finished: tuple[str, ...] = (),
        padding: int = 3,
        drafts: dict[str, int] | None = None,  # request -> how many of its tokens are drafts
        blocks: dict[str, list[int]] | None = None,  # request -> the KV blocks that it gets now
        resumed: tuple[str, ...] = (),
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
                else SimpleNamespace(
                    req_id=name,
                    prompt_token_ids=[0] * data,
                    mm_features=[],
                    num_computed_tokens=scheduled[name][0],
                    block_ids=([0], (blocks or {}).get(name, [])),  # of a group that is not followed, and one that is
                )
                for name, data in (new or {}).items()
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=(going_on := [name for name in scheduled if name not in (new or {})]),
                new_block_ids=[([0], blocks[name]) if name in (blocks or {}) else None for name in going_on],
                num_computed_tokens=[scheduled[name][0] for name in going_on],
                resumed_req_ids=set(resumed),
            ),
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
    again = [("a", 0, 4, PREFILL | RECOMPUTED, 1), ("a", 4, 2, DECODE | RECOMPUTED, 1)]
    assert engine.step({A: (0, 6)}, new={A: 4}) == again
    assert engine.step({A: (6, 1)}) == [("a", 6, 1, DECODE, 0)]
    assert engine.step({A: (5, 4)}) == [("a", 5, 2, DECODE | RECOMPUTED, 1), ("a", 7, 2, DECODE, 0)]


def test_positions_that_were_cached_are_not_marked_when_they_are_executed_at_last(engine: Engine) -> None:
    engine.step({A: (4, 2)}, new={A: 8})  # four positions came from the prefix cache
    assert engine.step({A: (0, 8)}, new={A: 8}) == [
        ("a", 0, 4, PREFILL, 0),
        ("a", 4, 2, PREFILL | RECOMPUTED, 1),
        ("a", 6, 2, PREFILL, 0),
    ]


def test_rejected_drafts_are_amended_when_the_request_goes_on(engine: Engine) -> None:
    engine.step({A: (0, 4), B: (0, 4)}, new={A: 4, B: 4})
    engine.recorder.admit = False
    engine.step({A: (4, 1), B: (4, 1)})  # step 1 is refused
    engine.recorder.admit = True
    # Step 2: drafts in rows 1-3 and 5-6.
    assert engine.step({A: (5, 4), B: (5, 3), C: (0, 2)}, new={C: 2}, drafts={A: 3, B: 2}) == [
        ("a", 5, 1, DECODE, 0),
        ("a", 6, 3, DECODE | DRAFT, 0),
        ("b", 5, 1, DECODE, 0),
        ("b", 6, 2, DECODE | DRAFT, 0),
        ("c", 0, 2, PREFILL, 0),
    ]
    assert engine.recorder.amended == []
    # One of a's drafts was accepted, both of b's were.
    engine.step({B: (8, 3), A: (7, 1), C: (2, 1)}, drafts={B: 2})
    assert engine.recorder.amended == [(2, 2, 2, ["rejected"])]
    # b is preempted: what became of its drafts, in rows 1-2 of step 3, is not known.
    engine.step({B: (0, 4), A: (8, 1)})
    assert engine.recorder.amended[1:] == [(3, 1, 2, ["undecided"])]


def test_drafts_of_a_last_step_are_judged_by_what_the_sampler_returned(engine: Engine) -> None:
    engine.step({A: (0, 4), B: (0, 4)}, new={A: 4, B: 4})
    engine.step({A: (4, 4), B: (4, 3)}, drafts={A: 3, B: 2})
    engine.steps.sampled(SimpleNamespace(req_ids=[B, A], sampled_token_ids=[[5, 6, 7], [8]]))
    assert engine.recorder.amended == [(1, 1, 3, ["rejected"])]
    # Nothing more is said of them when the requests go on, or end.
    engine.step({A: (5, 3), B: (7, 2)}, drafts={A: 2, B: 1})
    engine.steps.sampled(SimpleNamespace())  # of another pipeline stage
    engine.step({A: (6, 1)}, finished=(B,))
    assert engine.recorder.amended[1:] == [(2, 4, 1, ["undecided"]), (2, 1, 2, ["rejected"])]


def test_drafts_are_judged_by_an_output_that_comes_later(engine: Engine) -> None:
    def output(tokens: dict[str, list[int]]) -> Any:
        whole = SimpleNamespace(req_ids=list(tokens), sampled_token_ids=list(tokens.values()))
        on_its_way = SimpleNamespace(get_output=lambda: whole)
        engine.steps.sampled(on_its_way)
        return on_its_way

    engine.step({A: (0, 4), B: (0, 4)}, new={A: 4, B: 4})
    engine.step({A: (4, 4), B: (4, 3)}, drafts={A: 3, B: 2})
    first = output({A: [1, 2], B: [3]})
    # a's next step comes before the output of the one before, and says it as well.
    engine.step({A: (6, 3), B: (5, 1)}, drafts={A: 2})
    assert engine.recorder.amended == [(1, 2, 2, ["rejected"]), (1, 5, 2, ["rejected"])]
    assert first.get_output().req_ids == [A, B]
    last = output({A: [4]})
    engine.step({B: (6, 1)})
    assert len(engine.recorder.amended) == 2
    # It was a's last step, and its output comes before the scheduler says that a has ended.
    assert last.get_output().sampled_token_ids == [[4]]
    engine.step({B: (7, 1)}, finished=(A,))
    assert engine.recorder.amended[2:] == [(2, 1, 2, ["rejected"])]


def test_at_the_end_drafts_are_judged_by_what_has_come_and_the_others_are_undecided(engine: Engine) -> None:
    engine.step({A: (0, 4), B: (0, 4)}, new={A: 4, B: 4})
    engine.step({A: (4, 4), B: (4, 3)}, drafts={A: 3, B: 2})
    output = SimpleNamespace(get_output=lambda: SimpleNamespace(req_ids=[A], sampled_token_ids=[[1, 2]]))
    engine.steps.sampled(output)
    output.get_output()
    engine.steps.close()
    assert engine.recorder.amended == [(1, 2, 2, ["rejected"]), (1, 5, 2, ["undecided"])]


class Half:
    """As `Forward` on a rank that records the second half of each step's rows."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, int]] = []

    def begin(self, rows: int) -> bool:
        self.kept = [(rows - rows // 2, rows // 2)]
        return self.recorder.begin_step(rows // 2)

    def cut(self, runs: np.ndarray, tokens: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        return layout.cut_runs(runs, self.kept), None if tokens is None else layout.cut_rows(tokens, self.kept)

    recorder: FakeRecorder


@pytest.mark.parametrize("kind", ["older", "newer"])
def test_a_rank_that_records_a_shard_has_its_runs_tokens_and_drafts_only(kind: str) -> None:
    engine = Engine(kind, forward=Half())
    engine.recorder.fields = ("ids", "tokens")
    engine.steps._forward.recorder = engine.recorder  # type: ignore[union-attr]
    assert engine.step({A: (0, 4), B: (0, 2)}, new={A: 4, B: 2}) == [("a", 3, 1, PREFILL, 0), ("b", 0, 2, PREFILL, 0)]
    assert engine.recorder.tokens == [[1003, 1000, 1001]]
    engine.step({A: (4, 4), B: (2, 2)}, drafts={A: 3, B: 1})  # drafts in rows 1-3 and 5, of which 3 and 5 are kept
    engine.step({A: (5, 1), B: (3, 1)})  # none was accepted
    assert engine.recorder.amended == [(1, 0, 1, ["rejected"]), (1, 2, 1, ["rejected"])]


def test_drafts_are_not_judged_by_a_step_that_was_not_seen(engine: Engine) -> None:
    engine.step({A: (0, 4)}, new={A: 4})
    engine.step({A: (4, 4)}, drafts={A: 3})
    engine.recorder.admit = False
    engine.step({A: (5, 2)})  # all of them were rejected, but this step is refused
    engine.recorder.admit = True
    engine.step({A: (7, 1)})  # which looks as if two had been accepted
    assert engine.recorder.amended == [(1, 1, 3, ["undecided"])]


def test_cached_positions_name_the_requests_whose_rows_they_share(engine: Engine) -> None:
    engine.steps.owners = BlockOwners(group=1, block_size=4)
    engine.step({A: (0, 10)}, new={A: 10}, blocks={A: [7, 8, 9]})
    # a's two full blocks are shared in the step in which b comes; c shares one of a's and one of b's own.
    engine.step({A: (10, 1), B: (8, 6)}, new={B: 14}, blocks={B: [7, 8, 3, 4]})
    assert engine.recorder.info["b"]["cached"] == [[0, 8, 0]]
    engine.step({A: (11, 1), B: (14, 1), C: (12, 1)}, new={C: 13}, blocks={C: [7, 8, 3, 5]})
    assert engine.recorder.info["c"]["cached"] == [[0, 8, 0], [8, 4, 1]]
    assert "cached" not in engine.recorder.info["a"]


def test_blocks_that_go_to_another_request_are_that_requests(engine: Engine) -> None:
    engine.steps.owners = BlockOwners(group=1, block_size=4)
    engine.step({A: (0, 4), B: (0, 4)}, new={A: 4, B: 4}, blocks={A: [1], B: [2]})
    engine.step({A: (4, 1)}, blocks={A: [5]}, finished=(B,))  # b's block 2 is free
    engine.recorder.admit = False
    engine.step({A: (8, 1)}, blocks={A: [2]})  # not recorded, but followed
    engine.recorder.admit = True
    engine.step({C: (12, 1)}, new={C: 13}, blocks={C: [1, 5, 2, 6]})
    assert engine.recorder.info["c"]["cached"] == [[0, 12, 0]]
    # a is preempted, and resumed with its first block and others.
    engine.step({A: (4, 8)}, blocks={A: [1, 8, 9]}, resumed=(A,))
    late = "d-00000000"
    engine.step({late: (12, 1)}, new={late: 13}, blocks={late: [1, 8, 2, 10]})
    assert engine.recorder.info["d"]["cached"] == [[0, 12, 0]]


@pytest.mark.parametrize("sent_as_new", [False, True])
def test_a_request_that_starts_over_may_find_more_in_the_cache_than_it_had_executed(
    engine: Engine, sent_as_new: bool
) -> None:
    engine.steps.owners = BlockOwners(group=1, block_size=4)
    # a and b have the same prompt, and execute it side by side; b is preempted in the middle of it.
    engine.step({A: (0, 4)}, new={A: 16}, blocks={A: [1, 2, 3, 4]})
    engine.step({A: (4, 4), B: (4, 4)}, new={B: 16}, blocks={B: [1, 5, 6, 7]})
    engine.step({A: (8, 8)})
    assert engine.recorder.info["b"]["cached"] == [[0, 4, 0]]
    options: dict[str, Any] = {"new": {B: 16}} if sent_as_new else {"resumed": (B,)}
    assert engine.step({B: (12, 4)}, blocks={B: [1, 2, 3, 8]}, **options) == [("b", 12, 4, PREFILL, 0)]
    assert engine.recorder.info["b"]["cached"] == [[0, 4, 0], [8, 4, 0]]


def test_what_a_request_executed_in_a_step_that_is_not_recorded_was_not_cached(engine: Engine) -> None:
    engine.steps.owners = BlockOwners(group=1, block_size=4)
    engine.recorder.admit = False
    engine.step({A: (0, 8)}, new={A: 12}, blocks={A: [1, 2]})
    engine.recorder.admit = True
    engine.step({A: (8, 4)}, blocks={A: [1, 2, 3]}, resumed=(A,))
    assert "cached" not in engine.recorder.info["a"]


def test_sources_that_are_not_known_are_said_to_be_so(engine: Engine) -> None:
    engine.step({A: (8, 2)}, new={A: 10}, blocks={A: [1, 2, 3]})
    assert engine.recorder.info["a"]["cached"] == [[0, 8, None]]  # nobody follows the blocks
    engine.steps.owners = BlockOwners(group=1, block_size=4)
    engine.step({B: (10, 2)}, new={B: 12}, blocks={B: [1, 2, 6]})
    assert engine.recorder.info["b"]["cached"] == [[0, 10, None]]  # computed before, and a part of a block
    engine.step({C: (12, 1)}, new={C: 13}, blocks={C: [1, 2, 6, 7]})
    assert engine.recorder.info["c"]["cached"] == [[0, 8, None], [8, 4, 1]]
    engine.steps.abort()  # something went wrong in a step: what it did to the blocks was not seen
    engine.step({"d-00000000": (12, 1)}, new={"d-00000000": 13}, blocks={"d-00000000": [1, 2, 6, 9]})
    assert engine.recorder.info["d"]["cached"] == [[0, 12, None]]


def test_a_scheduler_whose_blocks_cannot_be_read_is_recorded_without_sources(engine: Engine) -> None:
    engine.steps.owners = BlockOwners(group=5, block_size=4)
    assert engine.step({A: (0, 4)}, new={A: 4}, blocks={A: [1]}) == [("a", 0, 4, PREFILL, 0)]
    assert engine.steps.owners is None


def test_image_positions_of_a_prompt_have_their_modality(engine: Engine) -> None:
    picture = SimpleNamespace(modality="image", mm_position=SimpleNamespace(offset=2, length=3))
    depth = SimpleNamespace(modality="depth", mm_position=SimpleNamespace(offset=6, length=1))
    new = SimpleNamespace(req_id=A, prompt_token_ids=[0] * 8, mm_features=[picture, depth], num_computed_tokens=0)
    assert engine.step({A: (0, 4)}, new={A: new}) == [("a", 0, 2, PREFILL, 0), ("a", 2, 2, IMAGE, 0)]
    assert engine.step({A: (4, 5)}) == [
        ("a", 4, 1, IMAGE, 0),
        ("a", 5, 1, PREFILL, 0),
        ("a", 6, 1, row_class("prefill", "unknown", True), 0),
        ("a", 7, 1, PREFILL, 0),
        ("a", 8, 1, DECODE, 0),
    ]
    assert engine.recorder.info["a"]["media"] == [[2, 3, "image"], [6, 1, "unknown"]]


def test_a_request_that_was_there_before_has_no_phase(engine: Engine) -> None:
    assert engine.step({A: (7, 2)}) == [("a", 7, 2, row_class("unknown", "text", True), 0)]


def test_a_prompt_whose_length_is_not_known_has_no_phase(engine: Engine) -> None:
    embeddings = SimpleNamespace(
        req_id=A, prompt_token_ids=None, mm_features=[], num_computed_tokens=0, block_ids=([],)
    )
    assert engine.step({A: (0, 4)}, new={A: embeddings}) == [("a", 0, 4, row_class("unknown", "text", True), 0)]


def test_a_prompt_of_embeddings_is_as_long_as_they_are(engine: Engine) -> None:
    embeddings = SimpleNamespace(
        req_id=A,
        prompt_token_ids=None,
        prompt_embeds=np.zeros((4, 2)),
        mm_features=[],
        num_computed_tokens=0,
        block_ids=([],),
    )
    engine.step({A: (0, 4)}, new={A: embeddings})
    assert engine.recorder.info["a"]["prompt_len"] == 4


def test_a_step_is_given_up_whatever_else_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError

    engine.recorder.begin_step(1)
    monkeypatch.setattr(engine.steps._fates, "missed", fail)
    with pytest.raises(RuntimeError):
        engine.steps.abort()
    assert engine.recorder.open_rows is None


def test_two_requests_of_one_name_stay_apart(engine: Engine) -> None:
    first, second = "same-00000001", "same-00000002"
    assert engine.step({first: (0, 2), second: (0, 3)}, new={first: 2, second: 3}) == [
        ("same", 0, 2, PREFILL, 0),
        (second, 0, 3, PREFILL, 0),
    ]
    engine.step({}, finished=(first, second))
    assert engine.step({"same-00000003": (0, 2)}, new={"same-00000003": 2}) == [("same", 0, 2, PREFILL, 0)]


def test_requests_that_have_ended_are_forgotten(engine: Engine) -> None:
    for n in range(300):
        name = f"r{n}-0000000f"
        previous = (f"r{n - 1}-0000000f",) if n else ()
        assert engine.step({name: (0, 3)}, new={name: 3}, finished=previous) == [(f"r{n}", 0, 3, PREFILL, 0)]
        assert len(engine.steps._requests) == len(engine.steps._internal) == 1
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
    assert engine.steps.begin(output)
    with pytest.raises(ValueError, match="the batch's requests have 1 rows, the step has 5"):
        engine.steps.end(output)
    assert engine.steps.end_as_nobodys(output)
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
