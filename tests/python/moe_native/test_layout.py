"""The row rules against what vLLM's own `RoutedExpertsCapturer.capture` keeps of the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_native.runs import RUN_DTYPE, UNKNOWN
from moe_native.vllm import layout

TOP_K = 2
PADDING = -1


class Batch:
    """A batch over all data-parallel ranks: each has `real` rows of `tokens`, and expert ids that occur once."""

    def __init__(self, tokens: list[int], real: list[int], tp_size: int) -> None:
        self.tokens, self.real, self.tp_size = tokens, real, tp_size
        self.rows = []
        for rank, (count, of_it) in enumerate(zip(tokens, real, strict=True)):
            ids = torch.arange(count * TOP_K, dtype=torch.int32).reshape(count, TOP_K) + 1_000_000 * (rank + 1)
            ids[of_it:] = PADDING
            self.rows.append(ids)

    def tensor(self, kind: str, dp_rank: int, tp_rank: int) -> torch.Tensor:
        """What a router of this rank sees."""
        if kind == "own":  # the kernel dispatches by itself
            return self.rows[dp_rank]
        if kind == "all":  # gathered before routing
            return torch.cat(self.rows)
        if kind == "shard":
            return chunk(self.rows[dp_rank], tp_rank, self.tp_size)
        assert kind == "all shards"
        return torch.cat([chunk(rows, tp, self.tp_size) for rows in self.rows for tp in range(self.tp_size)])


def chunk(rows: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """A shard, as vLLM's models cut it."""
    from vllm.model_executor.models import utils

    with (
        mock.patch.object(utils, "get_tensor_model_parallel_world_size", lambda: tp_size),
        mock.patch.object(utils, "get_tensor_model_parallel_rank", lambda: tp_rank),
    ):
        return utils.sequence_parallel_chunk_impl(rows)


def captured_by_vllm(batch: Batch | None, kind: str, dp_rank: int, whole: torch.Tensor | None = None) -> torch.Tensor:
    """What the first tensor-parallel rank's capturer holds for this data-parallel rank."""
    capturer_module = pytest.importorskip("vllm.model_executor.layers.fused_moe.routed_experts_capturer")
    from vllm.forward_context import DPMetadata

    capturer = object.__new__(capturer_module.RoutedExpertsCapturer)
    capturer.dp_rank = dp_rank
    capturer.tp_size = 1 if batch is None else batch.tp_size
    capturer.device_buffer = torch.full((4096, 1, TOP_K), PADDING, dtype=torch.int32)
    metadata = None if batch is None else DPMetadata(torch.tensor(batch.tokens, dtype=torch.int32))
    sizes: Any = contextlib.nullcontext()
    if metadata is not None:
        sizes = metadata.sp_local_sizes(batch.tp_size if "shard" in kind else 1)
    group = SimpleNamespace(
        all_gather=lambda _, dim: torch.cat([batch.tensor(kind, dp_rank, tp) for tp in range(batch.tp_size)], dim)
    )
    with (
        sizes,
        mock.patch.object(capturer_module, "get_forward_context", lambda: SimpleNamespace(dp_metadata=metadata)),
        mock.patch.object(capturer_module, "get_tp_group", lambda: group),
    ):
        capturer.capture(0, batch.tensor(kind, dp_rank, 0) if whole is None else whole)
    return capturer.device_buffer[:, 0]


def kept_by_us(batch: Batch, kind: str, dp_rank: int, sequence_parallel: bool) -> torch.Tensor:
    """The same from our rules, merged over the tensor-parallel ranks that record; each row by exactly one of them."""
    rows = torch.full((batch.real[dp_rank], TOP_K), -2, dtype=torch.int32)
    for tp_rank in range(batch.tp_size):
        if not layout.records({"tensor_parallel_rank": tp_rank, "sequence_parallel": sequence_parallel}):
            continue
        plan = layout.plan(
            batch.real[dp_rank],
            [batch.tokens],
            dp_rank=dp_rank,
            tp_rank=tp_rank,
            tp_size=batch.tp_size,
            sequence_parallel=sequence_parallel,
        )
        tensor = batch.tensor(kind, dp_rank, tp_rank)
        start, first, count = next(place[1:] for place in plan.places[0] if place[0] == len(tensor))
        assert first == 0 and count == plan.rows
        for step_row, number in plan.kept:
            assert (rows[step_row : step_row + number] == -2).all()
            rows[step_row : step_row + number] = tensor[start : start + number]
    return rows


@st.composite
def batches(draw: st.DrawFn, tp_size: st.SearchStrategy[int]) -> Batch:
    tokens = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    return Batch(tokens, [draw(st.integers(0, n)) for n in tokens], draw(tp_size))


# (what the router sees, whether sequence-parallel MoE is configured)
CASES = [("all", False), ("own", False), ("all", True), ("own", True), ("all shards", True), ("shard", True)]


@pytest.mark.parametrize(("kind", "sequence_parallel"), CASES)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_the_rows_that_we_keep_are_those_of_vllms_device_buffer(
    kind: str, sequence_parallel: bool, data: st.DataObject
) -> None:
    batch = data.draw(batches(st.integers(2, 4) if sequence_parallel else st.integers(1, 3)))
    for dp_rank, real in enumerate(batch.real):
        ours = kept_by_us(batch, kind, dp_rank, sequence_parallel)
        assert torch.equal(ours, captured_by_vllm(batch, kind, dp_rank)[:real])
        assert torch.equal(ours, batch.rows[dp_rank][:real])


@given(rows=st.integers(0, 40), padding=st.integers(0, 8))
@settings(deadline=None, max_examples=30)
def test_without_data_parallelism_they_are_the_first_rows(rows: int, padding: int) -> None:
    assert not layout.needs_places({"data_parallel_size": 1, "sequence_parallel": False, "microbatches": 1})
    ids = torch.arange((rows + padding) * TOP_K, dtype=torch.int32).reshape(-1, TOP_K)
    assert torch.equal(captured_by_vllm(None, "", 0, ids)[:rows], ids[:rows])


@settings(deadline=None, max_examples=200)
@given(batch=batches(st.integers(2, 4)), sequence_parallel=st.booleans(), extra=st.integers(1, 50))
def test_a_tensor_of_another_length_has_no_place_and_vllm_refuses_it(
    batch: Batch, sequence_parallel: bool, extra: int
) -> None:
    kinds = ("all", "own", "all shards", "shard")
    lengths = [len(batch.tensor(kind, 0, 0)) for kind in kinds]
    known, n = set(lengths if sequence_parallel else lengths[:2]), max(lengths) + extra
    shard = layout.shard(
        batch.real[0],
        batch.tokens,
        dp_rank=0,
        tp_rank=0,
        tp_size=batch.tp_size,
        sequence_parallel=sequence_parallel,
    )
    assert set(shard.starts) == known
    with pytest.raises(AssertionError, match="unexpected topk_ids batch dim"):
        captured_by_vllm(batch, "shard", 0, torch.zeros((n, TOP_K), dtype=torch.int32))


@given(batch=batches(st.integers(1, 4)), sequence_parallel=st.booleans(), data=st.data())
@settings(deadline=None)
def test_layouts_of_one_length_agree(batch: Batch, sequence_parallel: bool, data: st.DataObject) -> None:
    """So that the length of a tensor alone says where the rows are."""
    dp_rank = data.draw(st.integers(0, len(batch.tokens) - 1))
    for tp_rank in range(batch.tp_size):
        own = layout.shard(
            batch.real[dp_rank],
            batch.tokens,
            dp_rank=dp_rank,
            tp_rank=tp_rank,
            tp_size=batch.tp_size,
            sequence_parallel=sequence_parallel,
        )
        for kind in ("all", "own", *(("all shards", "shard") if sequence_parallel else ())):
            tensor = batch.tensor(kind, dp_rank, tp_rank)
            start = own.starts[len(tensor)]
            assert torch.equal(
                tensor[start : start + own.count], batch.rows[dp_rank][own.first : own.first + own.count]
            )


@given(
    split=st.integers(1, 20),
    last=st.integers(0, 20),
    missing=st.integers(0, 30),
    dp_size=st.integers(1, 3),
    sequence_parallel=st.booleans(),
    tp_size=st.integers(1, 3),
    kind=st.sampled_from(["all", "own", "all shards", "shard"]),
)
@settings(deadline=None)
def test_microbatches_are_one_after_the_other(
    split: int, last: int, missing: int, dp_size: int, sequence_parallel: bool, tp_size: int, kind: str
) -> None:
    """As vLLM splits a batch: at the middle of the padded rows, the padding at the end."""
    sizes = [split, split + last]
    rows = max(sum(sizes) - missing, 0)
    reals = [min(rows, split), max(rows - split, 0)]
    if "shard" in kind and not sequence_parallel:
        kind = "all"
    dp_rank = dp_size - 1
    step = torch.arange(rows * TOP_K, dtype=torch.int32).reshape(rows, TOP_K)
    found = torch.full_like(step, -2)
    for tp_rank in range(tp_size if sequence_parallel else 1):
        plan = layout.plan(
            rows,
            [[n] * dp_size for n in sizes],
            dp_rank=dp_rank,
            tp_rank=tp_rank,
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
        )
        recorded = torch.full((plan.rows, TOP_K), -2, dtype=torch.int32)
        for number, (size, real) in enumerate(zip(sizes, reals, strict=True)):
            part = Batch([size] * dp_size, [real] * dp_size, tp_size)
            part.rows[dp_rank][:real] = step[number * split :][:real]
            tensor = part.tensor(kind, dp_rank, tp_rank)
            start, first, count = next(place[1:] for place in plan.places[number] if place[0] == len(tensor))
            recorded[first : first + count] = tensor[start : start + count]
        kept = layout.cut_rows(np.arange(rows), plan.kept)
        assert (found[kept] == -2).all()
        found[kept] = recorded
    assert torch.equal(found, step)


def test_more_rows_than_the_batches_have_are_refused() -> None:
    rank = {"dp_rank": 0, "tp_rank": 0, "tp_size": 2, "sequence_parallel": True}
    with pytest.raises(ValueError, match="5 rows"):
        layout.plan(5, [[4, 9]], **rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 rows in a batch of 4"):
        layout.shard(5, [4, 9], **rank)  # type: ignore[arg-type]


def test_prefill_context_parallelism_is_a_named_hole() -> None:
    assert not layout.obstacle({"prefill_context_parallel_size": 1})
    assert "context" in layout.obstacle({"prefill_context_parallel_size": 2})


# Cutting down what was found out for a whole step.


@st.composite
def spans(draw: st.DrawFn, rows: int) -> list[layout.Span]:
    edges = sorted(draw(st.lists(st.integers(0, rows), max_size=6).filter(lambda edges: len(edges) % 2 == 0)))
    return [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@given(runs=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 5)), max_size=8), data=st.data())
def test_cut_runs_are_the_runs_of_the_kept_rows(runs: list[tuple[int, bool, int]], data: st.DataObject) -> None:
    table = np.zeros(len(runs), RUN_DTYPE)
    for item, (request, known, count) in zip(table, runs, strict=True):
        item["request"], item["count"], item["cls"], item["flags"] = request, count, request + 1, request + 2
        item["position"] = 10 * request if known else UNKNOWN

    def rows(of: np.ndarray) -> list[tuple[int, ...]]:
        return [
            (r["request"], UNKNOWN if r["position"] == UNKNOWN else int(r["position"]) + i, r["cls"], r["flags"])
            for r in of
            for i in range(r["count"])
        ]

    whole = rows(table)
    kept = data.draw(spans(len(whole)))
    cut = layout.cut_runs(table, kept)
    assert cut.dtype == RUN_DTYPE and rows(cut) == [row for a, n in kept for row in whole[a : a + n]]
    numbers = layout.cut_rows(np.arange(len(whole)), kept)
    first = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - first))
    places = [i for start, n in layout.cut_span(first, count, kept) for i in range(start, start + n)]
    assert numbers[places].tolist() == [row for row in numbers if first <= row < first + count]


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> Iterator[None]:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    yield
