"""What a person sees: nothing is lost in a pipe, and text from a trace cannot steer the terminal."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from moe_trace import show, summary


def example(layers=2, experts=60, **changes):
    rng = np.random.default_rng(0)
    counts = [rng.multinomial(20_000, rng.dirichlet(np.full(experts, 3.0))) for _ in range(layers)]
    objects = [
        {"layer": i, "name": f"layers.{i}", "experts": experts, "top_k": 4, "status": "exact"}
        | summary.of_layer(c, 5000, 0)
        for i, c in enumerate(counts)
    ]
    entries = [{"layer": i, "name": "", "detail": ""} for i in range(layers)]
    return {
        "path": "a/trace",
        "model": "a-model",
        "state": "closed",
        "complete": True,
        "losses": [],
        "stored_rows": 5000,
        "executed_rows": 5000,
        "kinds": [kind("prefill", 3000), kind("decode", 2000)],
        "fields": ["ids", "weights"],
        "sample": 1.0,
        "paused": {"steps": 0, "rows": 0},
        "deleted_segments": 0,
        "whole_since": None,
        "problems": [],
        "coverage": {"exact": entries, "derived": [], "missed": [], "skipped": []},
        "left_out": [],
        "runs": 1,
        "ranks": 1,
        "stages": 1,
        "shards": 1,
        "first_time": "2026-11-21T10:15:00Z",
        "last_time": "2026-11-21T10:15:42Z",
        "selection": {"layers": None, "phase": None, "since": None},
        "warnings": [],
        "layers": objects,
        "all": summary.of_all(objects, counts),
    } | changes


def kind(phase, rows, modality="text", recomputed=False, draft=False):
    return {"phase": phase, "modality": modality, "recomputed": recomputed, "draft": draft, "rows": rows}


def printed(of, watched=False, columns=80):
    stream = io.StringIO()
    stream.isatty = lambda: watched
    out = show.console(stream)
    if watched:
        out.width = columns
    show.summary(out, of)
    return stream.getvalue()


@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (24, 60), (61, 512)])
def test_every_number_is_in_the_table(layers, experts):
    of = example(layers, experts)
    text = printed(of)
    assert "\x1b" not in text and "…" not in text
    rows = {int(line.split()[0]): line.split() for line in text.splitlines() if line[:5].strip().isdigit()}
    assert sorted(rows) == list(range(layers))
    for layer in of["layers"]:
        words = rows[layer["layer"]]
        assert words[1] == "5,000"
        for entry, expert, share in zip(layer["top"], words[2:8:2], words[3:8:2], strict=True):
            assert (int(expert), share) == (entry["expert"], f"{100 * entry['share']:.2f}%")
        assert words[8:] == [
            f"{layer['normalized_entropy']:.4f}",
            f"{layer['imbalance']:.2f}",
            f"{layer['dead_experts']}/{experts}",
        ]


def test_it_fits_a_terminal_of_80_columns():
    lines = printed(example(61, 512), watched=True).splitlines()
    assert any("max/mean" in line for line in lines) and "…" not in "".join(lines)


def test_losses_coverage_and_problems_are_always_said():
    whole = printed(example())
    assert "losses    none" in whole and "2 of 2 MoE layers recorded" in whole and "problems  none" in whole
    missed = [{"layer": i, "name": "", "detail": "a fused kernel"} for i in (5, 6, 7, 9)]
    of = example(
        complete=False,
        state="crashed",
        losses=[{"cause": "ring_full", "steps": 3, "layers": 0, "rows": 1200}],
        problems=["000003.moe is torn"],
    )
    of["coverage"]["missed"] = missed
    text = printed(of)
    assert "crashed: the recording process died, not whole" in text
    assert "lost      3 steps, 1,200 rows: ring_full" in text
    assert "2 of 6 MoE layers recorded" in text
    assert "missed    layer 5-7, 9: a fused kernel" in text
    assert "problem   000003.moe is torn" in text


def test_layers_without_rows_and_odd_layers():
    of = example()
    of["layers"][1] |= {"status": "derived", "invalid": 7} | summary.of_layer(np.zeros(60, np.int64), 0, 7)
    line = next(line for line in printed(of).splitlines() if line.strip().startswith("1 "))
    assert line.split() == ["1", "0", *"---", "-", "-", "-", "derived", "7"]


def test_without_rows_it_says_why():
    of = example()
    for layer in of["layers"]:
        layer |= summary.of_layer(np.zeros(60, np.int64), 0, 0)
    text = printed(of)
    assert "no rows in this selection; the trace has rows from 2026-11-21 10:15:00 to 2026-11-21 10:15:42 UTC" in text
    assert "entropy" not in text and "dead" not in text
    text = printed(of | {"state": "live", "first_time": None, "last_time": None})
    assert (
        "nothing recorded yet (2 MoE layers are bound)\n" in text
        and "\nlive      rows of the last flush interval (10 s" in text
    )
    assert "2 of 2 MoE layers bound, no rows" in text
    text = printed(example(0, state="live", first_time=None))
    assert "nothing recorded yet\n" in text and "0 of 0" not in text and "0 layers" not in text
    text = printed(example(0, first_time=None, complete=False, problems=["it is torn"]))
    assert "no row can be read" in text


def test_what_is_not_stored_or_was_paused_is_said():
    text = printed(example())
    assert "executed" not in text and "paused" not in text and "note" not in text and "left out" not in text
    text = printed(example(stored_rows=40, sample=0.008, paused={"steps": 1, "rows": 2}, warnings=["it reaches wider"]))
    for line in (
        "rows      5,000 executed, 40 stored (sample 0.8 %)",
        "paused    1 step, 2 rows not recorded, on request",
        "note      it reaches wider",
    ):
        assert line in text.splitlines()
    text = printed(example(stored_rows=0, fields=["counts"], sample=None))
    assert "rows      5,000 executed, 0 stored (counts only)" in text.splitlines()
    assert "(sample unknown)" in printed(example(stored_rows=0, fields="?", sample="much"))


def test_tokens_are_split_by_phase_and_where_there_are_others_by_modality():
    assert "tokens    prefill 3,000, decode 2,000" in printed(example()).splitlines()
    kinds = [
        kind("prefill", 2000),
        kind("prefill", 500, recomputed=True),
        kind("prefill", 1024, "image"),
        kind("decode", 60, draft=True),
        kind("decode", 4, draft=True, recomputed=True),
    ]
    said = "prefill text 2,500, prefill image 1,024, decode text 64"
    why = "of them 504 recomputed after a preemption or a rejected draft, of them 64 draft tokens"
    assert f"tokens    {said}, {why}" in printed(example(kinds=kinds)).splitlines()


def test_what_was_left_out_is_said():
    text = "the MoE layers of the draft model Eagle, 1 of them, are not recorded"
    assert f"left out  {text}" in printed(example(left_out=[text])).splitlines()


def test_deleted_segments_are_said():
    text = printed(example(deleted_segments=8, whole_since="2026-11-21T10:15:07Z"))
    assert "closed, whole since 2026-11-21 10:15:07 UTC\n" in text
    assert "losses    none\ndeleted   the oldest 8 segments (kept within max_bytes)\n" in text
    assert "the oldest segment (" in printed(example(deleted_segments=1))


def test_one_layer_is_no_layers():
    assert "selected: layer 3, phase decode" in printed(example(selection={"layers": [3], "phase": "decode"}))


def test_a_line_that_does_not_fit_hangs_below_its_own_text():
    problems = ["word " * 40]
    text = printed(example(path="a/" * 60, problems=problems), watched=True)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines) and lines[1].startswith("  a/")
    at = next(i for i, line in enumerate(lines) if line.startswith("problem   word"))
    assert len(lines) > at + 1 and all(line.startswith(" " * 10 + "word") for line in lines[at + 1 :])


def test_text_of_a_trace_cannot_steer_the_terminal():
    of = example(model="\x1b]0;owned\x07[red]x[/red]", problems=["\x1b[2J"])
    text = printed(of)
    assert "\x1b" not in text and "\\x1b]0;owned\\x07[red]x[/red]" in text


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1], "0-1"), ([9, 4, 5, 6, 7, 0, 0], "0, 4-7, 9")]
)
def test_ranges(numbers, text):
    assert show.ranges(numbers) == text


def test_progress_is_silent_in_a_pipe(capsys):
    with show.progress("work", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
