"""Figures of a selection: each kind of each size, what is in them, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import segment_bytes as sb
import skewed
from matplotlib.text import Text

import moe_trace
from moe_trace import metrics, plots


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """By experts, two each."""
    root = tmp_path_factory.mktemp("kinds")
    made = {8: (3, 2), 60: (3, 4), 512: (61, 8)}
    return {
        experts: tuple(
            moe_trace.open(
                skewed.write(root / f"{experts}-{n}", experts=experts, layers=range(layers), k=k, seed=n, image=True,
                             requests=8 if experts < 512 else 3, generated=12)
            )
            for n in range(2)
        )
        for experts, (layers, k) in made.items()
    }  # fmt: skip


def draw(traces, kind, **options):
    first, second = traces
    if kind == "compare":
        options["other"] = second
    if kind == "request":
        options["request"] = "chat-1"
    return plots.of(options.pop("selection", first), kind, **options)


def titles(figure):
    found = [axes.get_title(loc="left") for axes in figure.axes]
    return [*([figure.get_suptitle()] if figure.get_suptitle() else []), *(text for text in found if text)]


@pytest.mark.parametrize("kind", plots.KINDS)
@pytest.mark.parametrize("experts", [8, 60, 512])
def test_every_kind_stays_inside_the_picture(traces, kind, experts, tmp_path):
    figure = draw(traces[experts], kind)
    assert titles(figure)[0].startswith(f"made-up {experts}x")
    plots.save(figure, tmp_path / "x.png")  # draws it
    whole = figure.bbox.padded(2)
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= whole.x0 and box.y0 >= whole.y0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, kind
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            shown = [Text.get_window_extent(tick) for tick in ticks if tick.get_text() and tick.get_visible()]
            shown.sort(key=lambda box: (box.x0, box.y0))
            assert not any(a.overlaps(b) for a, b in pairwise(shown)), kind


@pytest.mark.parametrize("kind", ["histogram", "heatmap", "balance", "time", "phases", "modality", "compare"])
def test_one_layer(traces, kind):
    first, second = (trace.layer(1) for trace in traces[60])
    figure = plots.of(first, kind, other=second if kind == "compare" else None)
    assert "layer 1" in titles(figure)[0] and "1 of" not in titles(figure)[0]


def test_kinds_of_one_layer_say_which(traces):
    for kind in ("coactivation", "time"):
        assert titles(draw(traces[60], kind))[0].endswith("(1 of 3 layers)")


def test_balance_shows_the_metrics(traces):
    figure = draw(traces[60], "balance")
    counts = traces[60][0].counts()
    expected = [metrics.imbalance(counts), metrics.normalized_entropy(counts), metrics.gini(counts)]
    for axes, values in zip(figure.axes, [*expected, metrics.dead_experts(counts)], strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), values)


def test_phases_and_modalities_show_their_distances(traces):
    trace = traces[60][0]
    for kind, first, second in (
        ("phases", trace.prefill(), trace.decode()),
        ("modality", trace.modality("text"), trace.modality("image")),
    ):
        above = draw(traces[60], kind).axes[0]
        expected = metrics.total_variation(first.counts(), second.counts())
        np.testing.assert_allclose(above.lines[0].get_ydata(), expected)


def test_compare_names_the_traces_by_what_differs(traces):
    figure = draw(traces[60], "compare")
    assert any(title.startswith("60-0 · ") for title in titles(figure))
    assert any(title.startswith("60-1 · ") for title in titles(figure))
    one, other = (trace.counts() for trace in traces[60])
    (distances,) = [axes for axes in figure.axes if axes.get_ylabel() == "assignments that differ"]
    np.testing.assert_allclose(distances.lines[0].get_ydata(), metrics.total_variation(one, other))


def test_request_shows_the_largest_weight_and_not_column_0(tmp_path):
    ids = np.array([[5, 2], [1, 7]], np.uint8)
    weights = np.array([[0.25, 0.75], [0.5, 0.25]], np.float16)
    step = sb.Step(0, [(0, 0, 2, sb.PREFILL, 0)], {3: {"ids": ids, "weights": weights}})
    notes = [{"type": "request", "index": 0, "id": "a", "prompt_len": 2}]
    metadata = {"layers": sb.ledger([3], 2, 9)}
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([sb.rows_block([step], notes=notes)], metadata)])
    figure = plots.of(moe_trace.open(tmp_path), "request", request="a")
    experts, heights = (np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes[:2])
    assert experts.tolist() == [[2, 1]] and heights.tolist() == [[0.75, 0.5]]


def test_request_says_what_is_not_there(tmp_path):
    steps, notes = sb.make_steps([6, 3, 3], layers=[0], requests=("a",))
    notes[0]["cached"] = [[12, 2, None]]
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([sb.rows_block(steps, notes=notes)])])
    figure = plots.of(moe_trace.open(tmp_path), "request", request="a")
    assert any("14 positions · 2 without a row" in text.get_text() for text in figure.axes[0].texts)


def test_the_note_says_what_was_selected_and_lost(tmp_path):
    path = skewed.write(tmp_path / "t", losses=[(0, 3, 9, 70)])
    trace = moe_trace.open(path)
    figure = plots.of(trace.decode(), "heatmap", asked={"phase": "decode"})
    (note,) = [text.get_text() for text in figure.axes[0].texts if "rows" in text.get_text()]
    assert note == "240 rows a layer · decode only · with losses"


def test_what_cannot_be_drawn_is_refused(traces, tmp_path):
    first, second = traces[8]
    for options, message in (
        ({"kind": "pie"}, "no picture 'pie': use histogram, heatmap"),
        ({"kind": "compare"}, "needs a second trace"),
        ({"kind": "heatmap", "other": second}, "heatmap shows one trace"),
        ({"kind": "request"}, "name the request"),
        ({"kind": "time", "request": "chat-1"}, "time does not show one request"),
        ({"kind": "heatmap", "selection": first.since("2030-01-01")}, "no rows"),
        ({"kind": "phases", "selection": first.decode()}, "no layer has assignments of prefill and decode"),
        ({"kind": "modality", "selection": first.decode()}, "all rows are of one modality"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.of(options.pop("selection", first), **options)
    with pytest.raises(ValueError, match="no layer in common with as many experts"):
        plots.of(first, "compare", other=traces[60][0])
    with pytest.raises(ValueError, match="one expert a token"):
        plots.of(moe_trace.open(skewed.write(tmp_path / "k1", k=1)), "coactivation")


def test_pairs_need_rows(tmp_path):
    steps, _ = sb.make_steps([6] * 3, layers=[0])
    block = sb.sampled_block(steps, set())
    sb.write_rank(tmp_path / "run-1" / "rank-0", [sb.segment([block], {"layers": sb.ledger([0])})])
    trace = moe_trace.open(tmp_path)
    with pytest.raises(moe_trace.TraceError, match="counts only"):
        plots.of(trace, "coactivation")
    assert "0 stored" in plots.of(trace, "histogram").axes[0].texts[-1].get_text()
