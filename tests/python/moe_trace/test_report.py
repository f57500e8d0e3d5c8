"""What the page says, read from its HTML: completeness, findings, tables, and that it holds nothing it should not."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import segment_bytes as sb
import skewed

import moe_trace
from moe_trace import analysis, metrics, report
from moe_trace.report import findings
from moe_trace.summary import summarize

MISSED = {"layer": 7, "name": "layers.7", "experts": 60, "top_k": 4, "status": "missed", "detail": "a fused kernel"}


class Reader(HTMLParser):
    """The text of each section, the cells of each table, and every element with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.tables, self._path = [], {}, {}, [""]
        self._table, self._tag, self._cell = None, "", False
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "section":
            self._path.append(attrs["id"])
        if tag == "table":
            self._table = attrs.get("id") or attrs["class"]
            self.tables[self._table] = []
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
        if tag in ("td", "th") and self._table:
            self.tables[self._table][-1].append("")
            self._cell = True
        self._tag = tag

    def handle_endtag(self, tag):
        if tag == "section":
            self._path.pop()
        if tag == "table":
            self._table = None
        if tag in ("td", "th"):
            self._cell = False
        self._tag = ""

    def handle_data(self, text):
        if self._tag == "script" and self.elements[-1][1].get("id") == "data":
            self.data += text
        elif self._tag not in ("script", "style"):
            self.texts[self._path[-1]] = self.texts.get(self._path[-1], "") + text
            if self._cell:
                self.tables[self._table][-1][-1] += text


def page_of(trace, selection=None, **asked):
    return Reader(report.build(trace, trace if selection is None else selection, asked))


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return moe_trace.open(skewed.write(tmp_path_factory.mktemp("report") / "t", image=True))


@pytest.fixture(scope="module")
def page(trace):
    return page_of(trace)


def facts(page):
    found = {}
    for label, text in page.tables["facts"]:
        found.setdefault(label, []).append(text)
    return found


def test_a_whole_trace_is_said_to_be_whole(trace, page):
    assert "Nothing that was to be recorded is missing." in page.texts[""]
    said = facts(page)
    assert said["losses"] == ["none"] and said["problems"] == ["none"]
    assert said["coverage"] == ["4 of 4 MoE layers recorded"]
    assert said["model"] == ["made-up 60x4: 4 layers with 60 experts (top-4)"]
    assert said["tokens"] == ["prefill text 324, decode text 240, prefill image 156"]
    assert said["trace"] == [str(trace.path)] and said["fields"] == ["ids, weights"]


def test_progress_is_told_of_every_row_twice(trace):
    told = []
    report.build(trace, trace, progress=told.append)
    assert sum(told) == trace.executed_rows + trace.stored_rows and len(told) > 2


def test_what_is_missing_is_said(tmp_path):
    steps, notes = sb.make_steps([9, 9], layers=[0])
    metadata = {
        "layers": [*sb.ledger([0]), MISSED], "left_out": ["the draft model's layers"], "sample": 0.5, "fields": ["ids"]
    }  # fmt: skip
    losses = [(0, 3, 9, 70), (sb.PAUSED, 12, 0, 340)]
    block = sb.sampled_block(steps, {0}, notes=notes, losses=losses)
    data = sb.segment([block], metadata)
    sb.write_rank(tmp_path / "run-1" / "rank-0", [data, data[:100]], metadata=metadata)
    trace = moe_trace.open(tmp_path)
    page = page_of(trace)
    assert "This trace is not whole" in page.texts[""]
    said = facts(page)
    assert said["lost"] == ["3 steps, 9 layers, 70 rows: ring_full"]
    assert said["missed"] == ["layer 7: a fused kernel"]
    assert said["paused"] == ["12 steps, 340 rows not recorded, on request"]
    assert said["left out"] == ["the draft model's layers"]
    assert "18 executed" in said["rows"][0] and "(sample 50 %)" in said["rows"][0]
    assert said["problem"] == trace.problems and len(trace.problems) == 1
    levels = {attrs.get("class") for tag, attrs in page.elements if tag == "td"}
    assert {"bad", "note"} <= levels


def test_a_selection_is_said_and_shown(trace):
    page = page_of(trace, trace.layer(2).decode(), layers=[2], phase="decode")
    assert facts(page)["selected"] == ["layers 2, phase decode; this page is of these rows only"]
    assert [row[0] for row in page.tables["layers"][1:]] == ["2"]
    assert "No layer has both prefill and decode" in page.texts["phases"]


def test_the_table_has_the_metrics(trace, page):
    head, *rows = page.tables["layers"]
    assert head == ["layer", "tokens", "experts", "top expert", "its share", "max/mean", "normalised entropy",
                    "effective experts", "Gini", "CV", "dead", "name"]  # fmt: skip
    counts = trace.counts()
    for row, layer, c in zip(rows, trace.layers, counts, strict=True):
        top = int(metrics.top(c, 1)[0])
        assert row == [
            str(layer), f"{12 * 60:,}", "60", str(top), f"{c[top] / c.sum():.2%}", f"{metrics.imbalance(c):.3f}",
            f"{metrics.normalized_entropy(c):.4f}", f"{metrics.effective_experts(c):.1f}", f"{metrics.gini(c):.4f}",
            f"{metrics.cv(c):.4f}", str(metrics.dead_experts(c)), f"layers.{layer}",
        ]  # fmt: skip


def test_the_data_are_the_counts(trace, page):
    data = json.loads(page.data)
    assert [one["name"] for one in data["sets"]] == ["all tokens", "prefill", "decode"]
    for one, selection in zip(data["sets"], (trace, trace.prefill(), trace.decode()), strict=True):
        np.testing.assert_array_equal(one["counts"], selection.counts())
    assert data["time"]["unit"] == "seconds"
    least = data["layers"][data["chosen"]]
    assert least["normalized_entropy"] == min(layer["normalized_entropy"] for layer in data["layers"])
    assert data["pairs"]["layer"] == least["layer"]
    for place, layer in enumerate(data["layers"]):
        assert layer["imbalance"] == float(metrics.imbalance(trace.counts()[place]))


def test_the_most_loaded_expert_has_an_interval_over_requests(trace, page):
    pattern = r"is (\d+) of layer (\d+): ([\d.]+)% .*?requests: ([\d.]+)% to ([\d.]+)%\)"
    (said,) = re.findall(pattern, page.texts["findings"])
    expert, layer = int(said[0]), int(said[1])
    loads = trace.counts() / trace.counts().mean(axis=1, keepdims=True)
    assert (trace.layers.index(layer), expert) == np.unravel_index(loads.argmax(), loads.shape)
    found = analysis.RequestCounts()
    analysis.fill(trace.layer([layer]), found)
    share = found.shares(layer)
    assert float(said[2]) == pytest.approx(100 * share.value[expert], abs=0.006)
    ends = 100 * share.low[expert], 100 * share.high[expert]
    assert (float(said[3]), float(said[4])) == pytest.approx(ends, abs=0.2)  # other draws


def test_findings_are_the_numbers(trace, page):
    of, _ = summarize(trace, trace, {})
    said = page.texts["findings"]
    everything = of["all"]
    assert "4 layers with 720 tokens each (480 prefill, 240 decode)." in said
    entropy = everything["normalized_entropy"]
    assert f"is {entropy['mean']:.4f} on average" in said
    assert f"Least even: layer {entropy['min_layer']} ({entropy['min']:.4f}" in said
    imbalance = everything["imbalance"]
    assert f"{imbalance['max']:.2f} times in layer {imbalance['max_layer']}" in said
    assert f"{everything['dead_experts']} of 240 experts were never chosen" in said
    assert "Prefill and decode give" in said and "randomisation test over 12 groups of requests" in said
    assert "are chosen together most beyond chance" in said


def test_chance_in_closed_form():
    random = np.random.default_rng(0)
    drawn = random.multinomial(500, np.full(40, 1 / 40), 2000)
    assert findings.even_by_chance(40, 500) == pytest.approx(metrics.normalized_entropy(drawn).mean(), abs=1e-3)
    assert findings.even_by_chance(1, 5) == 1


def test_every_expert_was_chosen(tmp_path):
    trace = moe_trace.open(skewed.write(tmp_path / "t", experts=8, k=2, dead=0))
    assert "Every expert of every layer was chosen at least once." in page_of(trace).texts["findings"]


def test_invalid_ids_are_said(tmp_path):
    ids = np.array([[0, 255], [1, 2], [2, 0]], np.uint8)
    step = sb.Step(0, [(0, 0, 3, sb.PREFILL, 0)], {0: {"ids": ids}})
    sb.write_rank(
        tmp_path / "run-1" / "rank-0", [sb.segment([sb.rows_block([step])], {"layers": sb.ledger([0], 2, 4)})]
    )
    assert "1 id of layer 0 named no expert" in page_of(moe_trace.open(tmp_path)).texts["findings"]


def test_an_empty_selection_is_a_page_too(trace):
    page = page_of(trace, trace.since("2030-01-01"), since="2030-01-01")
    assert "no rows in this selection" in page.texts["findings"]
    assert json.loads(page.data)["layers"] == []


def test_counts_alone(tmp_path):
    steps, _ = sb.make_steps([6] * 4, layers=[0])
    block = sb.sampled_block(steps, set())
    metadata = {"layers": sb.ledger([0]), "fields": ["counts"]}
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([block], metadata)], metadata=metadata)
    page = page_of(moe_trace.open(tmp_path))
    assert "counts only" in page.texts["pairs"] and "24 executed, 0 stored (counts only)" in facts(page)["rows"]
    assert "too few requests" in page.texts["phases"] or "No layer has both" in page.texts["phases"]


EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{data}}'


def test_names_are_inert(tmp_path):
    ledger = [{**entry, "name": EVIL} for entry in sb.ledger([0], 4, 60)]
    path = skewed.write(tmp_path / "t", layers=[0], metadata={"model": EVIL, "layers": ledger, "device": EVIL})
    page = report.build(moe_trace.open(path), moe_trace.open(path))
    found = Reader(page)
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in found.elements}
    assert not [name for _, attrs in found.elements for name in attrs if name.startswith("on")]
    assert EVIL in found.texts[""] and facts(found)["device"] == [EVIL]
    assert found.tables["layers"][1][-1] == EVIL
    json.loads(found.data)


def test_the_page_names_no_address(page, trace):
    text = report.build(trace, trace)
    assert not re.findall(r"(?:https?:)?//[a-z0-9]", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert not [tag for tag, _ in page.elements if tag in ("link", "img", "iframe", "object", "base")]
    policy = next(attrs["content"] for tag, attrs in page.elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def test_the_largest_page_can_be_mailed(tmp_path):
    path = skewed.write(tmp_path / "t", experts=512, layers=range(61), k=8, requests=8, prompt=60, generated=20)
    text = report.build(moe_trace.open(path), moe_trace.open(path))
    assert len(text.encode()) < 5e6


def test_damage_that_is_only_found_where_rows_are_read(tmp_path):
    """The statistics of a block are whole, and its rows are not."""
    path = skewed.write(tmp_path / "t", layers=[0])
    (segment,) = path.glob("run-*/rank-*/*.moe")
    whole = segment.read_bytes()
    for at in range(len(whole) // 2, len(whole), 64):
        segment.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        trace = moe_trace.open(path)
        found = []
        if trace.complete and trace.counts().sum() == 720 * 4:
            list(batch.ids for batch in trace.batches(found))
        if found:
            break
    assert found, "no byte of a row was hit"
    trace = moe_trace.open(path)
    assert trace.complete
    page = page_of(trace)
    assert "This trace is not whole" in page.texts[""]
    assert any("left out" in text for text in facts(page)["damage"])
    assert page.texts["time"].startswith("\nOver time\nThis cannot be shown:")
