"""`moe-native compare`, against `moe_trace.compare`, whose numbers test_compare.py proves."""

from __future__ import annotations

import json

import pytest
import segment_bytes as sb
from command_line import LAYERS, META, failed, ok, run, write, write_lossy

import moe_trace
from moe_trace.compare import compare


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    of = tmp_path_factory.mktemp("cli")
    steps, notes = sb.make_steps(
        [40, 5, 9, 1, 30, 2, 8, 8], layers=LAYERS, requests=("a", "b", "ü\n"), seed=3, logits=True
    )
    other = [sb.segment([sb.rows_block(steps, notes=notes)], {**META, "fields": ["ids", "weights", "logits"]})]
    return write(of / "a"), write(of / "b", segments=other)


def test_json_is_the_object(traces):
    a, b = (moe_trace.open(path) for path in traces)
    assert json.loads(ok("compare", *traces, "--json", "--jobs", "1")) == compare(a, b)
    of = json.loads(ok("compare", *traces, "--json", "--layer", "5", "--phase", "decode", "--near", "0.5"))
    assert of == compare(
        a.layer([5]).decode(), b.layer([5]).decode(), near=0.5, asked={"layers": [5], "phase": "decode"}
    )


def test_what_a_person_reads(traces):
    a, b = (moe_trace.open(path) for path in traces)
    of, text = compare(a, b), ok("compare", *traces)
    for layer in of["layers"]:
        (loads,) = (line for line in text.splitlines() if line.split()[:1] == [str(layer["layer"])] and "→" in line)
        assert f"{100 * layer['distance']['difference']:.2f}%" in loads
        most = layer["top"][0]
        assert f"{most['expert']}: {100 * most['a']:.2f}% → {100 * most['b']:.2f}%" in loads
        flips = layer["flips"]["all"]
        (row,) = (
            line
            for line in text.splitlines()
            if f"{flips['changed']:,} of {flips['rows']:,}" in line and line.split()[0] == str(layer["layer"])
        )
        assert row.split()[-3:] == [str(flips[key]) for key in ("near", "real", "unknown")]
        assert f"{100 * layer['flips']['decode']['rate']:.2f}%" in row
    tokens = of["aligned"]["tokens"]["all"]
    assert f"tokens of which any layer differs: {tokens['changed']} of {tokens['rows']}" in text
    for note in of["notes"]:
        assert note in text


def test_layers_of_one_trace_and_losses_are_said(traces, tmp_path):
    lossy = write_lossy(tmp_path / "lossy")
    done = run("compare", traces[0], lossy)
    assert done.returncode == 3 and "not whole" in done.stdout
    steps, notes = sb.make_steps([8], layers=(5, 9))
    metadata = {**META, "layers": sb.ledger((5, 9))}
    segments = [sb.segment([sb.rows_block(steps, notes=notes)], metadata)]
    text = ok("compare", traces[0], write(tmp_path / "other", segments=segments, metadata=metadata))
    assert "layer 0-1 is only in A" in text and "layer 9 is only in B" in text


def test_what_does_not_fit(traces, tmp_path):
    for near in ("-1", "x", "nan"):
        assert "is no difference of logits" in failed("compare", *traces, f"--near={near}", code=2)
    assert "is no number of processes" in failed("compare", *traces, "--jobs", "-1", code=2)
    assert "there is no" in failed("compare", traces[0], tmp_path / "nowhere", code=1)
    assert "OTHER" in failed("compare", traces[0], code=2)
