"""One segment, built by the tables of csrc/FORMAT.md, read back: every column, table and sum."""

from __future__ import annotations

import os

import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moe_trace


def opened(tmp_path_factory, data, name="000000.moe"):
    path = tmp_path_factory.mktemp("s") / name
    path.write_bytes(data)
    return moe_trace.open(path)


FLOATS = st.sampled_from(["float16", "float32", "bfloat16"])


@st.composite
def some_steps(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    k, wide = draw(st.integers(1, 9)), draw(st.booleans())
    experts = draw(st.integers(k, 600 if wide else 255))
    narrow = np.uint16 if experts > 255 or wide else np.uint8
    layers = draw(st.lists(st.integers(0, 65534), min_size=1, max_size=4, unique=True))
    fields = draw(st.sets(st.sampled_from(["weights", "logits", "hidden"])))
    dtypes = {name: draw(FLOATS) for name in sorted(fields)}
    tokens = draw(st.booleans())
    numbers = sorted(draw(st.sets(st.integers(0, 2**40), min_size=1, max_size=4)))
    steps = []
    for number in numbers:
        runs = draw(
            st.lists(
                st.tuples(
                    st.sampled_from([0, 1, 7, sb.NOBODY]),
                    st.sampled_from([0, 5, 2**32 - 50, sb.NOBODY]),
                    st.integers(1, 40),
                    st.integers(0, 2).flatmap(lambda p: st.integers(0, 4).map(lambda m: sb.cls(p, m))),
                    st.integers(0, 15),
                ),
                max_size=4,
            )
        )
        rows = sum(run[2] for run in runs)
        of_layers = {}
        for layer in layers:
            ids = rng.integers(0, experts, (rows, k)).astype(narrow)
            ids[rng.random(ids.shape) < 0.05] = np.iinfo(narrow).max
            of_layers[layer] = {"ids": ids}
            for name, dtype in dtypes.items():
                shape = (rows, {"weights": k, "logits": experts, "hidden": 8}[name])
                values = rng.standard_normal(shape).astype(np.float32)
                of_layers[layer][name] = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values.astype(dtype)
        token_ids = rng.integers(0, 2**32 - 1, rows, dtype=np.uint32) if tokens else None
        steps.append(sb.Step(number, runs, of_layers, token_ids, time_ns=10**18 + number))
    return steps


@settings(max_examples=150, deadline=None)
@given(some_steps(), st.booleans(), st.sampled_from([None, 0, 1]), st.booleans(), st.booleans(), st.integers(1, 4))
def test_round_trip(tmp_path_factory, steps, closed, codec, packed_directory, packed_metadata, steps_a_block):
    assume(any(step.rows for step in steps))
    blocks = [
        sb.rows_block(steps[i : i + steps_a_block], i // steps_a_block, codec=codec)
        for i in range(0, len(steps), steps_a_block)
    ]
    data = (
        sb.segment(
            blocks,
            {"model": "m" * 300},
            closed=closed,
            directory_codec=packed_directory and 1,
            codec=packed_metadata and 1,
        )
        if codec is None
        else sb.segment(blocks, {"model": "m" * 300}, closed=closed)
    )
    trace = opened(tmp_path_factory, data, "000000.moe" if closed else "000000.moe.open")
    assert trace.metadata["model"] == "m" * 300
    assert trace.rows == sum(step.rows for step in steps)
    assert np.array_equal(trace.positions, sb.per_row(steps, "position"))
    assert np.array_equal(trace.step_numbers, np.repeat([s.number for s in steps], [s.rows for s in steps]))
    if steps[0].tokens is not None:
        assert np.array_equal(trace.tokens, np.concatenate([step.tokens for step in steps]))
    for layer in steps[0].layers:
        one = trace.layer(layer)
        for name in steps[0].layers[layer]:
            expected, found = sb.exact(sb.of_rows(steps, layer, name)), getattr(one, name)
            assert found.dtype == expected.dtype and np.array_equal(found, expected, equal_nan=True), name
        ids = sb.of_rows(steps, layer)
        legal = ids != np.iinfo(ids.dtype).max
        counts = np.bincount(ids[legal], minlength=1)
        assert trim(one.counts()) == trim(counts)
        if "weights" in steps[0].layers[layer]:
            weights = sb.exact(sb.of_rows(steps, layer, "weights")).astype(np.float64)
            sums = np.bincount(ids[legal], weights=weights[legal], minlength=len(counts))
            assert np.allclose(one.weight_sums()[: len(sums)], sums, rtol=1e-9, atol=1e-9)
        stats = one.stats()[layer]
        assert (stats.rows, stats.invalid) == (len(ids), int((~legal).sum()))
        for phase in range(3):
            mine = sb.per_row(steps, "class") & 3 == phase
            part = one.phase(("unknown", "prefill", "decode")[phase])
            assert part.rows == mine.sum()
            assert np.array_equal(part.ids, ids[mine])
            assert trim(part.counts()) == trim(np.bincount(ids[mine][legal[mine]], minlength=1))


def trim(counts):
    return np.trim_zeros(np.asarray(counts), "b").tolist()


def test_counts_have_the_ledgers_length(tmp_path):
    steps, notes = sb.make_steps([5, 3], experts=7, k=2)
    path = tmp_path / "000000.moe"
    path.write_bytes(sb.segment([sb.rows_block(steps, notes=notes)], {"layers": sb.ledger(experts=512, k=2)}))
    trace = moe_trace.open(path)
    assert trace.layer(0).counts().shape == (512,)
    assert trace.layer([0, 3]).counts().shape == (2, 512)
    assert trace.layer(0).weight_sums().shape == (512,)


def test_a_segment_alone_is_whole(tmp_path):
    steps, notes = sb.make_steps([5, 3])
    path = tmp_path / "000004.moe"
    path.write_bytes(sb.segment([sb.rows_block(steps, notes=notes)], {"layers": sb.ledger()}, number=4))
    trace = moe_trace.open(path)
    assert (trace.state, trace.problems, trace.complete) == ("closed", [], True)
    assert set(trace.requests) == {"a", "b"}
    assert trace.requests["a"].prompt_len == 5


def test_a_segment_without_blocks(tmp_path):
    for closed in (True, False):
        path = tmp_path / f"00000{int(closed)}.moe"
        path.write_bytes(sb.segment([], {"layers": sb.ledger()}, closed=closed))
        trace = moe_trace.open(path)
        assert trace.rows == 0 and trace.first_time is None
        assert trace.layer(0).ids.shape[0] == 0
        assert trace.layer(0).counts().tolist() == [0] * 60


def test_zero_rows(tmp_path):
    steps, _ = sb.make_steps([4])
    empty = sb.Step(9, [], {layer: {n: a[:0] for n, a in f.items()} for layer, f in steps[0].layers.items()})
    path = tmp_path / "000000.moe"
    path.write_bytes(sb.segment([sb.rows_block([steps[0], empty])]))
    trace = moe_trace.open(path)
    assert trace.rows == 4 and trace.steps(9, 10).rows == 0 and trace.layer(0).ids.shape == (4, 4)


def test_unknown_entries_and_notes_are_skipped(tmp_path):
    """A later minor version adds fields, note types, flags and causes; all that is known still reads."""
    steps, notes = sb.make_steps([5])
    notes += [{"type": "novelty", "x": 1}, {"type": "amend", "step": 0, "row": 0, "count": 1, "set": ["new flag"]}]
    block = sb.rows_block(steps, notes=notes, losses=[(77, 1, 2, 3)])
    block.entries.insert(0, sb.entry(99, b"whatever", rows=1))
    block.entries += sb.column(90, 0, np.zeros((5, 2), np.uint8))
    path = tmp_path / "000000.moe"
    path.write_bytes(sb.segment([block], minor=3, compatible=0xFF))  # the flags of a later minor version
    trace = moe_trace.open(path)
    assert np.array_equal(trace.layer(0).ids, sb.of_rows(steps, 0))
    assert not trace.complete, "an unknown cause is a loss all the same"
    assert [(loss.steps, loss.layers, loss.rows) for loss in trace.losses.values()] == [(1, 2, 3)]


def test_a_column_reads_only_its_planes(tmp_path):
    """Damage in every other plane goes unnoticed by a question that does not need it."""
    steps, _ = sb.make_steps([50], logits=True)
    block = sb.rows_block(steps)
    for entry in block.entries:
        if entry.head[0] in (sb.IDS, sb.WEIGHTS, sb.LOGITS) and (entry.head[0], entry.head[4]) != (sb.IDS, 3):
            entry.spoil = True
    data = bytearray(sb.segment([block]))
    for entry in block.entries:
        if getattr(entry, "spoil", False):
            at = data.find(entry.stored)
            data[at] ^= 0xFF
    path = tmp_path / "000000.moe"
    path.write_bytes(data)
    trace = moe_trace.open(path)
    assert np.array_equal(trace.layer(3).ids, sb.of_rows(steps, 3))
    assert trace.layer(0).counts().sum() == 200  # from statistics
    for name in ("ids", "weights", "logits"):
        with pytest.raises(moe_trace.DamagedTrace, match=str(path)):
            getattr(trace.layer(0), name)


def test_what_is_not_there_is_told(tmp_path):
    steps, _ = sb.make_steps([5])
    path = tmp_path / "000000.moe"
    path.write_bytes(sb.segment([sb.rows_block(steps)], {"layers": sb.ledger()}))
    trace = moe_trace.open(path)
    with pytest.raises(moe_trace.TraceError, match="logits"):
        _ = trace.layer(0).logits
    with pytest.raises(moe_trace.TraceError, match="tokens"):
        _ = trace.tokens
    with pytest.raises(moe_trace.TraceError, match="layer 1"):
        trace.layer(1)


def test_opening_reads_little(tmp_path):
    """A long trace opens without reading its blocks: of a closed segment, the superblock, the trailer and the
    footer's header.
    """
    steps, notes = sb.make_steps([200] * 3)
    data = bytearray(sb.segment([sb.rows_block([s], i, notes=notes) for i, s in enumerate(steps)]))
    meta = len(sb.superblock({}))
    footer = data.rfind(b"MOEB")
    data[meta:footer] = bytes(footer - meta)  # all blocks are gone
    rank = sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [bytes(data)])
    trace = moe_trace.open(tmp_path / "t")
    assert trace.layer(0).counts().sum() == 3 * 200 * 4
    assert os.path.getsize(rank / "000000.moe") == len(data)
