"""Traces of which only some rows, or none, are stored: counts are of all rows, rows are those that are there, and every
command says so."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import segment_bytes as sb
from crashes import META, Crash, request_notes

import moe_trace
from moe_trace.cli import main

STEPS, NOTES = sb.make_steps([40, 5, 9, 1, 30, 2, 8, 8], logits=True, tokens=True)
COUNTED = 0x8000
ROWS = sum(step.rows for step in STEPS)
KEPT = [sb.stored_of(step, {1}) for step in STEPS]
STORED = sum(step.rows for step in KEPT)


def write(path, requests, *, closed=True, losses=(), sample=0.01):
    notes = [note for note in NOTES if note["index"] in requests]
    blocks = [sb.sampled_block(STEPS[:4], requests, 0, notes=notes), sb.sampled_block(STEPS[4:], requests, 1)]
    blocks.append(sb.rows_block([], 2, losses=losses))
    metadata = {**META, "sample": sample, "fields": ["ids"] if requests else ["counts"]}
    sb.write_rank(path / "run-1" / "rank-0", [sb.segment(blocks, metadata, closed=closed)], metadata=metadata)
    return path


def executed_counts(layer, steps=STEPS, cls=None):
    ids = [step.layers[layer]["ids"][slice(None) if cls is None else step.classes == cls] for step in steps]
    return np.bincount(np.concatenate(ids).ravel(), minlength=60)


def check_counts(trace):
    for layer in (0, 3):
        assert np.array_equal(trace.layer(layer).counts(), executed_counts(layer))
        assert np.array_equal(trace.layer(layer).decode().counts(), executed_counts(layer, cls=sb.DECODE))
        weights = sum(float(step.layers[layer]["weights"].astype(np.float64).sum()) for step in STEPS)
        assert np.isclose(trace.layer(layer).weight_sums().sum(), weights)
        assert trace.stats()[layer].rows == ROWS
    assert trace.executed_rows == ROWS and trace.layers == (0, 3)


def check_rows(trace):
    kept = [step for step in KEPT if step.rows]
    assert trace.rows == trace.stored_rows == STORED and list(trace.requests) == ["b"]
    for layer in (0, 3):
        for name in ("ids", "weights", "logits"):
            assert np.array_equal(getattr(trace.layer(layer), name), sb.of_rows(kept, layer, name))
    assert np.array_equal(trace.tokens, np.concatenate([step.tokens for step in kept]))
    assert np.array_equal(trace.positions, sb.per_row(kept, "position")) and set(trace.request_ids) == {"b"}
    assert np.array_equal(trace.step_numbers, np.repeat([s.number for s in kept], [s.rows for s in kept]))


@pytest.mark.parametrize("closed", [True, False])
def test_counts_are_of_all_rows_and_rows_of_those_stored(tmp_path, closed):
    trace = moe_trace.open(write(tmp_path / "t", {1}, closed=closed))
    check_counts(trace)
    check_rows(trace)
    assert f"{ROWS} rows executed, {STORED} stored" in repr(trace)
    assert trace.layer(0).first_choice_counts().sum() == STORED  # of the stored rows
    assert np.array_equal(trace.layer(0).request("b").counts(), np.bincount(trace.layer(0).ids.ravel(), minlength=60))
    with pytest.raises(moe_trace.TraceError, match="it was sampled"):
        trace.request("a")


@pytest.mark.parametrize("closed", [True, False])
def test_no_row_at_all(tmp_path, closed):
    trace = moe_trace.open(write(tmp_path / "t", set(), closed=closed))
    check_counts(trace)
    assert (trace.rows, trace.stored_rows, len(trace.requests)) == (0, 0, 0)
    assert list(trace.batches()) == [] and trace.positions.shape == (0,)
    assert [entry.status for entry in trace.coverage] == ["exact", "exact"]
    with pytest.raises(moe_trace.TraceError, match="has counts only and no rows"):
        trace.first_choice_counts()


def test_a_selection_that_cuts_a_block_counts_it_whole_and_says_so(tmp_path):
    trace = moe_trace.open(write(tmp_path / "t", {1}))
    with pytest.warns(UserWarning, match=r"1 block .* from 2027-01-15 08:00:04.000 to 2027-01-15 08:00:07.000 UTC"):
        counts = trace.steps(0, 5).layer(0).counts()
    assert np.array_equal(counts, executed_counts(0))
    with pytest.warns(UserWarning, match=r"\(steps 4 to 7\)"):
        assert np.array_equal(trace.between(1_800_000_005, None).layer(3).counts(), executed_counts(3, STEPS[4:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(trace.steps(4).layer(0).counts(), executed_counts(0, STEPS[4:]))
        assert trace.steps(0, 5).rows == sum(step.rows for step in KEPT[:5])  # rows can be cut


def test_counts_of_current_rows_are_of_the_stored_ones_and_say_so(tmp_path):
    current = moe_trace.open(write(tmp_path / "t", {1})).layer(0).current()
    with pytest.warns(UserWarning, match="of stored rows only"):
        counts = current.counts()
    assert counts.sum() == current.ids.size


def test_late_facts_by_request_and_position(tmp_path):
    step = next(step for step in STEPS if {run[0] for run in step.runs} == {0, 1} and step.runs[0][0] == 0)
    request, position, rows = next(run for run in step.runs if run[0] == 1)[:3]
    late = {"type": "amend", "step": step.number, "row": 3, "count": 1, "set": ["rejected"]}
    notes = [*NOTES[1:], {**late, "request": request, "position": position + rows - 1}]
    data = sb.segment([sb.sampled_block([step], {1}, notes=notes)], META)
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata=META)
    trace = moe_trace.open(tmp_path / "t")
    flagged = trace.positions[trace.flags == 2]
    assert flagged.tolist() == [position + rows - 1]


def flagged(step, requests):
    runs = [(*run[:4], run[4] | (0 if run[0] in requests else COUNTED)) for run in step.runs]
    return sb.Step(step.number, runs, step.layers, step.tokens, step.time_ns)


@pytest.mark.parametrize("in_segment", [0, 4])
@pytest.mark.parametrize("requests", [{1}, set()], ids=["a share", "counts"])
def test_a_ring_is_read_and_recovered_as_the_recorder_would_have_written_it(tmp_path, in_segment, requests):
    notes = [note for note in NOTES if note["index"] in requests]
    written = sb.sampled_block(STEPS[:4], requests, notes=notes, lanes=[(0, 1, 12)])
    crash = Crash(tmp_path, [sb.segment([written], META, closed=False)] if in_segment else [])
    for number, step in enumerate(STEPS):
        data = request_notes(notes) if number == 0 else (b"", 0)
        last = crash.ring.whole(flagged(step, requests), *data)
    assert last == 3 * len(STEPS)
    path = crash.write()
    for _ in range(2):
        trace = moe_trace.open(path)
        check_counts(trace)
        if requests:
            check_rows(trace)
        else:
            assert trace.rows == 0 and not trace.requests
        steps = np.concatenate([block.steps for rank in trace.ranks for block in rank.blocks()])
        assert steps["step"].tolist() == list(range(len(STEPS)))
        assert trace.losses == {}
        moe_trace.recover(path)
    assert moe_trace.open(path).state == "closed"


@pytest.mark.parametrize("counted", [True, False])
def test_the_last_step_of_a_dead_process(tmp_path, counted):
    """Nobody knows whose its rows are: they are counted, and stored if any were to be."""
    crash = Crash(tmp_path)
    crash.ring.whole(flagged(STEPS[0], set()))
    for layer in (0, 3):
        crash.ring.layer(STEPS[1], layer, flags=4 if counted else 0)
    path = crash.write()
    for _ in range(2):
        trace = moe_trace.open(path)
        assert trace.rows == (0 if counted else STEPS[1].rows)
        assert trace.executed_rows == STEPS[0].rows + STEPS[1].rows
        assert np.array_equal(trace.layer(3).counts(), executed_counts(3, STEPS[:2]))
        moe_trace.recover(path)


def test_a_streamed_step_keeps_the_rows_of_others_as_nobodys(tmp_path):
    step = STEPS[0]
    fragment = sb.fragment(step, [(0, 0, 40)], 0, lanes=[(0, 1, 1)])
    crash = Crash(tmp_path, [sb.segment([fragment], META, closed=False)])
    crash.ring.layer(step, 0)
    crash.ring.layer(step, 3)
    crash.ring.step(flagged(step, {0}), *request_notes(NOTES[:1]))
    path = crash.write()
    for _ in range(2):
        trace = moe_trace.open(path)
        assert trace.rows == trace.executed_rows == step.rows
        mine = sb.per_row([step], "request") == 0
        assert trace.request_ids.tolist() == ["a" if own else None for own in mine]
        assert (trace.positions[~mine] == -1).all() and np.array_equal(trace.layer(3).ids, step.layers[3]["ids"])
        moe_trace.recover(path)


# What the commands say.


def said(capsys, *arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr()


def test_summary_and_info(tmp_path, capsys):
    path = write(tmp_path / "t", {1}, losses=[(sb.PAUSED, 12, 0, 340)])
    of = json.loads(said(capsys, "summary", path, "--json").out)
    assert (of["executed_rows"], of["stored_rows"], of["sample"]) == (ROWS, STORED, 0.01)
    assert of["paused"] == {"steps": 12, "rows": 340} and of["losses"] == [] and of["complete"]
    assert [layer["rows"] for layer in of["layers"]] == [ROWS, ROWS]
    for command in ("summary", "info"):
        text = said(capsys, command, path).out
        assert f"{ROWS} executed, {STORED} stored (sample 1 %)" in text
        assert "paused    12 steps, 340 rows not recorded, on request" in text
    trace = moe_trace.open(path)
    assert trace.complete and (trace.paused.steps, trace.paused.rows) == (12, 340)
    assert "paused for 12 steps" in repr(trace)
    assert "(counts only)" in said(capsys, "summary", write(tmp_path / "c", set(), sample=1)).out


def test_a_summary_since_a_time_says_how_far_it_reaches(tmp_path, capsys):
    path = write(tmp_path / "t", {1})
    since = "2027-01-15T08:00:06Z"
    assert (
        "note      what is counted but not stored cannot be cut" in said(capsys, "summary", path, "--since", since).out
    )
    of = json.loads(said(capsys, "summary", path, "--since", since, "--json").out)
    assert len(of["warnings"]) == 1 and of["layers"][0]["rows"] == sum(step.rows for step in STEPS[4:])
    assert json.loads(said(capsys, "summary", path, "--json").out)["warnings"] == []


def test_export(tmp_path, capsys):
    path = write(tmp_path / "t", {1})
    exported = said(capsys, "export", path, "-o", "-")
    assert len(exported.out.splitlines()) == 1 + 2 * STORED
    assert f"{STORED} of {ROWS} rows are stored" in exported.err
    nothing = said(capsys, "export", write(tmp_path / "c", set()), "-o", tmp_path / "x", code=1)
    assert "has counts only" in nothing.err and not (tmp_path / "x").exists()


def test_plot_says_what_it_shows(tmp_path, capsys, monkeypatch):
    from moe_trace import plots

    notes = []
    monkeypatch.setattr(plots.kinds, "layers_histogram", lambda *_, note, **__: notes.append(note))
    monkeypatch.setattr(plots, "save", lambda *_: None)
    path = write(tmp_path / "t", {1})
    for arguments in ([], ["--since", "2027-01-15T08:00:06Z"]):
        said(capsys, "plot", path, "-o", tmp_path / "x.png", *arguments)
    assert f"{ROWS} rows a layer · {STORED} stored" in notes[0]
    assert "whole blocks counted at the ends" in notes[1] and "whole blocks" not in notes[0]


def test_doctor(tmp_path):
    from moe_trace import doctor

    findings = [f.what for f in doctor.check_trace(write(tmp_path / "t", {1}, losses=[(sb.PAUSED, 12, 0, 340)]))]
    assert f"{ROWS} rows executed, {STORED} stored: the rest is counted" in findings
    assert "recording was paused for 12 steps, 340 rows, on request" in findings


def test_a_ring_says_what_was_paused(tmp_path):
    crash = Crash(tmp_path)
    crash.ring.whole(STEPS[0], *request_notes(NOTES))
    at = 8 + 3 * sb.PAUSED
    crash.ring.counters[at], crash.ring.counters[at + 2] = 5, 60
    path = crash.write()
    for _ in range(2):
        trace = moe_trace.open(path)
        assert (trace.paused.steps, trace.paused.rows) == (5, 60) and trace.losses == {}
        moe_trace.recover(path)
