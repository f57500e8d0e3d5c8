"""Runs are the rows again, joined as far as they follow each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_native.runs import RUN_DTYPE, UNKNOWN, join_rows, row_class


def test_row_class_bits():
    assert row_class() == 0
    assert row_class("prefill", "text", True) == 1 | 1 << 2 | 1 << 6
    assert row_class("decode", "audio", False) == 2 | 4 << 2


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match=r"prefil.*decode"):
        row_class("prefil")
    with pytest.raises(ValueError, match="modality"):
        row_class(modality="smell")


rows = st.lists(
    st.tuples(
        st.integers(0, 2), st.one_of(st.integers(0, 5), st.just(UNKNOWN), st.just(UNKNOWN - 1)), st.integers(0, 1)
    ),
    max_size=40,
)


@given(rows)
def test_expanding_the_runs_gives_the_rows(rows):
    requests, positions, classes = (np.array([row[i] for row in rows], dt) for i, dt in enumerate(["u4", "u4", "u2"]))
    runs = join_rows(requests, positions, classes)
    assert runs.dtype == RUN_DTYPE
    expanded = [
        (run["request"], UNKNOWN if run["position"] == UNKNOWN else run["position"] + i, run["cls"])
        for run in runs
        for i in range(run["count"])
    ]
    assert expanded == rows
    assert all(run["count"] > 0 for run in runs)


def test_what_follows_is_one_run():
    runs = join_rows(np.zeros(1000, "u4"), np.arange(1000, dtype="u4"), np.zeros(1000, "u2"))
    assert len(runs) == 1
    assert len(join_rows(np.zeros(9, "u4"), np.full(9, UNKNOWN, "u4"), np.zeros(9, "u2"))) == 1
