"""`moe-native export`, against the arrays that the trace was made of."""

from __future__ import annotations

import json

import numpy as np
import pytest
import segment_bytes as sb
from command_line import LAYERS, META, NOTES, STEPS, blocks, failed, ok, run, write

from moe_trace import cli


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "trace")


def lines_of(text):
    meta, *routes = map(json.loads, text.splitlines())
    assert meta["type"] == "meta" and {route["type"] for route in routes} <= {"route"}
    return meta, routes


def test_export_is_the_arrays(trace, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert ok("export", trace, "--format", "jsonl", "-o", out) == ""
    meta, routes = lines_of(out.read_text())
    assert meta == {
        "type": "meta",
        "model_id": "tiny-moe",
        "vllm_version": "0.32.0",
        "torch_version": "2.13.0",
        "device": "cpu",
        "seed": 1234,
        "layers_logged": list(LAYERS),
        "top_k": 4,
    }
    names = [NOTES[index]["id"] for index in sb.per_row(STEPS, "request")]
    positions = sb.per_row(STEPS, "position").tolist()
    want = [
        {
            "type": "route",
            "req_id": names[row],
            "token_idx": positions[row],
            "layer": layer,
            "topk_ids": sb.of_rows(STEPS, layer)[row].tolist(),
            "topk_weights": [round(float(w), 4) for w in sb.of_rows(STEPS, layer, "weights")[row]],
        }
        for row in range(103)
        for layer in LAYERS
    ]
    assert routes == want
    assert ok("export", trace, "-o", "-") == out.read_text()
    assert list(tmp_path.iterdir()) == [out]


def test_json_says_what_was_written(trace, tmp_path):
    out = tmp_path / "rows.npz"
    assert json.loads(ok("export", trace, "-o", out, "--json")) == {
        "format": "moe-native export", "version": 1, "trace": str(trace), "path": str(out), "kind": "npz", "rows": 103,
        "complete": True, "problems": [], "notes": [],
    }  # fmt: skip
    lossy = write(tmp_path / "lossy", losses=[(0, 3, 9, 70)])
    of = json.loads(ok("export", lossy, "-o", tmp_path / "rows.jsonl", "--json", code=3))
    assert of["complete"] is False and of["kind"] == "jsonl"
    assert "name a file for the rows" in failed("export", trace, "-o", "-", "--json", code=2)


def test_export_of_a_part(trace):
    chosen = ["--request", "b", "--request", "ü\n", "--layer", "1", "--phase", "decode"]
    meta, routes = lines_of(ok("export", trace, "-o", "-", *chosen))
    assert meta["layers_logged"] == [1]
    decode = sb.per_row(STEPS, "class") & 3 == 2
    others = sb.per_row(STEPS, "request") != 0
    assert [r["topk_ids"] for r in routes] == sb.of_rows(STEPS, 1)[decode & others].tolist()
    assert {r["req_id"] for r in routes} == {"b", "ü\n"}


def test_export_without_weights_and_with_other_layers_later(tmp_path):
    first, notes = sb.make_steps([3], layers=(0, 1), weights=False)
    second, _ = sb.make_steps([2], layers=(1, 5), first=1, k=2, seed=3)
    path = write(
        tmp_path / "t",
        segments=[sb.segment([sb.rows_block(first, 0, notes=notes), sb.rows_block(second, 1)], META)],
    )
    _, routes = lines_of(ok("export", path, "-o", "-"))
    assert [r["layer"] for r in routes] == [0, 1] * 3 + [1, 5] * 2
    assert [r["topk_weights"] is None for r in routes] == [True] * 6 + [False] * 4
    assert [r["topk_ids"] for r in routes[7::2]] == sb.of_rows(second, 5).tolist()


def test_a_damaged_block_is_left_out_and_said(tmp_path):
    data = bytearray(sb.segment(blocks(), META))
    ids = sb.column(sb.IDS, 1, np.concatenate([s.layers[1]["ids"] for s in STEPS[4:]]))[0].stored
    data[data.index(ids)] ^= 1
    path = write(tmp_path / "t", segments=[bytes(data)])
    done = run("export", path, "-o", tmp_path / "rows.jsonl")
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and "48 rows are left out" in done.stderr
    assert len(lines_of((tmp_path / "rows.jsonl").read_text())[1]) == 3 * 55
    # What does not need the damaged plane is not touched by it.
    assert len(lines_of(ok("export", path, "-o", "-", "--layer", "0"))[1]) == 103


@pytest.mark.parametrize("arguments", [["--request", "a"], ["--since", "2027-01-15T08:00:02Z"], ["--phase", "decode"]])
@pytest.mark.parametrize("field", [sb.IDS, sb.RUNS])
def test_a_damaged_block_does_not_keep_the_rest_of_a_part_back(tmp_path, arguments, field):
    whole = write(tmp_path / "whole")
    wanted = [r for r in lines_of(ok("export", whole, "-o", "-", *arguments))[1] if r["layer"] == 1]
    made = blocks()
    stored = next(e.stored for e in made[1].entries if e.head[0] == field)
    data = bytearray(sb.segment(made, META))
    data[data.index(stored)] ^= 1
    path = write(tmp_path / "t", segments=[bytes(data)])
    done = run("export", path, "-o", "-", *arguments)
    assert done.returncode == 3 and "left out" in done.stderr
    found = [r for r in lines_of(done.stdout)[1] if r["layer"] == 1]
    assert found == wanted[: len(found)] and 0 < len(found) < len(wanted)


def test_export_of_two_runs_says_whose_the_lines_are(tmp_path):
    for name, steps in (("run-1", STEPS[:2]), ("run-2", STEPS[2:5])):
        data = sb.segment([sb.rows_block(steps, notes=NOTES)], META)
        sb.write_rank(tmp_path / "t" / name / "rank-0", [data], metadata=META)
    _, routes = lines_of(ok("export", tmp_path / "t", "-o", "-", "--layer", "0"))
    assert [r["run"] for r in routes] == ["run-1"] * 45 + ["run-2"] * 40
    assert all(set(r) == {"type", "run", "req_id", "token_idx", "layer", "topk_ids", "topk_weights"} for r in routes)
    done = run("export", tmp_path / "t", "-o", "-", "--request", "a")
    assert done.returncode == 0
    assert done.stderr == (
        "moe-native: request 'a' is in 2 runs, run-1 to run-2: the rows of all of them are selected; --run takes one\n"
    )
    of_one = lines_of(ok("export", tmp_path / "t", "-o", "-", "--request", "a", "--run", "-1", "--layer", "0"))[1]
    assert of_one == [r for r in routes if r["run"] == "run-2" and r["req_id"] == "a"]
    of = json.loads(ok("summary", tmp_path / "t", "--json", "--run", "run-1"))
    assert of["selection"]["run"] == "run-1" and of["layers"][0]["rows"] == 45
    assert "run-1, run-2" in failed("summary", tmp_path / "t", "--run", "2", code=2)


def test_a_failed_export_leaves_nothing_under_the_name(trace, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text("of yesterday")

    def broken(*_):
        yield "half", 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_trace.exchange.jsonl.jsonl", broken)
    assert cli.main(["export", str(trace), "-o", str(tmp_path / "rows.jsonl")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of yesterday"]
