"""What lies in a ring for captures is not in the trace: neither when the ring is read nor when it is recovered."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import segment_bytes as sb
from crashes import META, Crash, both_ways, check, request_notes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_trace

AS_WELL, ONLY, WEIGHTS, LOGITS, HIDDEN = 8, 16, 32, 64, 128
COLUMNS = {"weights": WEIGHTS, "logits": LOGITS, "hidden": HIDDEN}


def wide_steps(sizes, layers=(0, 3, 5)):
    """Steps with all fields."""
    steps, notes = sb.make_steps(sizes, layers=layers, logits=True)
    rng = np.random.default_rng(1)
    for step in steps:
        for fields in step.layers.values():
            fields["hidden"] = rng.standard_normal((step.rows, 16)).astype(np.float32)
    return steps, notes


def columns(path):
    """{step: {(field, layer): rows}} of all that the trace has, whoever asks for it."""
    found = {}
    for block in (block for rank in moe_trace.open(path).ranks for block in rank.blocks()):
        ends = np.cumsum(block.steps["rows"])
        for number, rows, end in zip(block.steps["step"].tolist(), block.steps["rows"].tolist(), ends, strict=True):
            found[number] = {key: block.column(*key)[end - rows : end] for key in block.columns}
    return found


def check_columns(path, expected):
    """`expected` is {step: {layer: fields}}; the rows of a trace that was recovered are the same."""
    for _ in range(2):
        found = columns(path)
        assert found.keys() == expected.keys()
        for number, layers in expected.items():
            arrays = {(sb.FIELDS[name], layer): a for layer, of in layers.items() for name, a in of.items()}
            assert found[number].keys() == arrays.keys(), number
            assert all(np.array_equal(found[number][key], array) for key, array in arrays.items())
        trace = moe_trace.open(path)
        assert trace.problems == [] and trace.losses == {}
        moe_trace.recover(path)


def pause(ring, steps):
    """What the recorder counts of steps that come while it is paused."""
    ring.counters[8 + 3 * sb.PAUSED] += len(steps)
    ring.counters[8 + 3 * sb.PAUSED + 2] += sum(step.rows for step in steps)


def test_rows_that_are_for_captures_as_well_are_rows_like_any(tmp_path):
    steps, notes = sb.make_steps([5, 1, 8])
    crash = Crash(tmp_path)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []), flags=AS_WELL)
    crash.write()
    both_ways(crash, steps)
    assert moe_trace.open(crash.trace).complete


@pytest.mark.parametrize(
    "named", [set(), *({n} for n in COLUMNS), {"weights", "hidden"}, set(COLUMNS)], ids=lambda n: "+".join(sorted(n))
)
def test_columns(tmp_path, named):
    """They are not in the trace, and what lies behind them is where it was."""
    steps, notes = wide_steps([5, 7])
    crash = Crash(tmp_path)
    flags = AS_WELL | sum(COLUMNS[name] for name in named)
    for i, step in enumerate(steps):
        for layer in step.layers:  # one layer and one step have them all the same
            crash.ring.layer(step, layer, flags=AS_WELL if (i, layer) == (1, 3) else flags)
        crash.ring.step(step, *request_notes(notes if i == 0 else []))
    crash.write()
    left = [
        {
            layer: {name: a for name, a in of.items() if name not in named or (step.number, layer) == (1, 3)}
            for layer, of in step.layers.items()
        }
        for step in steps
    ]
    check_columns(crash.trace, dict(enumerate(left)))


def test_a_layer(tmp_path):
    """In chunks and in several lanes; of one step it is in the trace."""
    steps, notes = wide_steps([5, 7, 4])
    crash = Crash(tmp_path, lanes=2)
    for i, step in enumerate(steps):
        flags = 0 if i == 1 else ONLY | AS_WELL
        crash.ring.layer(step, 0)
        crash.ring.rows(step)
        crash.ring.layer(step, 5, 0, 3, flags=flags)
        crash.ring.layer(step, 5, 3, lane=1, flags=flags)
        crash.ring.layer(step, 3, lane=1)
        crash.ring.step(step, *request_notes(notes if i == 0 else []))
    crash.write()
    expected = {step.number: {layer: step.layers[layer] for layer in (0, 3)} for step in steps}
    expected[1] = steps[1].layers
    check_columns(crash.trace, expected)
    check(moe_trace.open(crash.trace), steps)


def test_all_layers_of_a_step_that_the_trace_has(tmp_path):
    """Its rows and whose they are stay."""
    steps, notes = sb.make_steps([5, 7])
    crash = Crash(tmp_path)
    for i, step in enumerate(steps):
        for layer in step.layers:
            crash.ring.layer(step, layer, flags=ONLY | AS_WELL if i == 1 else 0)
        crash.ring.step(step, *request_notes(notes if i == 0 else []))
    crash.write()
    check_columns(crash.trace, {0: steps[0].layers, 1: {}})
    assert moe_trace.open(crash.trace).ranks[0].row_totals == (12, 12)


@pytest.mark.parametrize("layer_flags", [ONLY | AS_WELL, 0])
@pytest.mark.parametrize("aborted", [False, True])
def test_steps_while_the_trace_was_paused(tmp_path, aborted, layer_flags):
    steps, notes = sb.make_steps([5, 6, 2, 7])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    for step in (steps[1], steps[3]):
        for layer in step.layers:
            crash.ring.layer(step, layer, flags=layer_flags)
        crash.ring.step(step, *request_notes([{"type": "request", "index": 7, "id": "c"}]), aborted=aborted, flags=ONLY)
        if step is steps[1]:
            crash.ring.whole(steps[2])
    pause(crash.ring, [steps[1], steps[3]])
    crash.write()
    both_ways(crash, [steps[0], steps[2]])
    trace = moe_trace.open(crash.trace)
    assert trace.complete and trace.losses == {} and trace.problems == []
    assert (trace.paused.steps, trace.paused.rows) == (2, 13)
    assert sorted(trace.requests) == ["a", "b"]


def test_killed_within_a_step_that_is_for_captures_only(tmp_path):
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.rows(steps[1])
    crash.ring.layer(steps[1], 0, flags=ONLY | AS_WELL)
    crash.ring.layer(steps[1], 3, 0, 2, flags=ONLY | AS_WELL)
    crash.write()
    both_ways(crash, steps[:1])
    assert moe_trace.open(crash.trace).complete


def test_killed_within_a_step_of_which_the_trace_has_some(tmp_path):
    steps, notes = wide_steps([5, 6])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.rows(steps[1])
    crash.ring.layer(steps[1], 0, flags=AS_WELL | HIDDEN)
    crash.ring.layer(steps[1], 3, 0, 2, flags=ONLY | AS_WELL)
    crash.write()
    for _ in range(2):
        found = columns(crash.trace)
        assert found[1].keys() == {(sb.IDS, 0), (sb.WEIGHTS, 0), (sb.LOGITS, 0)}
        trace = moe_trace.open(crash.trace)
        assert trace.layer(0).rows == 11 and trace.layer(0).phase("unknown").rows == 6
        assert trace.losses == {}, "the layer that is not whole is not the trace's"
        assert len(trace.problems) == 1 and "died inside step 1" in trace.problems[0]
        moe_trace.recover(crash.trace)


@pytest.mark.parametrize("ended", [False, True])
def test_they_say_that_an_earlier_step_was_not_the_last(tmp_path, ended):
    """Its end found no room and was counted: it is no step in which the process died."""
    steps, notes = sb.make_steps([5, 6, 2])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    crash.ring.layer(steps[1], 0)
    crash.ring.layer(steps[2], 0, flags=ONLY | AS_WELL)
    if ended:
        crash.ring.step(steps[2], flags=ONLY)
    crash.ring.lose("ring_full", 1, 2, 6)
    crash.write()
    both_ways(crash, steps[:1])
    assert moe_trace.open(crash.trace).losses["ring_full"].rows == 6


def test_lanes_of_blocks_count_them(tmp_path):
    steps, notes = sb.make_steps([5, 6, 2])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    last = crash.ring.whole(steps[1], flags=ONLY)
    pause(crash.ring, steps[1:2])
    block = sb.rows_block(steps[:1], notes=notes, lanes=[(0, 1, last)])
    crash.segments = [sb.segment([block], META, closed=False)]
    crash.ring.layer(steps[2], 0, flags=ONLY)
    end = crash.ring.whole(steps[2])
    crash.write()
    both_ways(crash, [steps[0], steps[2]])
    trace = moe_trace.open(crash.trace)
    assert trace.complete
    lanes = [tuple(lane) for rank in trace.ranks for block in rank.blocks() for lane in block.lanes.tolist()]
    assert lanes == [(0, 1, last), (0, last + 1, end)]


def test_nothing_else_in_the_ring(tmp_path):
    steps, _ = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], flags=ONLY)
    crash.ring.layer(steps[1], 0, flags=ONLY)
    crash.write()
    trace = moe_trace.open(crash.trace)
    assert trace.rows == 0 and trace.complete
    report = moe_trace.recover(crash.trace)
    assert (report.steps, report.rows, report.problems) == (0, 0, []) and not crash.path.exists()
    assert moe_trace.recover(crash.trace).ranks == []
    assert moe_trace.open(crash.trace).rows == 0 and moe_trace.open(crash.trace).state == "closed"


def test_a_streamed_step(tmp_path):
    """Fragments have what the trace has; the ring has the rest, and what is for captures."""
    steps, notes = wide_steps([3, 20, 2])
    kept = [
        sb.Step(s.number, s.runs, {n: {k: a for k, a in of.items() if k != "hidden"} for n, of in s.layers.items()})
        for s in steps
    ]
    for step in kept:
        del step.layers[5]
    crash = Crash(tmp_path, arena_bytes=1 << 20)
    ends = []
    for i, step in enumerate(steps):
        for layer in step.layers:
            crash.ring.layer(step, layer, 0, 1, flags=2 | AS_WELL | (ONLY if layer == 5 else HIDDEN))
            ends.append(crash.ring.layer(step, layer, 1, flags=2 | AS_WELL | (ONLY if layer == 5 else HIDDEN)))
        ends.append(crash.ring.step(step, *request_notes(notes if i == 0 else [])))
    blocks = [
        sb.rows_block(kept[:1], 0, notes=notes, lanes=[(0, 1, ends[3])]),
        sb.fragment(kept[1], [(0, 0, 20)], 1, lanes=[(0, ends[3] + 1, ends[4])]),
    ]
    crash.segments = [sb.segment(blocks, META, closed=False)]
    crash.write()
    check_columns(crash.trace, {step.number: step.layers for step in kept})


def test_flags_that_this_version_has_not(tmp_path):
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    for i, step in enumerate(steps):
        crash.ring.whole(step, *request_notes(notes if i == 0 else []), flags=0xFFFFFF00)
    crash.write()
    both_ways(crash, steps)


@pytest.mark.parametrize("kind", [0, 3, 4, 255])
@pytest.mark.parametrize("flags", [ONLY, AS_WELL])
def test_a_record_of_another_kind(tmp_path, kind, flags):
    """What is for captures may be anything; else it is damage."""
    steps, notes = sb.make_steps([5, 6])
    crash = Crash(tmp_path)
    crash.ring.whole(steps[0], *request_notes(notes))
    s = crash.ring.rows(steps[1])
    d = bytearray(crash.ring.descriptors[0][s - 1])
    d[32:33], d[76:80] = bytes([kind]), struct.pack("<I", flags)
    crash.ring.descriptors[0][s - 1] = bytes(d)
    crash.ring.whole(steps[1])
    crash.write()
    if flags == ONLY:
        both_ways(crash, steps)
    else:
        trace = moe_trace.open(crash.trace)
        check(trace, steps[:1])
        assert not trace.complete


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flags(tmp_path_factory, data):
    """Of each record, what its flags leave of it."""
    steps, notes = wide_steps([3, 4, 2], layers=(0, 3))
    crash = Crash(tmp_path_factory.mktemp("f"))
    some = st.one_of(st.sampled_from([0, AS_WELL, ONLY, HIDDEN]), st.integers(0, 0xFFFFFFFF))
    expected = {}
    for i, step in enumerate(steps):
        left = {}
        for layer, of in step.layers.items():
            flags = data.draw(some)
            crash.ring.layer(step, layer, flags=flags)
            if not flags & ONLY:
                left[layer] = {name: a for name, a in of.items() if not flags & COLUMNS.get(name, 0)}
        flags = data.draw(some)
        crash.ring.step(step, *request_notes(notes if i == 0 else []), aborted=bool(flags & 1), flags=flags)
        if not flags & (1 | ONLY):
            expected[step.number] = left
    crash.write()
    check_columns(crash.trace, expected)
