"""Pipeline stages and sequence-parallel shards are analysed as one rank that had all of their rows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import analysis_traces as at
import numpy as np
import segment_bytes as sb
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_trace
from moe_trace import analysis
from moe_trace.analysis import one_pass

SECOND = 1_000_000_000


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 5), st.sets(st.integers(0, 11)), st.integers(2, 5))
def test_stages_of_a_pipeline_are_joined_as_one_rank(seed, per_first, per_second, lost, jobs):
    """What one rank with all layers would have given, of the steps that both stages have."""
    with tempfile.TemporaryDirectory() as directory:
        # That a position was executed again is known from its first stage, also where the second lost the step.
        steps = [
            replace(s, runs=[(*r[:4], 0) for r in s.runs]) if s.number in lost else s for s in at.messy_steps(seed, 12)
        ]
        trace = at.pipeline(Path(directory, "two"), steps, (per_first, per_second), lost)
        kept = [step for step in steps if step.number not in lost]
        place = {"pipeline_parallel_rank": 0, "pipeline_parallel_size": 1}
        if not kept:
            return
        at.write_rank(Path(directory, "one/run-1/rank-0-pp0"), at.blocks_of(kept, 4), parallel=place)
        expected = found_of = at.filled(moe_trace.open(Path(directory, "one")))
        with mock.patch.object(one_pass, "_in_processes", at.in_turn):
            for n in (1, jobs):
                found_of = at.accumulators()
                notes = analysis.fill(trace, *found_of, jobs=n)
                lacking = sum(step.rows for step in steps if step.number in lost)
                said = [note for note in notes if "not all stages" in note]
                assert said == ([f"{lacking} row{'s' * (lacking != 1)} are left out: not all stages of the pipeline "
                                 "have them"] if lacking else [])  # fmt: skip
                np.testing.assert_equal(at.sums_of(found_of), at.sums_of(expected))


def test_times_of_a_pipeline_are_those_of_its_first_stage(tmp_path):
    steps = at.messy_steps(1, 12)
    later = [replace(step, time_ns=step.time_ns + SECOND // 2) for step in steps]
    for stage, (layers, of) in enumerate((((0, 3), steps), ((4,), later))):
        kept = [replace(step, layers={n: step.layers[n] for n in layers}) for step in of]
        place = {"pipeline_parallel_rank": stage, "pipeline_parallel_size": 2}
        at.write_rank(tmp_path / "run-1" / f"rank-{stage}", at.blocks_of(kept, 3 - stage), layers, parallel=place)
    start = steps[0].time_ns
    selection = moe_trace.open(tmp_path)._between(start + 3 * SECOND, start + 7 * SECOND + 1)
    counts = analysis.RequestCounts()
    assert analysis.fill(selection, counts) == []
    assert counts.rows.sum() + counts.nobodys == selection.rows == sum(step.rows for step in steps[3:8])


def test_sequence_parallel_shards_are_one_request(tmp_path):
    """Each step's rows are split among two ranks; the tokens still follow each other."""
    sizes = [4, 2, 2, 2, 2]
    steps, _ = sb.make_steps(sizes, layers=(0,), k=at.K, experts=at.EXPERTS, requests=("a",))
    at.write_rank(tmp_path / "one/run-1/rank-0", [sb.rows_block(steps, notes=at.notes()[:1])], (0,))
    for shard in range(2):
        halves = []
        for step in steps:
            rows = slice(shard * step.rows // 2, (shard + 1) * step.rows // 2)
            layers = {0: {name: column[rows] for name, column in step.layers[0].items()}}
            position = sb.per_row([step], "position")[rows]
            runs = [(0, int(position[0]), len(position), sb.DECODE, 0)]
            halves.append(replace(step, layers=layers, runs=runs))
        blocks = [sb.rows_block(halves[n : n + 2 + shard], n, notes=at.notes()[:1]) for n in range(0, 5, 2 + shard)]
        place = {"tensor_parallel_rank": shard, "tensor_parallel_size": 2, "sequence_parallel": True}
        at.write_rank(tmp_path / f"two/run-1/rank-{shard}", blocks, (0,), parallel=place)
    one, two = (analysis.Repetition() for _ in range(2))
    analysis.fill(moe_trace.open(tmp_path / "one"), one)
    assert analysis.fill(moe_trace.open(tmp_path / "two"), two) == []
    assert one.sums(0, "any")[1].tolist() == [11]
    np.testing.assert_equal(at.found_by(two), at.found_by(one))
