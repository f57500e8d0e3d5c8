"""Pipeline stages and shards of an engine read as one: joined by step, request and position, never by guess."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace

import numpy as np
import pytest
import segment_bytes as sb
from rich.console import Console

import moe_trace
from moe_trace import info, joined, show, summary

STAGES = ((0, 3), (12, 13))  # layers
LAYERS = tuple(layer for stage in STAGES for layer in stage)
SIZES = (6, 2, 2, 5, 2, 3, 2)


def parallel(dp=0, dp_size=1, pp=0, pp_size=2, tp=0, tp_size=1, sp=False):
    return {
        "data_parallel_rank": dp, "data_parallel_size": dp_size, "pipeline_parallel_rank": pp,
        "pipeline_parallel_size": pp_size, "tensor_parallel_rank": tp, "tensor_parallel_size": tp_size,
        "sequence_parallel": sp,
    }  # fmt: skip


def write(directory, steps, names, layers, place, *, per_block=3, lost=(), mirrored=False, later_ns=0, losses=()):
    """One rank: some layers of the steps, without the lost ones. `mirrored`: its request indices are others."""
    kept = [
        replace(
            step,
            layers={layer: step.layers[layer] for layer in layers},
            runs=[(len(names) - 1 - r, *rest) if mirrored else (r, *rest) for r, *rest in step.runs],
            time_ns=step.time_ns + later_ns,
        )
        for step in steps
        if step.number not in lost
    ]
    order = list(reversed(names)) if mirrored else names
    notes = [{"type": "request", "index": i, "id": name, "prompt_len": 5} for i, name in enumerate(order)]
    blocks = [
        sb.rows_block(kept[at : at + per_block], number, notes=notes, losses=losses)
        for number, at in enumerate(range(0, len(kept), per_block))
    ]
    metadata = {"model": "tiny", "layers": sb.ledger(layers), "parallel": place}
    sb.write_rank(directory, [sb.segment(blocks, metadata)], metadata=metadata)


def pipeline(run, steps, names=("a", "b"), *, lost=((), ()), dp=0, dp_size=1, **options):
    for stage, layers in enumerate(STAGES):
        write(
            run / f"rank-{stage}-pp{stage}-dp{dp}",
            steps,
            names,
            layers,
            parallel(dp=dp, dp_size=dp_size, pp=stage),
            per_block=3 - stage,
            lost=lost[stage],
            mirrored=stage == 1,
            **options,
        )


def rows_of(steps, layer, request=None):
    ids = sb.of_rows(steps, layer)
    return ids if request is None else ids[sb.per_row(steps, "request") == request]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_layers_of_two_stages_are_joined(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    pipeline(tmp_path / "run-1", steps)
    trace = moe_trace.open(tmp_path)
    assert trace.rows == sum(SIZES) and trace.layers == LAYERS and trace.complete
    assert np.array_equal(trace.ids, np.stack([rows_of(steps, layer) for layer in LAYERS], axis=1))
    for number, name in enumerate(("a", "b")):
        of = trace.request(name).layer([0, 12])
        assert np.array_equal(of.ids, np.stack([rows_of(steps, layer, number) for layer in (0, 12)], axis=1))
        assert np.array_equal(of.positions, sb.per_row(steps, "position")[sb.per_row(steps, "request") == number])
        assert np.array_equal(trace.request(name).layer(12).ids, rows_of(steps, 12, number))
    weights = np.stack([sb.of_rows(steps, layer, "weights") for layer in LAYERS], axis=1)
    assert np.array_equal(trace.weights, weights)
    decode = sb.per_row(steps, "class") == sb.DECODE
    assert np.array_equal(trace.decode().ids, trace.ids[decode])
    assert trace.request_ids.tolist() == ["ab"[r] for r in sb.per_row(steps, "request")]
    numbers = np.repeat([step.number for step in steps], [step.rows for step in steps])
    assert np.array_equal(trace.step_numbers, numbers)
    assert trace.times[0] == np.datetime64(steps[0].time_ns, "ns")
    assert np.array_equal(trace.flags, np.zeros(sum(SIZES)))
    for layer in LAYERS:
        assert np.array_equal(trace.layer(layer).counts(), np.bincount(rows_of(steps, layer).ravel(), minlength=60))
    assert {batch.layers for batch in trace.batches()} == set(STAGES)
    assert set(trace.requests) == {"a", "b"} and trace.experts == dict.fromkeys(LAYERS, 60)


def test_rows_that_a_stage_lost_are_left_out_and_counted(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    losses = [(0, 1, 2, SIZES[1])]
    pipeline(tmp_path / "run-1", steps, lost=((1, 4), (3, 4)), losses=losses)
    trace = moe_trace.open(tmp_path)
    kept = [step for step in steps if step.number in (0, 2, 5, 6)]
    left_out = SIZES[1] + SIZES[3]  # of step 4 nobody knows
    with pytest.warns(UserWarning, match=f"{left_out} rows of .* not all stages of the pipeline have them"):
        assert np.array_equal(trace.ids, np.stack([rows_of(kept, layer) for layer in LAYERS], axis=1))
    with pytest.warns(UserWarning):
        assert trace.rows == sum(step.rows for step in kept)
    with pytest.warns(UserWarning):
        assert np.array_equal(trace.positions, sb.per_row(kept, "position"))
    for layer, lost in ((0, (1, 4)), (12, (3, 4))):  # each stage alone has all that it has
        own = [step for step in steps if step.number not in lost]
        assert np.array_equal(trace.layer(layer).ids, rows_of(own, layer))
        assert trace.stats()[layer].rows == sum(step.rows for step in own)
    assert trace.losses["ring_full"].steps == 2 and not trace.complete
    assert "INCOMPLETE" in repr(trace)


def test_a_stage_that_lost_everything(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    pipeline(tmp_path / "run-1", steps, lost=((), range(len(SIZES))))
    trace = moe_trace.open(tmp_path)
    with pytest.warns(UserWarning, match=f"{sum(SIZES)} rows of"):
        assert trace.ids.shape == (0, len(LAYERS), 4)
    with pytest.warns(UserWarning, match=f"{sum(SIZES)} rows of"):
        assert trace.rows == 0
    assert trace.layer(STAGES[0]).rows == sum(SIZES)


def test_a_stage_of_one_shard_that_lost_everything(tmp_path):
    """The other shard's rows are still joined."""
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    halves = [[step for step in (half(step, shard) for step in steps) if step.rows] for shard in range(2)]
    for shard, own in enumerate(halves):
        for stage, layers in enumerate(STAGES):
            lost = range(len(SIZES)) if (shard, stage) == (0, 0) else ()
            place = parallel(pp=stage, tp=shard, tp_size=2, sp=True)
            write(tmp_path / "run-1" / f"rank-{2 * stage + shard}", own, ("a", "b"), layers, place, lost=lost)
    trace = moe_trace.open(tmp_path)
    with pytest.warns(UserWarning, match="rows of"):
        assert np.array_equal(trace.ids, np.stack([rows_of(halves[1], layer) for layer in LAYERS], axis=1))


def test_a_position_that_was_computed_again_is_not_taken_for_the_first_time(tmp_path):
    """Each stage lost another of the two steps that computed it."""
    steps, _ = sb.make_steps((3, 3), layers=LAYERS, requests=("a",))
    steps[1] = replace(steps[1], runs=list(steps[0].runs))
    pipeline(tmp_path / "run-1", steps, ("a",), lost=((0,), (1,)))
    trace = moe_trace.open(tmp_path)
    with pytest.warns(UserWarning, match="6 rows"):
        assert trace.ids.shape == (0, len(LAYERS), 4)


def test_steps_of_one_number_that_are_not_the_same_are_not_joined(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    write(tmp_path / "run-1" / "rank-0", steps, ("a", "b"), STAGES[0], parallel(pp=0))
    shifted = [replace(step, number=step.number + 1) for step in steps]
    write(tmp_path / "run-1" / "rank-1", shifted, ("a", "b"), STAGES[1], parallel(pp=1))
    trace = moe_trace.open(tmp_path)
    with pytest.warns(UserWarning, match="rows"):
        ids, rows = trace.ids, {(r, p) for r, p in zip(trace.request_ids, trace.positions, strict=True)}
    assert len(ids) == len(rows) < SIZES[0]
    same = [
        (one, two)
        for one, two in zip(steps[1:], steps, strict=False)
        for one, two in zip(
            zip(sb.per_row([one], "request"), sb.per_row([one], "position"), strict=True),
            zip(sb.per_row([two], "request"), sb.per_row([two], "position"), strict=True),
            strict=False,
        )
        if one == two
    ]
    assert len(ids) == len(same)


def test_two_data_parallel_ranks_of_two_stages(tmp_path):
    parts = [sb.make_steps(SIZES[dp:], layers=LAYERS, seed=dp, requests=names)[0] for dp, names in enumerate(NAMES)]
    for dp, steps in enumerate(parts):
        pipeline(tmp_path / "run-1", steps, NAMES[dp], dp=dp, dp_size=2)
    trace = moe_trace.open(tmp_path)
    assert [len(group) for group in joined.groups(trace.ranks)] == [1, 1]
    assert trace.rows == sum(SIZES) + sum(SIZES[1:]) and trace.complete
    everything = [np.stack([rows_of(steps, layer) for layer in LAYERS], axis=1) for steps in parts]
    assert np.array_equal(trace.ids, np.concatenate(everything))
    assert set(trace.requests) == {"a", "b", "c", "d"}
    assert np.array_equal(
        trace.request("d").layer([3, 13]).ids, np.stack([rows_of(parts[1], layer, 1) for layer in (3, 13)], axis=1)
    )


NAMES = (("a", "b"), ("c", "d"))


@pytest.mark.parametrize("stages", [STAGES, (LAYERS,)])
def test_shards_are_put_together_in_the_order_of_the_steps(tmp_path, stages):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    for shard in range(2):
        own = [step for step in (half(step, shard) for step in steps) if step.rows]
        for stage, layers in enumerate(stages):
            place = parallel(pp=stage, pp_size=len(stages), tp=shard, tp_size=2, sp=True)
            write(tmp_path / "run-1" / f"rank-{2 * stage + shard}", own, ("a", "b"), layers, place)
    trace = moe_trace.open(tmp_path)
    assert trace.rows == sum(SIZES) and trace.complete
    assert np.array_equal(trace.ids, np.stack([rows_of(steps, layer) for layer in LAYERS], axis=1))
    assert np.array_equal(trace.positions, sb.per_row(steps, "position"))
    assert np.array_equal(trace.request("b").layer(12).ids, rows_of(steps, 12, 1))
    assert (summary.standing(trace)["stages"], summary.standing(trace)["shards"]) == (len(stages), 2)


@pytest.mark.parametrize("stages", [STAGES, (LAYERS,)])
def test_a_sequence_is_put_together_of_shards(tmp_path, stages):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    for shard in range(2):
        own = [step for step in (half(step, shard) for step in steps) if step.rows]
        for stage, layers in enumerate(stages):
            place = parallel(pp=stage, pp_size=len(stages), tp=shard, tp_size=2, sp=True)
            write(tmp_path / "run-1" / f"rank-{2 * stage + shard}", own, ("a", "b"), layers, place)
    trace = moe_trace.open(tmp_path)
    for number, name in enumerate("ab"):
        sequence = trace.sequence(name)
        rows, positions = (trace.request(name).ids, trace.request(name).positions)
        assert len(sequence) == len(positions) and sequence.complete
        assert np.array_equal(sequence.ids[positions], rows)
        assert np.array_equal(trace.layer(12).sequence(name).ids[positions], rows_of(steps, 12, number))


def test_of_a_position_that_two_shards_executed_the_last_row_counts(tmp_path):
    """The second half of step 0 is executed again in the first half of step 1."""
    steps, _ = sb.make_steps((4, 4), layers=(0,))
    first, second = (replace(step, runs=[(0, at, 4, sb.PREFILL, 0)]) for step, at in zip(steps, (0, 2), strict=True))
    again = replace(half(second, 0), runs=[(0, 2, 2, sb.PREFILL, 1)])
    for shard, own in enumerate(([half(first, 0), again], [half(first, 1), half(second, 1)])):
        write(
            tmp_path / "run-1" / f"rank-{shard}", own, ("a",), (0,), parallel(pp_size=1, tp=shard, tp_size=2, sp=True)
        )
    trace = moe_trace.open(tmp_path)
    expected = np.concatenate([sb.of_rows([first], 0)[:2], sb.of_rows([second], 0)])
    assert np.array_equal(trace.layer(0).sequence("a").ids, expected)
    assert trace.flags.tolist() == [0, 0, 4, 4, 1, 1, 0, 0]
    assert np.array_equal(trace.layer(0).current().ids, expected)


def half(step, number):
    """The first or the second half of a step's rows."""
    low, high = (0, -(-step.rows // 2)) if number == 0 else (-(-step.rows // 2), step.rows)
    runs, at = [], 0
    for request, position, count, *rest in step.runs:
        first, end = max(at, low), min(at + count, high)
        if first < end:
            runs.append((request, position + first - at, end - first, *rest))
        at += count
    fields = {layer: {name: a[low:high] for name, a in of.items()} for layer, of in step.layers.items()}
    return replace(step, runs=runs, layers=fields)


def test_requests_of_one_name_in_two_runs_stay_two(tmp_path):
    parts = [sb.make_steps(SIZES, layers=LAYERS, seed=seed)[0] for seed in (1, 2)]
    for number, steps in enumerate(parts):
        pipeline(tmp_path / f"run-{number}", steps)
    trace = moe_trace.open(tmp_path)
    with pytest.warns(UserWarning, match="is in 2 runs"):
        both = trace.request("a").layer([0, 12]).ids
    each = [trace.run(n).request("a").layer([0, 12]).ids for n in range(2)]
    assert np.array_equal(both, np.concatenate(each))
    for steps, ids in zip(parts, each, strict=True):
        assert np.array_equal(ids, np.stack([rows_of(steps, layer, 0) for layer in (0, 12)], axis=1))


def test_the_time_of_a_step_is_that_of_its_first_stage(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    for stage, layers in enumerate(STAGES):
        place = parallel(pp=stage)
        write(tmp_path / "run-1" / f"rank-{stage}", steps, ("a", "b"), layers, place, later_ns=600_000_000 * stage)
    trace = moe_trace.open(tmp_path)
    start = steps[0].time_ns / 1e9
    some = trace.between(start + 1.5, start + 4.3)  # the second stage begins step 4 after that
    wanted = [step for step in steps if 2 <= step.number <= 4]
    assert np.array_equal(some.ids, np.stack([rows_of(wanted, layer) for layer in LAYERS], axis=1))
    assert np.array_equal(trace.steps(2, 5).ids, some.ids)


def test_blocks_without_one_of_the_layers_are_said_and_their_rows_still_counted(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    pipeline(tmp_path / "run-1", steps)
    directory = next((tmp_path / "run-1").glob("rank-1-*"))
    metadata = {"layers": sb.ledger(STAGES[1]), "parallel": parallel(pp=1)}
    some = [replace(s, layers={n: s.layers[n] for n in STAGES[1]}) for s in steps]
    some[-1] = replace(some[-1], layers={12: some[-1].layers[12]})
    notes = [{"type": "request", "index": i, "id": name} for i, name in enumerate("ab")]
    blocks = [sb.rows_block(some[:-1], 0, notes=notes), sb.rows_block(some[-1:], 1)]
    (directory / "000000.moe").write_bytes(sb.segment(blocks, metadata))
    trace = moe_trace.open(tmp_path)
    assert trace.rows == sum(SIZES)
    assert np.array_equal(trace.layer([0, 12]).ids, np.stack([rows_of(steps, layer) for layer in (0, 12)], axis=1))
    with pytest.raises(moe_trace.TraceError, match="not all of these layers have the same rows"):
        _ = trace.ids


def test_ranks_that_are_not_told_apart_are_not_joined(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    for rank, place in (("rank-0", parallel()), ("rank-1", parallel()), ("rank-2", {"pipeline_parallel_rank": "x"})):
        write(tmp_path / "run-1" / rank, steps, ("a", "b"), STAGES[0], place)
    trace = moe_trace.open(tmp_path)
    assert len(joined.groups(trace.ranks)) == 3
    assert trace.rows == 3 * sum(SIZES)


def test_a_rank_that_is_missing_is_said(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    place = parallel(pp=0, tp=1, tp_size=2, sp=True)
    write(tmp_path / "run-1" / "rank-1", steps, ("a", "b"), STAGES[0], place)
    trace = moe_trace.open(tmp_path)
    assert ["run-1 has, of 4 ranks that recorded the same steps, only rank-1" in text for text in trace.problems] == [
        True
    ]
    assert not trace.complete
    assert moe_trace.open(tmp_path / "run-1" / "rank-1").complete  # it is what was asked for
    (tmp_path / "run-1" / "rank-1" / "000000.moe").rename(tmp_path / "run-1" / "rank-1" / "000001.moe")
    assert not moe_trace.open(tmp_path).problems  # retention may have deleted them


def test_info_and_summary_say_the_stages_and_count_a_token_once(tmp_path):
    steps, _ = sb.make_steps(SIZES, layers=LAYERS)
    pipeline(tmp_path / "run-1", steps)
    trace = moe_trace.open(tmp_path)
    told = info.describe(trace)
    assert (told["rows"], told["steps"], told["layer_rows"]) == (sum(SIZES), len(SIZES), len(LAYERS) * sum(SIZES))
    assert [rank["layers"] for rank in told["rank_list"]] == [list(layers) for layers in STAGES]
    text = io.StringIO()
    show.info(Console(file=text, width=200, markup=False), told)
    assert "1 run, 2 ranks (2 pipeline stages each)" in text.getvalue()
    whole, _ = summary.summarize(trace, trace, {})
    assert [layer["rows"] for layer in whole["layers"]] == [sum(SIZES)] * len(LAYERS)
