"""`_C.attribute`: whose rows a step has, from an engine's own lists and dictionaries. What a request's rows are is
tested in C++ (tests/cpp/core/request_rows_test.cc)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_native._C import RequestRows, attribute
from moe_native.runs import DRAFT, MODALITIES, RUN_DTYPE, row_class

PREFILL, DECODE = row_class("prefill", "text", True), row_class("decode", "text", True)


def step(requests: dict[str, RequestRows], *, positions: Any = None, **what: Any) -> Any:
    """Two requests, of which `a` is at its prompt and `b` behind it, unless said otherwise."""
    asked = {"batch": ["a", "b"], "batch_size": 2, "scheduled": {"b": 1, "a": 3}, "speculated": {}, "rows": 4} | what
    given = np.array([0, 1, 2, 7, 0, 0]) if positions is None else positions
    return attribute(requests=requests, positions=given, **asked)


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
        ({"batch": 3}, TypeError, "incompatible"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(what: Any, error: Any, says: str) -> None:
    requests = two()
    with pytest.raises(error, match=says):
        step(requests, **what)
    assert requests["a"].executed == requests["b"].executed == 0
