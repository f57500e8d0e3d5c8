"""Steps whose rows only the forward context can tell, recorded by several ranks and threads, and read as one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import moe_native
import moe_trace
from moe_native.runs import RUN_DTYPE, row_class
from moe_native.vllm import forward
from moe_native.vllm.forward import Forward

EXPERTS, TOP_K, LAYERS = 1000, 2, (1, 4)
PREFILL = row_class("prefill", "text", True)


@pytest.fixture(autouse=True)
def _vllm() -> Iterator[None]:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    yield


def context(tokens: list[int] | None) -> Any:
    metadata = None if tokens is None else SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor(tokens))
    return SimpleNamespace(dp_metadata=metadata)


def in_context(tokens: list[int] | None) -> Any:
    from vllm import forward_context

    return mock.patch.object(forward_context, "_forward_context", context(tokens))


def expected(rank: int, rows: int) -> torch.Tensor:
    """Expert ids that say of which data-parallel rank and position they are."""
    return 50 * rank + torch.arange(rows)[:, None] + torch.tensor([0, 500])


def padded(ids: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([ids, torch.full((rows - len(ids), TOP_K), 999)])


class Model(torch.nn.Module):
    """Calls its routers with what it is given: for each layer the ids that they choose."""

    def __init__(self, recorder: moe_native.Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.bindings = [recorder.bind(layer, experts=EXPERTS, top_k=TOP_K) for layer in LAYERS]
        self.between: Any = lambda: None

    def forward(self, ids: list[torch.Tensor]) -> None:
        for binding, of_layer in zip(self.bindings, ids, strict=True):
            self.recorder.record(binding, of_layer, torch.ones(of_layer.shape))
            self.between()


class Rank:
    """One rank of an engine, with a recorder in the engine's run."""

    def __init__(self, path: Path, name: str, **parallel: Any) -> None:
        parallel = {
            "data_parallel_rank": 0, "tensor_parallel_rank": 0, "tensor_parallel_size": 1, "sequence_parallel": False,
            **parallel,
        }  # fmt: skip
        self.errors: list[str] = []
        self.recorder = moe_native.Recorder(
            path, run="run-engine", rank=name, lanes=2, ring_bytes="1MiB", metadata={"parallel": parallel}
        )
        self.model = Model(self.recorder)
        self.forward = Forward(self.model, self.recorder, parallel, self.guard)

    def guard(self, what: str, action: Any) -> None:
        try:
            action()
        except Exception as error:
            self.errors.append(f"{what}: {error}")

    def end(self, request: str, first: int, rows: int) -> None:
        run = (self.recorder.request(request, prompt_len=100), first, rows, PREFILL, 0)
        runs, tokens = self.forward.cut(np.array([run], RUN_DTYPE), np.arange(first, first + rows))
        assert tokens is not None and len(tokens) == runs["count"].sum()
        assert self.recorder.end_step(runs)


def test_a_data_parallel_rank_finds_its_rows_among_those_of_all(tmp_path: Path) -> None:
    ranks = [Rank(tmp_path, f"rank-0-dp{r}", data_parallel_rank=r) for r in range(2)]
    for first, real, tokens in ((0, [5, 3], [5, 3]), (5, [1, 2], [4, 4]), (6, [1, 0], [1, 0])):
        rows = [padded(expected(r, first + real[r])[first:], tokens[r]) for r in range(2)]
        for r, rank in enumerate(ranks):
            if real[r] == 0:
                continue  # an idle rank runs a dummy batch, which is no step
            assert rank.forward.begin(real[r])
            with in_context(tokens):
                rank.model([torch.cat(rows), rows[r]])  # the first layer gathers, the second does not
            rank.end(f"of {r}", first, real[r])
    for rank in ranks:
        rank.recorder.close()
        assert not rank.errors
    trace = moe_trace.open(tmp_path)
    assert trace.complete and trace.rows == 7 + 5 and len(trace.runs) == 1
    for r, positions in enumerate(([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 5, 6])):
        of_rank = trace.request(f"of {r}")
        assert of_rank.positions.tolist() == positions
        assert (of_rank.ids == expected(r, 7).numpy()[positions, None]).all()


def shards(rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    each = -(-len(rows) // size)
    return list(padded(rows, each * size).split(each))


def test_sequence_parallel_ranks_record_their_shards(tmp_path: Path) -> None:
    """Two ranks of two: one layer sees the shards of all, the other its own."""
    ranks = {
        (d, t): Rank(
            tmp_path, f"rank-{t}-tp{t}-dp{d}", data_parallel_rank=d,
            tensor_parallel_rank=t, tensor_parallel_size=2, sequence_parallel=True,
        )
        for d in range(2) for t in range(2)
    }  # fmt: skip
    for first, real, tokens in ((0, [7, 4], [7, 4]), (7, [1, 6], [4, 7]), (8, [2, 1], [2, 1])):
        rows = [padded(expected(d, first + real[d])[first:], tokens[d]) for d in range(2)]
        cut = [shards(of_rank, 2) for of_rank in rows]
        for (d, t), rank in ranks.items():
            assert rank.forward.begin(real[d])
            with in_context(tokens):
                rank.model([torch.cat([shard for of_rank in cut for shard in of_rank]), cut[d][t]])
            rank.end(f"of {d}", first, real[d])
    for rank in ranks.values():
        rank.recorder.close()
        assert not rank.errors
    trace = moe_trace.open(tmp_path)
    assert trace.complete, (trace.losses, trace.problems)
    assert trace.rows == 10 + 11
    for d, (rows_of, numbers) in enumerate((([7, 1, 2], range(10)), ([4, 6, 1], [*range(4), *range(7, 13), 8]))):
        of_rank = trace.request(f"of {d}")
        assert of_rank.rows == sum(rows_of)
        assert of_rank.positions.tolist() == list(numbers)  # in the order of execution, whoever recorded them
        wanted = expected(d, 20).numpy()[of_rank.positions]
        assert (of_rank.ids == wanted[:, None]).all()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_microbatches_in_threads_of_their_own(tmp_path: Path, sequence_parallel: bool) -> None:
    """Dual-batch overlap with vLLM's own contexts: two threads that hand over to each other after every layer."""
    from vllm.v1.worker import ubatching

    size = 2 if sequence_parallel else 1
    ranks = [
        Rank(
            tmp_path, f"rank-{t}", data_parallel_rank=1, tensor_parallel_rank=t, tensor_parallel_size=size,
            sequence_parallel=sequence_parallel,
        )
        for t in range(size)
    ]  # fmt: skip
    stream = object()
    with mock.patch.object(ubatching, "current_stream", lambda: stream):
        for first, real, halves in ((0, 13, [8, 8]), (13, 9, [4, 5]), (22, 3, [4, 4])):
            rows = padded(expected(1, first + real)[first:], sum(halves)).split(halves)
            for t, rank in enumerate(ranks):
                assert rank.forward.begin(real)
                others = [torch.full_like(half, 998) for half in rows]
                gathered = [
                    torch.cat([part for half in (other, own) for part in shards(half, size)])
                    for other, own in zip(others, rows, strict=True)
                ]
                alone = [shards(half, size)[t] for half in rows]
                run_microbatches(rank.model, halves, [[g, a] for g, a in zip(gathered, alone, strict=True)], stream)
                rank.end("r", first, real)
    for rank in ranks:
        rank.recorder.close()
        assert not rank.errors
    trace = moe_trace.open(tmp_path)
    assert trace.complete, (trace.losses, trace.problems)
    order = np.argsort(trace.positions)
    assert trace.positions[order].tolist() == list(range(25))
    assert (trace.ids[order] == expected(1, 25).numpy()[:, None]).all()


def run_microbatches(model: Model, halves: list[int], inputs: list[list[torch.Tensor]], stream: Any) -> None:
    """As `UBatchWrapper._run_ubatches` does."""
    from vllm import forward_context
    from vllm.v1.worker import ubatching

    barrier = threading.Barrier(len(halves) + 1)
    events = [threading.Event() for _ in halves]
    ubatching._CURRENT_CONTEXTS.extend([None] * (len(halves) - len(ubatching._CURRENT_CONTEXTS)))
    contexts = [
        ubatching.UBatchContext(
            number, stream, stream, context([count, count]), barrier, events[number],
            events[(number + 1) % len(halves)], mock.Mock(), mock.Mock(),
        )
        for number, count in enumerate(halves)
    ]  # fmt: skip
    model.between = ubatching.dbo_yield

    def run(number: int) -> None:
        with contexts[number]:
            model(inputs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(halves))]
    with mock.patch.object(forward_context, "_forward_context", None):
        for thread in threads:
            thread.start()
        barrier.wait()
        events[0].set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("tokens", [None, [3, 3], [6]])
def test_what_the_context_does_not_tell_is_a_counted_loss(tokens: list[int] | None, tmp_path: Path) -> None:
    rank = Rank(tmp_path, "rank-0", data_parallel_rank=1)
    for _ in range(2):
        assert rank.forward.begin(5)
        with in_context(tokens):
            rank.model([expected(1, 5), expected(1, 5)])
        rank.end("r", 0, 5)
    rank.recorder.close()
    assert all("placing a step's rows" in error for error in rank.errors) and len(rank.errors) == 2
    trace = moe_trace.open(tmp_path)
    assert not trace.complete and trace.losses["bad_input"].layers == 2 * len(LAYERS)
    assert trace.rows == 0 and trace.counts().sum() == 0


def test_a_layer_of_an_unknown_layout_is_a_counted_loss_and_the_others_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rank = Rank(tmp_path, "rank-0", data_parallel_rank=1)
    for first in (0, 5):
        assert rank.forward.begin(5)
        with in_context([4, 5]):
            rank.model([expected(1, 5), expected(1, 8)])
        rank.end("r", first, 5)
    rank.recorder.close()
    trace = moe_trace.open(tmp_path)
    assert trace.layer(1).rows == 10
    assert trace.losses["bad_input"].layers == 2 and set(trace.losses) == {"bad_input"}
    assert {layer.layer: layer.status for layer in trace.coverage} == {1: "exact", 4: "missed"}
    assert sum("layer 4 is not recorded: in a layout of ranks" in r.getMessage() for r in caplog.records) == 1


def test_outside_a_step_the_hook_looks_at_nothing(tmp_path: Path) -> None:
    """As in warm-up, where the forward context may say anything."""
    rank = Rank(tmp_path, "rank-0")
    rank.model([expected(1, 5), expected(1, 8)])
    rank.recorder.close()
    assert not rank.errors and moe_trace.open(tmp_path).rows == 0


def test_a_model_that_is_compiled_as_a_whole_gets_no_hook() -> None:
    model = torch.nn.Linear(2, 2)
    assert not forward.obstacle(model)
    model.compile()
    assert "compiled as a whole" in forward.obstacle(model)


def test_the_hook_is_outside_of_a_compiled_part(tmp_path: Path) -> None:
    rank = Rank(tmp_path, "rank-0")
    torch._dynamo.reset()

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 3)
            self.call = torch.compile(self.inner, fullgraph=True, backend="eager")

        def forward(self, x: torch.Tensor) -> Any:
            return self.call(x)

    outer = Outer()
    places = Forward(outer, rank.recorder, rank.recorder._metadata.items["parallel"], rank.guard)
    for _ in range(2):
        assert places.begin(4)
        with in_context([4]), torch._dynamo.config.patch(error_on_recompile=True):
            outer(torch.ones(4, 3))
        rank.recorder.abort_step()
    rank.recorder.close()
    assert not rank.errors and places.kept == ((0, 4),)
