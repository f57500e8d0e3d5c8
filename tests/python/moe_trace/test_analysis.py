"""Accumulators against brute force on the rows themselves, however the work is divided."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from unittest import mock

import analysis_traces as at
import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_trace
from moe_trace import analysis, metrics
from moe_trace.analysis import one_pass
from moe_trace.analysis.work import Window, split, windows
from moe_trace.batch import NOT_CURRENT

SECOND = 1_000_000_000


def rows_of(selection):
    """Each row as a dict, in the order of execution of each rank."""
    for batch in selection.batches():
        columns = {
            layer: [batch.column(field, layer) for field in (1, 2, 3)]  # ids, weights, logits
            for layer in batch.layers
        }
        for n in range(batch.rows):
            yield {
                "rank": batch.rank,
                "request": batch.request_ids[n],
                "position": int(batch.positions[n]),
                "current": not batch.flags[n] & NOT_CURRENT,
                "step": int(batch.step_numbers[n]),
                "phase": int(batch.phases[n]),
                "time": int(batch.times[n].astype(np.int64)),
                "layers": {layer: [None if c is None else c[n] for c in of] for layer, of in columns.items()},
            }


def legal(ids):
    return [int(e) for e in ids if e != 255]


def first_of(ids, weights):
    best = int(ids[int(np.argmax(weights))])
    return None if best == 255 else best


def brute_repetition(rows, layer):
    """(request, choice) -> [repeats, pairs], and the rows left out by reason."""
    last, sums, left_out = {}, defaultdict(lambda: [0, 0]), Counter()
    for row in rows:
        if not row["current"]:
            left_out["do not count"] += 1
        elif row["request"] is None:
            left_out["are nobody's"] += 1
        elif row["position"] < 0:
            left_out["have no known position"] += 1
        elif layer in row["layers"]:
            whose, (ids, weights, _) = (row["rank"], row["request"]), row["layers"][layer]
            now = row["position"], legal(ids), first_of(ids, weights)
            old = last.get(whose)
            last[whose] = now
            if old is None or old[0] + 1 != now[0]:
                continue
            if len(old[1]) == len(now[1]) == at.K:
                sums[whose, "any"][0] += bool(set(old[1]) & set(now[1]))
                sums[whose, "any"][1] += 1
            if old[2] is not None and now[2] is not None:
                sums[whose, "first"][0] += old[2] == now[2]
                sums[whose, "first"][1] += 1
    return sums, left_out


def check_against_brute_force(selection, found):
    together, near, transitions, firsts, repetition, over_time, by_request, by_phase, few, distinct, scores = found
    rows = list(rows_of(selection))
    order = {whose: n for n, whose in enumerate((w[1], w[2]) for w in by_request.requests)}
    for layer in at.LAYERS:
        here = [(row, *row["layers"][layer]) for row in rows if layer in row["layers"]]
        joint, adjacent = np.zeros((2, at.EXPERTS, at.EXPERTS), int)
        of_requests, of_phases = np.zeros((len(order), at.EXPERTS), int), np.zeros((len(order), 2, at.EXPERTS), int)
        of_windows, of_steps = defaultdict(Counter), defaultdict(list)
        for row, ids, weights, _ in here:
            for i, j in product(legal(ids), repeat=2):
                joint[i, j] += 1
            by_rank = [int(ids[n]) for n in np.argsort(-weights.astype(float), kind="stable")]
            for i in legal(ids):
                adjacent[i, i] += 1
            for i, j in pairwise(by_rank):
                if 255 not in (i, j):
                    adjacent[i, j] += 1
                    adjacent[j, i] += 1
            if row["request"] is not None:
                whose = order[row["rank"], row["request"]]
                np.add.at(of_requests[whose], legal(ids), 1)
                if row["phase"] in (1, 2):  # prefill and decode
                    np.add.at(of_phases[whose, row["phase"] - 1], legal(ids), 1)
            of_windows[row["time"] // over_time.width_ns].update(legal(ids))
            of_steps[row["rank"], row["step"]].append(legal(ids))
        np.testing.assert_array_equal(together.counts[layer], joint)
        np.testing.assert_array_equal(near.counts[layer], adjacent)
        assert together.rows[layer] == near.rows[layer] == len(here)
        np.testing.assert_array_equal(np.diagonal(joint), selection.layer(layer).counts())
        np.testing.assert_array_equal(by_request.counts(layer), of_requests)
        assert sorted(by_phase.counts(layer).tolist()) == sorted(of_phases.tolist())  # each request is a group
        assert len(few.counts(layer)) == min(len(order), len(few._groups)) <= 4
        np.testing.assert_array_equal(few.counts(layer).sum(axis=0), of_phases.sum(axis=0))
        table = over_time.table(layer)
        for window, counts in zip(sorted(over_time.rows), table, strict=True):
            assert {e: n for e, n in enumerate(counts) if n} == dict(of_windows[window])
        by_size = defaultdict(list)
        for of_step in of_steps.values():
            by_size[len(of_step)].append(len({e for ids in of_step for e in ids}))
        sizes, steps, means, chance = distinct.table(layer)
        assert sizes.tolist() == sorted(by_size)
        assert steps.tolist() == [len(by_size[n]) for n in sorted(by_size)]
        assert means.tolist() == pytest.approx([np.mean(by_size[n]) for n in sorted(by_size)])
        assert chance.tolist() == pytest.approx([7 * (1 - (5 / 7) ** n) for n in sorted(by_size)])
        sums, left_out = brute_repetition(rows, layer)
        assert repetition.left_out == dict(left_out)
        for choice in ("any", "first"):
            repeats, pairs = repetition.sums(layer, choice)
            for whose, *counts in zip(repetition.requests, repeats, pairs, strict=True):
                assert counts == sums[(whose[1], whose[2]), choice]
        logits = [lg for *_, lg in here if lg is not None]
        assert scores.without.get(layer, 0) == len(here) - len(logits)
        if logits:
            for name, values in (
                ("confidence", metrics.confidence(logits)),
                ("margin", metrics.margin(metrics.softmax(logits), at.K)),
                ("entropy", metrics.router_entropy(logits) / np.log(at.EXPERTS)),
            ):
                np.testing.assert_array_equal(scores.histograms[layer, name], np.histogram(values, 10, (0, 1))[0])
                assert scores.mean(layer, name) == pytest.approx(np.mean(values))
    for accumulator, pairs, first in ((transitions, [(0, 3), (3, 4)], False), (firsts, [(4, 0)], True)):
        for a, b in pairs:
            expected, both = np.zeros((at.EXPERTS, at.EXPERTS), int), 0
            for row in rows:
                if a in row["layers"] and b in row["layers"]:
                    both += 1
                    of = [row["layers"][layer] for layer in (a, b)]
                    chosen = [[first_of(*x[:2])] if first else legal(x[0]) for x in of]
                    for i, j in product(*chosen):
                        if i is not None and j is not None:
                            expected[i, j] += 1
            np.testing.assert_array_equal(accumulator.counts[a, b], expected)
            assert accumulator.rows[a, b] == both
    nobodys = [row for row in rows if row["request"] is None]
    assert by_request.nobodys == len(nobodys) and by_request.rows.sum() == len(rows) - len(nobodys)
    assert sum(over_time.rows.values()) == len(rows) and len(over_time.rows) <= 3


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(4, 14), st.integers(1, 5), st.sampled_from((None, 3)), st.booleans(),
    st.integers(2, 7),
)  # fmt: skip
def test_results_are_brute_force_however_divided(seed, steps, per_block, without, current, jobs):
    with tempfile.TemporaryDirectory() as directory:
        trace = at.opened(Path(directory), seed, steps, per_block, without=without)
        selection = trace.current() if current else trace
        found = at.filled(selection)
        check_against_brute_force(selection, found)
        np.testing.assert_equal(at.found_by(*at.filled(selection, jobs)), at.found_by(*found))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(0, 9), st.integers(0, 9))
def test_selections_are_cut_where_they_say(seed, jobs, first, more):
    with tempfile.TemporaryDirectory() as directory:
        trace = at.opened(Path(directory), seed, 12, 3)
        start = at.messy_steps(seed, 1)[0].time_ns
        for selection in (
            trace.steps(first, first + more),
            trace._between(start + first * SECOND, start + (first + more) * SECOND),
            trace.decode(),
            trace.current().request("b"),
        ):
            repeated, counts = analysis.Repetition(), analysis.RequestCounts()
            with mock.patch.object(one_pass, "_in_processes", at.in_turn):
                assert not [n for n in analysis.fill(selection, repeated, counts, jobs=jobs) if "damaged" in n]
            rows = list(rows_of(selection))
            assert counts.rows.sum() + counts.nobodys == len(rows)
            for layer in at.LAYERS:
                sums, _ = brute_repetition(rows, layer)
                for choice in ("any", "first"):
                    of_all = [sum(of) for of in repeated.sums(layer, choice)]
                    assert of_all == [sum(v[n] for k, v in sums.items() if k[1] == choice) for n in (0, 1)]


@pytest.mark.parametrize("layout", ["engines", "pipeline"])
def test_two_processes_find_the_same(tmp_path, layout):
    trace = at.opened(tmp_path, 5, 20, 3, without=3) if layout == "engines" else at.pipeline(
        tmp_path, at.messy_steps(5, 20), lost={4, 11}
    )  # fmt: skip
    one, two, told = at.accumulators(), at.accumulators(), {1: 0, 2: 0}
    notes = []
    for jobs, found in ((1, one), (2, two)):

        def progress(rows, jobs=jobs):
            told[jobs] += rows

        notes.append(analysis.fill(trace.current(), *found, jobs=jobs, progress=progress))
    assert notes[0] == notes[1]
    np.testing.assert_equal(at.found_by(*two), at.found_by(*one))
    assert told[1] == told[2] == sum(one[5].rows.values())
    check = at.accumulators()
    check_notes = analysis.fill(trace.current(), *check, jobs=0)
    assert check_notes == notes[0]
    np.testing.assert_equal(at.found_by(*check), at.found_by(*one))


@dataclass
class Killed(analysis.Accumulator):
    rows: int = field(init=False, default=0)

    def add(self, part):
        os._exit(3)

    def merge(self, later):
        raise AssertionError


def test_a_process_that_is_killed_is_an_error(tmp_path):
    trace, counts = at.opened(tmp_path, 6, 8, 2), analysis.RequestCounts()
    with pytest.raises(moe_trace.TraceError, match="was killed"):
        analysis.fill(trace, counts, Killed(), jobs=2)
    assert counts.requests == []  # as it was
    with pytest.raises(ValueError, match="number of processes"):
        analysis.fill(trace, counts, jobs=-1)


def test_an_accumulator_goes_on_where_it_was(tmp_path):
    """Two halves of a trace, one after the other, are the whole."""
    trace = at.opened(tmp_path, 7, 12, 3)
    whole, halves = at.filled(trace), at.accumulators()
    analysis.fill(trace.steps(0, 5), *halves)
    analysis.fill(trace.steps(5), *halves)
    np.testing.assert_equal(at.sums_of(halves), at.sums_of(whole))


def test_a_damaged_block_is_left_out_and_said(tmp_path):
    steps = at.messy_steps(8, 9)
    blocks = at.blocks_of(steps, 3)
    target = next(e for e in blocks[1].entries if e.head[0] == sb.IDS and e.head[4] == 3)
    target.stored = bytes([target.stored[0] ^ 1]) + target.stored[1:]
    data = sb.segment(blocks, {"layers": sb.ledger(at.LAYERS, at.K, at.EXPERTS)})
    good = target.stored
    broken = data.replace(good, bytes([good[0] ^ 1]) + good[1:])
    assert broken != data
    sb.write_rank(tmp_path / "run-1/rank-0", [broken], metadata={"layers": sb.ledger(at.LAYERS, at.K, at.EXPERTS)})
    trace = moe_trace.open(tmp_path)
    together, counts = analysis.Coactivation(), analysis.RequestCounts()
    (note,) = analysis.fill(trace, together, counts)
    assert "steps 3 to 5 are left out" in note and "000000.moe is damaged" in note
    whole = sum(step.rows for n, step in enumerate(steps) if not 3 <= n <= 5)
    # No layer has a part of the block: not even one that could be read.
    assert together.rows == dict.fromkeys(at.LAYERS, whole) and counts.rows.sum() + counts.nobodys == whole


def test_rows_that_were_only_counted_are_said(tmp_path):
    steps = at.messy_steps(9, 4)
    at.write_rank(tmp_path / "run-1/rank-0", [sb.sampled_block(steps, {1}, notes=at.notes())])
    counts = analysis.RequestCounts()
    (note,) = analysis.fill(moe_trace.open(tmp_path), counts)
    stored = int(sum(run[2] for step in steps for run in step.runs if run[0] == 1))
    assert f"{stored:,} are stored" in note and counts.rows.tolist() == [stored]


def test_what_was_not_recorded(tmp_path):
    steps, notes = sb.make_steps([5, 3, 3], layers=at.LAYERS, k=at.K, experts=at.EXPERTS, weights=False)
    at.write_rank(tmp_path / "run-1/rank-0", [sb.rows_block(steps, notes=notes)])
    trace = moe_trace.open(tmp_path)
    for one in (analysis.Coactivation(adjacent=True), analysis.Transitions(first=True)):
        with pytest.raises(moe_trace.TraceError, match="no weights"):
            analysis.fill(trace, one)
        assert one.counts == {}
    repetition, scores = analysis.Repetition(), analysis.RouterScores()
    notes = analysis.fill(trace, repetition, scores)
    assert notes == [f"11 rows of layer {n} have no logits: they are in no figure of its scores" for n in at.LAYERS]
    assert np.isnan(repetition.share(0, "first").value) and repetition.share(0, "any").value >= 0
    assert repetition.by_chance(0) == metrics.repetition_by_chance(at.EXPERTS, at.K)


def test_a_trace_without_rows(tmp_path):
    at.write_rank(tmp_path / "run-1/rank-0", [sb.rows_block([])])
    found = at.accumulators()
    assert analysis.fill(moe_trace.open(tmp_path), *found, jobs=2) == []
    np.testing.assert_equal(at.found_by(*found), at.found_by(*at.accumulators()))


def test_figures_are_those_of_the_metrics(tmp_path):
    trace = at.opened(tmp_path, 10, 20, 4)
    together, _, transitions, _, repetition, over_time, by_request, *_ = at.filled(trace)
    assert np.array_equal(together.share(0), metrics.coactivation(together.counts[0]), equal_nan=True)
    assert np.array_equal(transitions.share(0, 3), metrics.transition(transitions.counts[0, 3]), equal_nan=True)
    assert transitions.mutual_information(0, 3) == metrics.mutual_information(transitions.counts[0, 3])
    only = analysis.Coactivation(layers=(3,))
    analysis.fill(trace, only)
    assert list(only.counts) == [3] and np.array_equal(only.counts[3], together.counts[3])
    table = over_time.table(4)
    assert np.array_equal(over_time.drift(4), metrics.js_divergence(table[1:], table[:-1]), equal_nan=True)
    assert (over_time.starts[1:] > over_time.starts[:-1]).all() and over_time.starts.dtype == "datetime64[ns]"
    shares = by_request.shares(3)
    np.testing.assert_allclose(shares.value, metrics.shares(by_request.counts(3).sum(axis=0)))
    assert (shares.low <= shares.value).all() and (shares.value <= shares.high).all()
    repeats, pairs = repetition.sums(0, "first")
    assert repetition.share(0, "first").value == repeats.sum() / pairs.sum()
    with pytest.raises(ValueError, match="windows"):
        analysis.UsageOverTime(0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 9))
def test_windows_are_split_in_order_and_none_is_lost(rows, parts):
    of = [Window(("run", "rank"), n, n + 1, count) for n, count in enumerate(rows)]
    shares = split(of, parts)
    assert [window for share in shares for window in share] == of
    assert len(shares) <= parts and all(shares)


@given(st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_groups_of_requests_are_the_same_in_whatever_order_they_come(keys, most, cut):
    order = sorted(keys, key=lambda key: key * 0x9E3779B97F4A7C15 % 2**64)
    one, other = analysis.PhaseCounts(most), analysis.PhaseCounts(most)
    one._make_room(keys, one._mask)
    for key in order[:cut]:
        other._make_room([key], other._mask)
    later = other.empty()
    later._make_room(order[cut:], later._mask)
    other.merge(later)
    assert (other._groups, other._mask) == (one._groups, one._mask) and len(one._groups) <= most
    if len(keys) <= most:
        assert one._groups == keys
    with pytest.raises(ValueError, match="at least 1 group"):
        analysis.PhaseCounts(0)


def peak(selection):
    found = at.accumulators()
    tracemalloc.start()
    analysis.fill(selection, *found)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("layout", ["rank", "pipeline"])
def test_memory_is_that_of_a_block_and_not_of_the_trace(tmp_path, layout):
    """Eight times as many blocks of the same size."""
    peaks = []
    for blocks in (4, 32):
        steps, _ = sb.make_steps([400] * blocks, layers=at.LAYERS, k=at.K, experts=at.EXPERTS, logits=True)
        path = tmp_path / str(blocks)
        if layout == "pipeline":
            trace = at.pipeline(path, steps, (1, 1))
        else:
            at.write_rank(path / "run-1/rank-0", at.blocks_of(steps, 1))
            trace = moe_trace.open(path)
        assert len(windows(trace)) == blocks
        peak(trace)  # what a first pass loads and keeps
        peaks.append(peak(trace))
    assert peaks[1] < 1.5 * peaks[0]
