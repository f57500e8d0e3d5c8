"""Columns of blocks that are not of one width."""

from __future__ import annotations

import numpy as np

from moe_trace.batch import promote


def test_an_invalid_id_stays_one_where_narrow_and_wide_ids_meet():
    narrow = np.array([[1, 255]], np.uint8)  # of a layer with 255 experts or fewer
    wide = np.array([[300, 65535], [255, 0]], np.uint16)
    first, second = promote([narrow, wide])
    assert first.dtype == second.dtype == np.uint16
    assert first.tolist() == [[1, 65535]] and second.tolist() == wide.tolist()
    assert [part.dtype for part in promote([narrow, narrow])] == [np.uint8] * 2
