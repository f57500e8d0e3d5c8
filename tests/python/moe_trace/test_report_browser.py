"""The page in a real browser: no error, no request, and what it draws, says, sorts and answers equals the metrics."""

from __future__ import annotations

import numpy as np
import pytest
import skewed
from chromium import BINARY, Page

import moe_trace
from moe_trace import analysis, metrics, report
from moe_trace.plots import counted

pytestmark = pytest.mark.skipif(BINARY is None, reason="Chromium is not installed (Debian: apt-get install chromium)")

SIZES = {8: 3, 60: 4, 512: 61}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By experts: a trace and the file of its report."""
    root = tmp_path_factory.mktemp("browser")
    found = {}
    for experts, layers in SIZES.items():
        path = skewed.write(root / f"t{experts}", experts=experts, layers=range(layers), k=2 if experts == 8 else 4)
        trace = moe_trace.open(path)
        file = root / f"{experts}.html"
        file.write_text(report.build(trace, trace), encoding="utf-8")
        found[experts] = trace, file
    return found


@pytest.fixture(scope="module", params=SIZES)
def opened(request, made):
    trace, file = made[request.param]
    with Page() as page:
        page.open(file)
        yield trace, file, page


def place(page, chart, row, column):
    """Scroll a cell of a chart into the window and return where it is there."""
    page.js(f"document.querySelector('#{chart} canvas').scrollIntoView({{block: 'center', behavior: 'instant'}})")
    return page.js(
        f"""(() => {{ const canvas = document.querySelector('#{chart} canvas'), box = canvas.getBoundingClientRect();
        const [x, y] = canvas.chart.place({row}, {column}); return [box.x + x, box.y + y]; }})()"""
    )


def readout(page, chart):
    return page.js(f"document.querySelector('#{chart} output').textContent")


def pointed(page, chart, row, column, **how):
    page.point(*place(page, chart, row, column), **how)
    return readout(page, chart)


def column(page, table, number):
    cells = f"[...document.querySelectorAll('#{table} tbody tr')].map((row) => row.cells[{number}])"
    return page.js(f"{cells}.map((cell) => cell.dataset.value ?? cell.textContent)")


def sort(page, table, number):
    page.js(f"document.querySelectorAll('#{table} thead button')[{number}].click()")


def test_it_opens_without_an_error_or_a_request(opened):
    _, file, page = opened
    assert page.js("document.documentElement.dataset.ready") == "yes"
    assert page.console == []
    assert page.requests == [file.absolute().as_uri()]
    assert page.js("document.documentElement.scrollWidth <= innerWidth")


def test_every_column_of_the_layers_is_in_sight(opened):
    _, _, page = opened
    page.js("document.querySelector('#layers').scrollIntoView()")
    assert page.js("(({ scrollWidth, clientWidth }) => scrollWidth <= clientWidth)(layers.parentElement)")


def test_pointing_at_the_map_reads_the_cell(opened):
    trace, _, page = opened
    counts = trace.counts()
    layers, experts = counts.shape
    for row, expert in ((0, 0), (layers - 1, experts - 1), (layers // 2, int(counts[layers // 2].argmax()))):
        c = counts[row]
        share = c[expert] / c.sum()
        said = pointed(page, "map-chart", row, expert)
        where = f"layer {trace.layers[row]}, expert {expert}"
        assert said.startswith(f"{where}: {c[expert]:,} assignments, {100 * share:.2f} %, ")
        assert float(said.split(", ")[-1].split()[0]) == pytest.approx(share * experts, rel=0.005)
    page.point(2, 2)
    assert readout(page, "map-chart").startswith("Point at a place")


def test_a_click_on_the_map_opens_the_layer(opened):
    trace, _, page = opened
    row = 1
    pointed(page, "map-chart", row, 3, click=True)
    assert page.js("document.getElementById('layer').value") == str(row)
    counts = trace.counts()[row]
    assert [int(v) for v in column(page, "experts", 0)] == np.argsort(-counts, kind="stable").tolist()
    assert sorted(map(int, column(page, "experts", 1)), reverse=True) == sorted(counts.tolist(), reverse=True)
    expert = int(counts.argmax())
    assert pointed(page, "bars-chart", 0, expert).startswith(
        f"layer 1, expert {expert}: {counts[expert]:,} assignments"
    )


def test_arrow_keys_read_cells_too(opened):
    trace, _, page = opened
    page.point(2, 2)
    page.js("document.querySelector('#map-chart canvas').focus()")
    page.press("ArrowRight")
    page.press("ArrowDown")
    page.press("ArrowRight")
    assert readout(page, "map-chart").startswith(f"layer {trace.layers[1]}, expert 1: {trace.counts()[1, 1]:,} ")


def test_a_part_of_the_tokens(opened):
    trace, _, page = opened
    choose = "(n) => { const e = document.getElementById('which'); e.value = n; e.dispatchEvent(new Event('change')); }"
    page.js(f"({choose})(2)")
    try:
        counts = trace.decode().counts()
        expert = int(counts[0].argmax())
        assert f"expert {expert}: {counts[0, expert]:,} assignments" in pointed(page, "map-chart", 0, expert)
    finally:
        page.js(f"({choose})(0)")


def test_tables_sort_on_a_click(opened):
    trace, _, page = opened
    expected = metrics.imbalance(trace.counts())
    sort(page, "layers", 5)
    found = [float(v) for v in column(page, "layers", 5)]
    assert found == sorted(expected.tolist(), reverse=True)
    by_layer = dict(zip(trace.layers, expected.tolist(), strict=True))
    assert [by_layer[int(layer)] for layer in column(page, "layers", 0)] == found  # rows stay together
    sort(page, "layers", 5)
    assert [float(v) for v in column(page, "layers", 5)] == sorted(expected.tolist())
    assert page.js("document.querySelectorAll('#layers th')[5].getAttribute('aria-sort')") == "ascending"
    sort(page, "layers", 11)
    names = column(page, "layers", 11)
    assert sorted(names) == sorted(f"layers.{layer}" for layer in trace.layers) and names[0] == "layers.0"
    sort(page, "layers", 0)
    sort(page, "layers", 0)
    assert [int(v) for v in column(page, "layers", 0)] == list(trace.layers)


def test_the_other_charts_answer(opened):
    trace, _, page = opened
    prefill, decode = trace.prefill().counts(), trace.decode().counts()
    far = metrics.total_variation(prefill, decode)
    assert pointed(page, "distance-chart", 0, 1).startswith(f"layer {trace.layers[1]}: {100 * far[1]:.2f} %")
    said = pointed(page, "ratio-chart", 1, 5)
    assert f"prefill {prefill[1, 5]:,} of {prefill[1].sum():,}" in said and f"decode {decode[1, 5]:,} of" in said
    edges, windows, _ = analysis.counts_over_time(trace)
    found = pointed(page, "evenness-chart", 1, 0)
    value = float(metrics.imbalance(windows[trace.layers[1]])[0])
    assert float(found.split("max/mean ")[1].split(" ")[0]) == pytest.approx(value, rel=1e-4)
    row = int(page.js("document.getElementById('layer').value"))
    table = windows[trace.layers[row]]
    best = int(metrics.top(trace.counts()[row], 1)[0])
    last = len(edges) - 2
    assert f"expert {best}, from" in pointed(page, "time-chart", 0, last)
    assert f"{table[last, best]:,} of {table[last].sum():,} assignments" in readout(page, "time-chart")


def test_pairs(opened):
    trace, _, page = opened
    layer = page.js("data.pairs.layer")
    seen, _ = counted.pairs(trace, layer, trace.experts[layer])
    expected = metrics.coactivation_by_chance(seen)
    i, j = (int(v[0]) for v in (column(page, "strongest", 0), column(page, "strongest", 1)))
    for a, b in ((i, j), (j, i)):
        said = pointed(page, "pairs-chart", a, b)
        assert said.startswith(f"experts {a} and {b}: {seen[a, b]:,} tokens chose both")
    lift = [float(v) for v in column(page, "strongest", 4)]
    assert lift[0] == pytest.approx(seen[i, j] / expected[i, j], rel=1e-6) and lift[0] > 1
    assert pointed(page, "pairs-chart", 3, 3) == f"expert 3: {seen[3, 3]:,} tokens"


def test_a_phone_in_the_dark(made):
    _, file = made[512]
    with Page(390, 844, dark=True, sharp=2, phone=True) as page:
        page.open(file)
        assert page.console == [] and page.js("document.documentElement.scrollWidth") <= 390
        assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
        assert page.js("theme()") == "dark"


def test_it_prints_in_light_colours(made, tmp_path):
    _, file = made[60]
    with Page(dark=True) as page:
        page.open(file)
        page.call("Emulation.setEmulatedMedia", media="print")
        assert page.js("theme()") == "light"
        assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.pdf(tmp_path / "x.pdf")
        assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_a_name_cannot_run_anything(tmp_path):
    evil = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"
    path = skewed.write(tmp_path / "t", metadata={"model": evil, "device": evil})
    file = tmp_path / "r.html"
    file.write_text(report.build(moe_trace.open(path), moe_trace.open(path)), encoding="utf-8")
    with Page() as page:
        page.open(file)
        assert page.js("window.hurt === undefined") and page.js("document.documentElement.dataset.ready") == "yes"
        assert page.js("document.querySelector('h1').textContent") == f"Routing of {evil}"
        assert page.console == [] and len(page.requests) == 1


def test_the_policy_holds_even_if_something_slipped_through(made, tmp_path):
    """A handler that was smuggled in does not run, and an image is not fetched: the browser says so."""
    text = made[8][1].read_text(encoding="utf-8")
    file = tmp_path / "smuggled.html"
    smuggled = "<img src='http://127.0.0.1:9/x' onerror='window.hurt = 1'><script>window.hurt = 2</script>"
    file.write_text(text.replace("<section", smuggled + "<section", 1), encoding="utf-8")
    with Page() as page:
        page.open(file)
        assert page.js("window.hurt === undefined")
        assert any("Content Security Policy" in said for said in page.console)


def test_an_empty_selection_opens_too(made, tmp_path):
    trace, _ = made[8]
    file = tmp_path / "empty.html"
    file.write_text(report.build(trace, trace.since("2030-01-01")), encoding="utf-8")
    with Page() as page:
        page.open(file)
        assert page.console == [] and page.js("document.documentElement.dataset.ready") == "yes"
