"""`_C.RunningRequests`: whose rows a step has, from an engine's own lists and dictionaries. What a request's rows are
is tested in C++ (tests/cpp/core/request_rows_test.cc)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_native._C import RequestRows, RunningRequests
from moe_native.runs import DRAFT, MODALITIES, RUN_DTYPE, row_class

PREFILL, DECODE = row_class("prefill", "text", True), row_class("decode", "text", True)


def step(requests: dict[str, RequestRows], *, positions: Any = None, **what: Any) -> Any:
    """Two requests, of which `a` is at its prompt and `b` behind it, unless said otherwise."""
    asked = {"batch": ["a", "b"], "batch_size": 2, "scheduled": {"b": 1, "a": 3}, "speculated": {}} | what
    given = np.array([0, 1, 2, 7, 0, 0]) if positions is None else positions
    rows = asked.pop("rows", 4)
    under_way = RunningRequests()
    for id, request in requests.items():
        under_way.add(id, request)
    runs = under_way.execute(*asked.values(), given, rows)
    return None if runs is None else np.frombuffer(runs, RUN_DTYPE)


def two() -> dict[str, RequestRows]:
    return {"a": RequestRows(0, 3), "b": RequestRows(5, 4)}


def test_runs_are_in_the_order_of_the_batch() -> None:
    runs = step(two())
    assert runs.dtype == RUN_DTYPE
    assert runs.tolist() == [(0, 0, 3, PREFILL, 0), (5, 7, 1, DECODE, 0)]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.int16])
def test_positions_may_have_any_dtype_of_whole_numbers_and_any_stride(dtype: Any) -> None:
    spread = np.zeros(12, dtype)
    spread[::2] = [0, 1, 2, 7, 0, 0]
    assert step(two(), positions=spread[::2]).tolist() == step(two()).tolist()


def test_a_batch_may_have_room_for_more_and_be_no_list() -> None:
    assert step(two(), batch=("a", "b", None)).tolist() == step(two()).tolist()


def test_drafts_are_the_last_rows_of_a_request() -> None:
    runs = step(
        two(), scheduled={"a": 3, "b": 3}, speculated={"b": [9, 9]}, rows=6, positions=np.array([0, 1, 2, 7, 8, 9])
    )
    assert runs.tolist() == [(0, 0, 3, PREFILL, 0), (5, 7, 1, DECODE, 0), (5, 8, 2, DECODE | DRAFT, 0)]


def test_media_of_a_request() -> None:
    requests = two()
    requests["a"].set_media([(1, 2, MODALITIES["image"])])
    image = row_class("prefill", "image", True)
    assert [run[3] for run in step(requests).tolist()] == [PREFILL, image, PREFILL, DECODE]


def test_a_request_that_is_not_known_leaves_everything_as_it_was() -> None:
    requests = two()
    del requests["b"]
    assert step(requests) is None
    assert requests["a"].executed == 0


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ({"scheduled": {"a": 3}}, KeyError, "request b of the batch is not scheduled"),
        ({"scheduled": {"a": 3, "b": 2}}, ValueError, "the batch's requests have 5 rows, the step has 4"),
        ({"scheduled": {"a": 3, "b": -1}}, ValueError, "negative"),
        ({"speculated": {"b": [1, 2]}}, ValueError, "more drafts than rows"),
        ({"batch_size": 3}, ValueError, "fewer requests"),
        ({"positions": np.array([0, 1])}, ValueError, "more rows than its 2 positions"),
        ({"positions": np.array([-1, 0, 1, 7])}, ValueError, "row 0 has position -1"),
        ({"positions": np.array([2**32 - 1, 0, 1, 7])}, ValueError, "row 0 has position 4294967295"),
        ({"positions": np.zeros((2, 4), np.int64)}, ValueError, "one dimension"),
        ({"batch": 3}, TypeError, "no sequence"),
        ({"scheduled": [3, 1]}, TypeError, "dictionaries"),
        ({"positions": [0, 1, 2, 7]}, TypeError, "an array"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(what: Any, error: Any, says: str) -> None:
    requests = two()
    with pytest.raises(error, match=says):
        step(requests, **what)
    assert requests["a"].executed == requests["b"].executed == 0


def test_a_step_after_the_other() -> None:
    """What is remembered of the step before is never taken for what this one says."""
    under_way, random = RunningRequests(), np.random.default_rng(7)
    names = [f"request {n}" for n in range(12)]
    here: dict[str, RequestRows] = {}
    for step in range(400):
        if step % 3 == 0:  # else the batch of the step before
            for name in random.choice(names, 3):
                if name in here and random.random() < 0.5:
                    assert under_way.pop(name) is here.pop(name)
                elif name not in here:
                    here[name] = RequestRows(step, prompt=2)
                    under_way.add(name, here[name])
            batch = random.permutation(list(here)).tolist()
        if random.random() < 0.2:  # equal, and other objects
            batch = [str(name.encode(), "ascii") for name in batch]
        order = random.permutation(batch).tolist() if random.random() < 0.2 else batch
        counts = {name: int(random.integers(1, 4)) for name in order}
        rows = sum(counts.values())
        assert len(under_way) == len(here)
        starts = [here[name].executed for name in batch]
        positions = [p for name, start in zip(batch, starts, strict=True) for p in range(start, start + counts[name])]
        runs = under_way.execute(batch, len(batch), counts, {}, np.array(positions, np.int64), rows)
        assert runs is not None
        found = [(run[0], run[1] + n) for run in np.frombuffer(runs, RUN_DTYPE).tolist() for n in range(run[2])]
        owners = [here[name].index for name in batch for _ in range(counts[name])]
        assert found == list(zip(owners, positions, strict=True))
    assert under_way.get("nobody") is under_way.pop("nobody") is None
