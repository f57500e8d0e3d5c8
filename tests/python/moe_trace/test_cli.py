"""The command as a user runs it, in a process of its own, against numbers computed from what the trace was made of."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import segment_bytes as sb
from matplotlib.image import imread
from ring_bytes import RingFile, finished_process

from moe_trace import cli

LAYERS = (0, 1, 5)
META = {
    "model": "tiny-moe",
    "device": "cpu",
    "seed": 1234,
    "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
    "fields": ["ids", "weights"],
    "layers": sb.ledger(LAYERS),
}
MISSED = {"layer": 7, "name": "layers.7", "experts": 60, "top_k": 4, "status": "missed", "detail": "a fused kernel"}
STEPS, NOTES = sb.make_steps([40, 5, 9, 1, 30, 2, 8, 8], layers=LAYERS, requests=("a", "b", "ü\n"))
ENV = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8", "NO_COLOR": ""}
ENV.pop("NO_COLOR")


def blocks(losses=()):
    return [sb.rows_block(STEPS[:4], 0, notes=NOTES), sb.rows_block(STEPS[4:], 1, losses=losses)]


def write(path, *, metadata=META, losses=(), segments=None, **rank):
    segments = segments or [sb.segment(blocks(losses), metadata)]
    sb.write_rank(path / "run-20270115T080000Z-1" / "rank-0", segments, metadata=metadata, **rank)
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "trace")


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    metadata = {**META, "layers": [*META["layers"], MISSED]}
    return write(tmp_path_factory.mktemp("cli") / "lossy", metadata=metadata, losses=[(0, 3, 9, 70)])


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "moe_trace", *map(str, arguments)], capture_output=True, text=True, env=ENV, **options
    )


def ok(*arguments, code=0, **options):
    done = run(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""
    return done.stdout


def failed(*arguments, code):
    """One line on stderr, no traceback, nothing on stdout; argparse adds its usage before the line."""
    done = run(*arguments)
    assert done.returncode == code
    assert done.stdout == "" and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 or (code == 2 and lines[0].startswith("usage:"))
    return lines[-1]


# -- summary


def expected(layer, mask=slice(None)):
    """A layer's numbers, from the ids alone and in other words than moe_trace.metrics has."""
    ids = sb.of_rows(STEPS, layer)[mask]
    counts = [int((ids == e).sum()) for e in range(60)]
    total = sum(counts)
    order = sorted(range(60), key=lambda e: (-counts[e], e))[:3]
    used = [c / total for c in counts if c]
    return {
        "rows": len(ids),
        "assignments": total,
        "invalid": 0,
        "top": [{"expert": e, "count": counts[e], "share": pytest.approx(counts[e] / total)} for e in order],
        "normalized_entropy": pytest.approx(sum(p * np.log2(1 / p) for p in used) / np.log2(60)),
        "effective_experts": pytest.approx(np.prod([p**-p for p in used])),
        "imbalance": pytest.approx(max(counts) * 60 / total),
        "dead_experts": counts.count(0),
    }


def test_summary_json_is_what_numpy_says(trace):
    of = json.loads(ok("summary", trace, "--json"))
    assert (of["format"], of["version"], of["model"], of["path"]) == ("moe-native summary", 1, "tiny-moe", str(trace))
    assert (of["state"], of["complete"], of["losses"], of["problems"]) == ("closed", True, [], [])
    assert (of["runs"], of["ranks"]) == (1, 1)
    assert of["first_time"] == "2027-01-15T08:00:00Z" and of["last_time"] == "2027-01-15T08:00:07Z"
    assert [layer["layer"] for layer in of["layers"]] == list(LAYERS)
    for layer in of["layers"]:
        static = {"layer": layer["layer"], "name": f"layers.{layer['layer']}", "experts": 60, "top_k": 4}
        assert layer == {**static, "status": "exact", **expected(layer["layer"])}
    whole = of["all"]
    assert whole["rows"] == 3 * 103 and whole["assignments"] == 3 * 103 * 4 and whole["experts"] == 180
    entropies = {layer["layer"]: layer["normalized_entropy"] for layer in of["layers"]}
    lowest = min(entropies, key=entropies.get)
    assert whole["normalized_entropy"] == {
        "mean": pytest.approx(np.mean(list(entropies.values()))),
        "min": entropies[lowest],
        "min_layer": lowest,
    }
    imbalances = {layer["layer"]: layer["imbalance"] for layer in of["layers"]}
    highest = max(imbalances, key=imbalances.get)
    assert whole["imbalance"]["max"] == imbalances[highest] and whole["imbalance"]["max_layer"] == highest
    pooled = sum(np.bincount(sb.of_rows(STEPS, layer).ravel(), minlength=60) for layer in LAYERS)
    best = int(pooled.argmax())
    assert whole["top"][0] == {
        "expert": best,
        "count": int(pooled[best]),
        "share": pytest.approx(pooled[best] / pooled.sum()),
    }


@pytest.mark.parametrize(("phase", "code"), [("prefill", 1), ("decode", 2)])
def test_summary_of_some_layers_and_a_phase(trace, phase, code):
    of = json.loads(ok("summary", trace, "--json", "--layer", "0,5", "--phase", phase))
    assert of["selection"] == {"layers": [0, 5], "phase": phase, "since": None, "run": None}
    mask = sb.per_row(STEPS, "class") & 3 == code
    assert 0 < mask.sum() < len(mask)
    for layer, number in zip(of["layers"], (0, 5), strict=True):
        assert layer.items() >= expected(number, mask).items()


def test_summary_since_a_time(trace):
    start = datetime.fromtimestamp(STEPS[5].time_ns / 1e9, UTC)
    mask = np.repeat([i >= 5 for i in range(len(STEPS))], [step.rows for step in STEPS])
    of = json.loads(ok("summary", trace, "--json", "--since", start.isoformat()))
    assert of["layers"][0].items() >= expected(0, mask).items()
    nothing = json.loads(ok("summary", trace, "--json", "--since", (start + timedelta(days=1)).isoformat()))
    assert nothing["layers"][0]["rows"] == 0 and nothing["layers"][0]["normalized_entropy"] is None
    assert nothing["layers"][0]["top"] == [] and nothing["all"]["imbalance"]["mean"] is None


@pytest.mark.parametrize("when", ["30s", "10m", "2h", "1d"])
def test_summary_since_a_while_ago(tmp_path, when):
    seconds = {"30s": 30, "10m": 600, "2h": 7200, "1d": 86400}[when]
    now = datetime.now(UTC).timestamp()
    steps, notes = sb.make_steps([3, 4], layers=LAYERS)
    for step, age in zip(steps, (seconds * 1.5, seconds * 0.5), strict=True):
        step.time_ns = int((now - age) * 1e9)
    path = write(tmp_path / "t", segments=[sb.segment([sb.rows_block(steps, notes=notes)], META)])
    of = json.loads(ok("summary", path, "--json", "--since", when))
    assert [layer["rows"] for layer in of["layers"]] == [4, 4, 4]


def test_summary_for_a_person(trace):
    text = ok("summary", trace)
    assert "\x1b" not in text
    rows = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    assert [int(row[0]) for row in rows] == list(LAYERS)
    for row in rows:
        of = expected(int(row[0]))
        assert [int(e) for e in row[2:8:2]] == [entry["expert"] for entry in of["top"]]
        assert row[-1] == f"{of['dead_experts']}/60"
    assert "losses    none" in text and "coverage  3 of 3 MoE layers recorded" in text


def test_losses_and_missed_layers_are_said_and_are_exit_code_3(lossy):
    text = ok("summary", lossy, code=3)
    assert "not whole" in text and "lost      3 steps, 9 layers, 70 rows: ring_full" in text
    assert "missed    layer 7: a fused kernel" in text
    of = json.loads(ok("summary", lossy, "--json", "--layer", "0", code=3))
    assert of["losses"] == [{"cause": "ring_full", "steps": 3, "layers": 9, "rows": 70}]
    assert of["coverage"]["missed"] == [{"layer": 7, "name": "layers.7", "detail": "a fused kernel"}]
    assert of["complete"] is False


def test_a_torn_segment_is_exit_code_3(tmp_path):
    whole = sb.segment(blocks(), META)
    path = write(tmp_path / "t", segments=[whole[: len(whole) // 2]])
    done = run("summary", path)
    assert done.returncode == 3 and "problem   " in done.stdout and done.stderr == ""


# -- info


def test_info(trace):
    of = json.loads(ok("info", trace, "--json"))
    file = next(trace.rglob("*.moe"))
    assert (of["rows"], of["steps"], of["layer_rows"], of["requests"]) == (103, 8, 309, 3)
    assert of["recorded"] == {"ids": "uint8", "weights": "float16"}
    assert of["metadata"] == {key: value for key, value in META.items() if key != "layers"}
    assert of["bytes"] == file.stat().st_size and of["bytes_per_layer_row"] == of["bytes"] / 309
    (rank,) = of["rank_list"]
    assert (rank["run"], rank["rank"], rank["state"], rank["ring"]) == (file.parts[-3], "rank-0", "closed", None)
    (segment,) = rank["segments"]
    assert segment == {
        "file": "000000.moe",
        "number": 0,
        "bytes": of["bytes"],
        "closed": True,
        "blocks": 2,
        "steps": 8,
        "rows": 103,
    }
    text = ok("info", trace)
    for word in ("tiny-moe", "vllm 0.32.0, torch 2.13.0", "ids (uint8), weights (float16)", "000000.moe", "seed"):
        assert word in text


def test_info_of_a_crash_has_what_the_ring_has(tmp_path):
    ring = RingFile(owner=finished_process(), directory=tmp_path)
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    step = sb.Step(0, [(0, 0, 3, sb.PREFILL, 0)], {0: {"ids": ids, "weights": np.ones((3, 4), np.float16)}})
    ring.whole(step)
    place = ring.write(tmp_path / "moe-native-0123456789abcdef.ring")
    metadata = {**META, "layers": sb.ledger((0,))}
    segments = [sb.segment([], metadata, closed=False)]
    path = write(tmp_path / "t", metadata=metadata, segments=segments, closed=False, ring=place, owner=ring.owner)
    of = json.loads(ok("info", path, "--json"))
    assert (of["state"], of["steps"], of["rows"]) == ("crashed", 1, 3)
    assert (of["rank_list"][0]["ring_steps"], of["rank_list"][0]["ring_rows"]) == (1, 3)
    assert "in its ring" in ok("info", path) and "to be recovered" in ok("info", path)
    assert ok("recover", path) == "recovered 1 step (3 rows) of a process that died\n"
    of = json.loads(ok("info", path, "--json"))
    assert (of["state"], of["steps"], of["rows"]) == ("closed", 1, 3)
    assert of["rank_list"][0]["ring_steps"] == 0


def test_info_counts_a_step_that_was_written_in_pieces_once(tmp_path):
    (big,), notes = sb.make_steps([50], layers=LAYERS)
    pieces = [sb.fragment(big, [(layer, first, 20) for layer in LAYERS], i) for i, first in enumerate((0, 20))]
    last = sb.completing(big, [(layer, 40, 10) for layer in LAYERS], 2, 2, notes=notes)
    path = write(tmp_path / "t", segments=[sb.segment([*pieces, last], META)])
    of = json.loads(ok("info", path, "--json"))
    assert (of["steps"], of["rows"]) == (1, 50)
    (segment,) = of["rank_list"][0]["segments"]
    assert (segment["blocks"], segment["steps"], segment["rows"]) == (3, 1, 50)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '{"a": [NaN]}'])
def test_numbers_that_are_no_json(tmp_path, value):
    path = write(tmp_path / "t", metadata={**META, "odd": 123456})
    for file in path.rglob("rank.json"):
        file.write_text(file.read_text().replace("123456", value))
    expected = {"a": [None]} if "{" in value else None
    assert json.loads(ok("info", path, "--json"), parse_constant=pytest.fail)["metadata"]["odd"] == expected
    ok("summary", path, "--json")
    assert "odd" in ok("info", path)


# -- plot


@pytest.mark.parametrize("arguments", [[], ["--layer", "5"], ["--layer", "0-1", "--phase", "decode"]])
def test_plot_writes_a_picture(trace, tmp_path, arguments):
    out = tmp_path / "hist.png"
    assert ok("plot", trace, "-o", out, *arguments) == f"{out}\n"
    pixels = imread(out)
    assert pixels.shape[1] > 1000 and pixels.std() > 0.05


def test_plot_draws_the_shares_of_the_trace(trace, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("moe_trace.plots.save", lambda figure, path: drawn.append(figure))
    assert cli.main(["plot", str(trace), "--layer", "5", "-o", str(tmp_path / "x.png")]) == 0
    (axes,) = drawn[0].axes
    counts = np.bincount(sb.of_rows(STEPS, 5).ravel(), minlength=60)
    np.testing.assert_allclose([patch.get_height() for patch in axes.patches], counts / counts.sum())
    assert axes.get_title(loc="left") == "tiny-moe · layer 5"
    assert any(text.get_text().startswith("103 rows") for text in axes.texts)


def test_plot_refuses_before_it_works(trace, tmp_path):
    assert ".png" in failed("plot", trace, "-o", tmp_path / "hist.bmp", code=2)
    message = failed("plot", trace, "-o", tmp_path / "hist.png", "--since", "2030-01-01", code=1)
    assert "nothing to draw" in message
    assert not list(tmp_path.iterdir())


# -- export


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

    monkeypatch.setattr("moe_trace.export.jsonl", broken)
    assert cli.main(["export", str(trace), "-o", str(tmp_path / "rows.jsonl")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of yesterday"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to have a full disk")
@pytest.mark.parametrize("arguments", [["summary"], ["summary", "--json"], ["export", "-o", "-"], ["info"]])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_stdout(trace, arguments, unbuffered):
    command = [sys.executable, "-m", "moe_trace", arguments[0], str(trace), *arguments[1:]]
    with open("/dev/full", "w") as full:
        environment = {**ENV, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["summary"], ["summary", "--json"], ["export", "-o", "-"], ["info"]])
def test_a_closed_stdout(trace, arguments):
    command = [sys.executable, "-m", "moe_trace", arguments[0], str(trace), *arguments[1:]]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stderr) == (1, "moe-native: standard output is closed\n")


# -- recover


def test_recover(trace, tmp_path):
    assert "nothing to recover" in ok("recover", trace)
    torn = sb.segment(blocks(), META, closed=False) + b"torn"
    path = write(tmp_path / "t", segments=[torn], closed=False)
    done = run("recover", path)
    assert done.returncode == 3 and "recovered" in done.stdout and "torn" in done.stdout
    assert len(done.stderr.splitlines()) == 1 and "the trace is not whole" in done.stderr
    assert [file.name for file in path.rglob("*.moe*")] == ["000000.moe"]
    assert json.loads(run("summary", path, "--json").stdout)["layers"][0]["rows"] == 103
    (tmp_path / "empty").mkdir()
    assert "nothing to recover" in ok("recover", tmp_path / "empty")


# -- usage, errors, terminals and pipes


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["summary"],
        ["summary", "TRACE", "--layer", "x"],
        ["summary", "TRACE", "--layer", "5-1"],
        ["summary", "TRACE", "--layer", "-1"],
        ["summary", "TRACE", "--layer", "70000"],
        ["summary", "TRACE", "--layer", "3"],
        ["summary", "TRACE", "--phase", "warm-up"],
        ["summary", "TRACE", "--since", "yesterday"],
        ["summary", "TRACE", "--run", "of yesterday"],
        ["export", "TRACE"],
        ["export", "TRACE", "-o", "-", "--format", "xml"],
        ["plot", "TRACE", "--nonsense"],
    ],
)
def test_usage_is_exit_code_2(trace, arguments):
    assert failed(*(str(trace) if a == "TRACE" else a for a in arguments), code=2)


def test_a_layer_that_is_not_there_says_which_are(trace, lossy):
    assert "which has layers 0, 1, 5" in failed("summary", trace, "--layer", "3", code=2)
    assert "layer 7 was missed: a fused kernel" in failed("plot", lossy, "--layer", "7", code=2)


def test_layers_add_up_and_a_negative_age_is_explained(trace):
    of = json.loads(ok("summary", trace, "--json", "--layer", "5", "--layer", "0,5"))
    assert of["selection"]["layers"] == [0, 5]
    assert failed("summary", trace, "--since", "-5m", code=2).endswith("write --since 5m for the last 5 minutes")


def test_what_cannot_be_read_is_exit_code_1(trace, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no trace at all, but a text")
    newer = sb.segment(blocks(), META, major=9)
    write(tmp_path / "newer", segments=[newer])
    segment = next((tmp_path / "newer").rglob("*.moe"))
    for command in (["summary"], ["info"], ["plot", "-o", tmp_path / "x.png"], ["export", "-o", tmp_path / "x"]):
        name, *rest = command
        assert "there is no" in failed(name, tmp_path / "nowhere", *rest, code=1)
        assert "empty" in failed(name, tmp_path / "empty", *rest, code=1)
        assert "text" in failed(name, tmp_path / "text", *rest, code=1)
        assert "version 9" in failed(name, segment, *rest, code=1)
    for command in ("plot", "export"):
        assert failed(command, trace, "-o", tmp_path / "no" / "x.png", code=1).endswith(f"directory {tmp_path / 'no'}")
    assert "no request 'z'" in failed("export", trace, "-o", "-", "--request", "z", code=1)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.png").exists()


def test_version_and_help():
    assert ok("--version").startswith("moe-native 0.")
    text = ok("--help")
    for command in ("summary", "info", "plot", "export", "recover", "doctor"):
        assert command in text
        assert ok(command, "--help").startswith(f"usage: moe-native {command}")


def test_help_is_quick_because_it_imports_little():
    code = (
        "import sys; from moe_trace import cli; cli.main(['--help'])\n"
        "heavy = {'matplotlib', 'rich', 'torch', 'moe_native', 'vllm', 'subprocess'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("arguments", [["summary"], ["summary", "--json"], ["info"], ["export", "-o", "-"]])
def test_a_reader_that_leaves_early(tmp_path, arguments):
    """More output than a pipe holds, and nobody reads it: quiet, and the code of SIGPIPE."""
    layers = tuple(range(2000))
    steps, _ = sb.make_steps([2], layers=layers)
    path = write(
        tmp_path / "t", metadata={"layers": sb.ledger(layers)}, segments=[sb.segment([sb.rows_block(steps)], {})]
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "moe_trace", arguments[0], str(path), *arguments[1:]]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENV)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_colour_and_progress_only_for_a_person(trace, tmp_path):
    command = [sys.executable, "-m", "moe_trace"]
    main, side = pty.openpty()
    env = {**ENV, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen([*command, "summary", str(trace)], stdout=side, stderr=side, env=env) as process:
        process.wait()
    text = os.read(main, 1 << 16)
    assert b"\x1b[1m" in text and b"losses" in text
    out = tmp_path / "rows.jsonl"
    with subprocess.Popen([*command, "export", str(trace), "-o", str(out)], stdout=-3, stderr=side, env=env) as process:
        process.wait()
    assert b"exporting" in os.read(main, 1 << 16) and out.exists()
    os.close(main)
    os.close(side)
