"""What a recorder and the reader make of a whole run of a small scheduler, against what that scheduler knows: chunked
prefill, shared prefixes, preemption, drafts and pauses, in random order.

The ids of a row are the number of its step, so a row that is read says where it was executed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_native
import moe_trace
from moe_native.vllm.prefix import BlockOwners
from moe_native.vllm.steps import Steps
from moe_trace.sequence import STATES

BLOCK = 4
EXPERTS = 250


class Request:
    """What the scheduler knows of a request, and what it did."""

    def __init__(self, name: str, prompt: list[tuple[Any, int]], total: int) -> None:
        self.name, self.internal = name, f"{name}-0123abcd"
        self.tokens, self.prompt, self.total = prompt, len(prompt), total
        self.computed, self.blocks, self.seen = 0, list[int](), False
        self.rows: dict[int, int] = {}  # position -> the last recorded step that executed it, for good
        self.executed: set[int] = set()  # positions, recorded or not
        self.shared: dict[int, Request] = {}  # position -> who executed it instead
        self.undecided: tuple[int, range] | None = None  # step and positions of accepted drafts, before that is seen

    def forget_drafts(self, first: int = 0) -> None:
        """Nobody said in time that they were accepted: those from position `first` on do not count."""
        step, positions = self.undecided or (-1, ())
        for position in positions:
            if position >= first and self.rows.get(position) == step:
                del self.rows[position]
        self.undecided = None


class Blocks:
    """KV blocks as vLLM has them: freed ones keep their content until they are needed for something else."""

    def __init__(self, number: int) -> None:
        self.free, self.users = list(range(number)), [0] * number
        self.content: dict[int, tuple[Any, ...]] = {}
        self.block_of: dict[tuple[Any, ...], int] = {}
        self.writer: dict[tuple[int, int], Request] = {}

    def take(self, number: int) -> list[int]:
        taken = [self.free.pop(0) for _ in range(number)]
        for block in taken:
            self.users[block] = 1
            content = self.content.pop(block, None)
            if content is not None and self.block_of.get(content) == block:
                del self.block_of[content]
        return taken

    def hits(self, request: Request) -> list[int]:
        found: list[int] = []
        while (end := BLOCK * (len(found) + 1)) < len(request.tokens):
            block = self.block_of.get(tuple(request.tokens[:end]))
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.users[block] == 0:
                self.free.remove(block)
            self.users[block] += 1

    def release(self, request: Request) -> None:
        for block in reversed(request.blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)
        request.blocks, request.computed = [], 0

    def scheduled(self, request: Request, rows: int) -> None:
        """Full blocks can be shared from now on, before they are computed."""
        end = request.computed + rows
        for position in range(request.computed, end):
            self.writer[request.blocks[position // BLOCK], position % BLOCK] = request
        for number in range(min(end, len(request.tokens)) // BLOCK):
            content = tuple(request.tokens[: (number + 1) * BLOCK])
            self.content.setdefault(request.blocks[number], content)
            self.block_of.setdefault(content, request.blocks[number])


class Engine:
    def __init__(self, path: Path, seed: int, *, pauses: bool) -> None:
        self.random = random.Random(seed)
        self.recorder = moe_native.Recorder(path, sample=self.random.choice([1.0, 0.5]))
        self.binding = self.recorder.bind(layer=0, experts=EXPERTS, top_k=1)
        self.runner = SimpleNamespace()
        self.steps = Steps(self.recorder, self.runner)
        self.steps.owners = BlockOwners(0, BLOCK)
        self.blocks = Blocks(self.random.choice([8, 14, 24]))
        self.most_rows = self.random.choice([3, 99])  # of a request in a step
        self.resumed_as_new, self.drafts, self.pauses = self.random.random() < 0.5, self.random.random() < 0.5, pauses
        self.requests = [self.request(f"r{n}") for n in range(14)]
        self.waiting, self.running = list(self.requests), list[Request]()
        self.finished: list[Request] = []

    def request(self, name: str) -> Request:
        family, prompt = self.random.randrange(2), self.random.randrange(3, 26)
        tokens = [(family, position) for position in range(prompt)]
        return Request(name, tokens, prompt + self.random.randrange(1, 6))

    def run(self) -> None:
        while self.running or self.waiting:
            self.step(self.random.choice([3, 7, 12]))
        self.begin({}, {}, {}, [], [])
        self.recorder.close()

    def step(self, budget: int) -> None:
        rows: dict[Request, int] = {}
        drafts: dict[Request, int] = {}
        blocks: dict[Request, list[int]] = {}
        for request, number, draft in self.going_on(budget):
            rows[request], budget = number, budget - number
            if draft:
                drafts[request] = draft
            need = -(-(request.computed + number) // BLOCK) - len(request.blocks)
            blocks[request] = self.blocks.take(need)
            request.blocks += blocks[request]
            self.blocks.scheduled(request, number)
        begun: list[Request] = []
        resumed: list[Request] = []
        while self.waiting and budget and len(self.running) < 4:
            request = self.waiting[0]
            hits = self.blocks.hits(request)
            computed = len(hits) * BLOCK
            number = min(len(request.tokens) - computed, budget, self.most_rows)
            need = -(-(computed + number) // BLOCK) - len(hits)
            if need > len(set(self.blocks.free).difference(hits)):
                break
            self.running.append(self.waiting.pop(0))
            self.blocks.share(hits)
            request.blocks, request.computed = hits + self.blocks.take(need), computed
            for position in set(range(computed)).difference(request.executed, request.shared):
                writer = self.blocks.writer[request.blocks[position // BLOCK], position % BLOCK]
                request.shared[position] = writer
            self.blocks.scheduled(request, number)
            rows[request], blocks[request], budget = number, list(request.blocks), budget - number
            (resumed if request.seen else begun).append(request)
            request.seen = True
        if rows:
            self.execute(rows, drafts, blocks, begun, resumed)

    def going_on(self, budget: int) -> Iterator[tuple[Request, int, int]]:
        """Requests that run already, with their rows and how many of these are drafts. Where blocks are lacking, the
        last one is preempted."""
        for request in list(self.running):
            if not budget or request not in self.running:
                return
            number, draft = min(len(request.tokens) - request.computed, budget, self.most_rows), 0
            if self.drafts and request.computed == len(request.tokens) - 1:
                draft = min(self.random.randrange(4), budget - 1)
            number += draft
            while -(-(request.computed + number) // BLOCK) - len(request.blocks) > len(self.blocks.free):
                last = self.running.pop()
                self.blocks.release(last)
                self.waiting.insert(0, last)
                if last is request:
                    return
            budget -= number
            yield request, number, draft

    def begin(
        self,
        rows: dict[Request, int],
        drafts: dict[Request, int],
        blocks: dict[Request, list[int]],
        begun: list[Request],
        resumed: list[Request],
    ) -> Any:
        new = begun + (resumed if self.resumed_as_new else [])
        others = [request for request in self.running if request in rows and request not in new]
        output = SimpleNamespace(
            finished_req_ids={request.internal for request in self.finished},
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=r.internal, prompt_len=r.prompt, num_computed_tokens=r.computed, block_ids=(blocks[r],)
                )
                for r in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[request.internal for request in others],
                new_block_ids=[(blocks[request],) if blocks[request] else None for request in others],
                num_computed_tokens=[request.computed for request in others],
                resumed_req_ids={request.internal for request in others if request in resumed},
            ),
            num_scheduled_tokens={request.internal: number for request, number in rows.items()},
            scheduled_spec_decode_tokens={request.internal: [-1] * number for request, number in drafts.items()},
            total_num_scheduled_tokens=sum(rows.values()),
        )
        for request in self.finished:
            request.forget_drafts()
        self.finished = []
        return output, self.steps.begin(output)

    def execute(self, rows: dict[Request, int], drafts: dict[Request, int], *scheduled: Any) -> None:
        if self.pauses:
            (self.recorder.pause if self.random.random() < 0.2 else self.recorder.resume)()
        batch = self.random.sample(list(rows), len(rows))
        output, opened = self.begin(rows, drafts, *scheduled)
        number = self.steps.number
        positions = [p for request in batch for p in range(request.computed, request.computed + rows[request])]
        self.runner.input_batch = SimpleNamespace(req_ids=[r.internal for r in batch], num_reqs=len(batch))
        self.runner.positions = torch.tensor(positions)
        ids = torch.full((len(positions), 1), number, dtype=torch.int32)
        self.recorder.record(self.binding, ids, torch.ones(len(positions), 1))
        if opened:
            assert self.steps.end(output)
        else:
            for request in self.requests:
                request.forget_drafts()
        accepted = {request: self.happened(request, rows[request], drafts.get(request, 0), opened) for request in batch}
        if self.random.random() < 0.5:  # else the request's next step says it
            sampled = [[0] * (1 + accepted[request]) for request in drafts]
            self.steps.sampled(SimpleNamespace(req_ids=[r.internal for r in drafts], sampled_token_ids=sampled))
            for request in drafts:
                request.undecided = None

    def happened(self, request: Request, rows: int, drafts: int, recorded: bool) -> int:
        """A request's rows were executed; how many of its drafts are accepted."""
        number = self.steps.number
        accepted = min(self.random.randrange(drafts + 1), max(request.total - len(request.tokens) - 1, 0))
        if recorded and request.undecided is not None:  # where it goes on says which were accepted
            starts_over = request.computed < request.undecided[1].start
            request.forget_drafts(0 if starts_over else request.computed)
        end = request.computed + rows - drafts + accepted
        executed = range(request.computed, end)
        request.executed.update(executed)
        if recorded:
            request.rows.update(dict.fromkeys(executed, number))
            request.undecided = (number, executed[-accepted:]) if accepted else None
        request.tokens += [(request.name, len(request.tokens) + n) for n in range(accepted)]
        request.computed = end
        if end == len(request.tokens) == request.total:
            self.running.remove(request)
            self.blocks.release(request)
            self.finished.append(request)
        elif end == len(request.tokens):
            request.tokens.append((request.name, end))
        return accepted


def expected(request: Request, position: int, kept: set[str]) -> tuple[str, int | None, str | None]:
    """State, step and source of a position."""
    if position in request.rows:
        return "executed", request.rows[position], request.name
    source = request.shared.get(position)
    if source is None or position in request.executed:
        return "missing", None, None
    if source.name in kept and position in source.rows:
        return "cached", source.rows[position], source.name
    return "unresolved", None, None


@pytest.mark.parametrize("pauses", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_each_position_has_its_row(tmp_path: Path, seed: int, pauses: bool) -> None:
    engine = Engine(tmp_path, seed, pauses=pauses)
    engine.run()
    trace = moe_trace.open(tmp_path)
    kept = set(trace.requests)
    assert engine.steps.number < EXPERTS and (pauses or trace.complete)
    for request in engine.requests:
        if request.name not in kept or not request.rows:
            continue
        sequence = trace.layer(0).sequence(request.name)
        assert set(request.rows) <= set(range(len(sequence)))
        for position, state in enumerate(sequence.state):
            found = STATES[state], int(sequence.ids[position, 0]), sequence.sources[position]
            state_of, step, source = expected(request, position, kept)
            if pauses and state_of in ("missing", "unresolved") and found[0] in ("unresolved", "cached"):
                continue  # who executed it did so during a pause, and shares somebody else's since it started over
            assert found == (state_of, 255 if step is None else step, source), (request.name, position)
        current = trace.request(request.name).current()
        assert sorted(current.positions.tolist()) == sorted(request.rows)
