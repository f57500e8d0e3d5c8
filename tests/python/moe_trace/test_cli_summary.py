"""`moe-native summary`, against numbers computed from what the trace was made of."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import segment_bytes as sb
from command_line import LAYERS, META, STEPS, blocks, ok, run, write, write_lossy

from moe_trace import metrics


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "trace")


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    return write_lossy(tmp_path_factory.mktemp("cli") / "lossy")


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


def test_intervals_of_the_shares_are_those_of_the_requests(trace):
    of, plain = (json.loads(ok("summary", trace, "--json", *more)) for more in (["--intervals"], []))
    requests = sb.per_row(STEPS, "request")
    for layer, without in zip(of["layers"], plain["layers"], strict=True):
        ids = sb.of_rows(STEPS, layer["layer"])
        counts = np.array([np.bincount(ids[requests == one].ravel(), minlength=60) for one in range(3)])
        interval = metrics.bootstrap_ratio(counts, counts.sum(axis=1))
        for entry, old in zip(layer["top"], without["top"], strict=True):
            e = entry["expert"]
            assert (entry["low"], entry["high"]) == pytest.approx((interval.low[e], interval.high[e]), abs=0.01)
            assert entry["low"] <= entry["share"] <= entry["high"] and old == {k: entry[k] for k in old}
    text, first = ok("summary", trace, "--intervals"), of["layers"][0]["top"][0]
    assert f"{100 * first['share']:.2f}% [{100 * first['low']:.2f}, {100 * first['high']:.2f}]" in text


def test_where_there_are_no_requests_there_are_no_intervals(tmp_path):
    steps, _ = sb.make_steps([4], layers=LAYERS)
    steps[0].runs[:] = [(sb.NOBODY, sb.NOBODY, 4, sb.cls(attributed=False), 0)]
    path = write(tmp_path / "t", segments=[sb.segment([sb.rows_block(steps)], META)])
    of = json.loads(ok("summary", path, "--intervals", "--json"))
    assert of["layers"][0]["top"][0]["low"] is None and "belong to no request" in of["warnings"][-1]
    assert "[" not in ok("summary", path, "--intervals").partition("note")[0]
