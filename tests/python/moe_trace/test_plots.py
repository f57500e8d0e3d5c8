"""What is drawn: the heights of the bars, the line, the marks and the labels are read back from the axes."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text

from moe_trace import plots


def bars(axes):
    return np.array([patch.get_height() for patch in axes.patches])


def marked(axes):
    """The experts whose bars have the colour of the top ones."""
    from matplotlib.colors import to_rgba

    return [i for i, patch in enumerate(axes.patches) if patch.get_facecolor() == to_rgba(plots.TOP)]


def labels(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_are_the_shares_and_the_line_is_uniform():
    counts = np.random.default_rng(0).integers(1, 1000, size=60)
    (axes,) = plots.expert_histogram(counts, title="a model · layer 3", note="1,000 rows").axes
    np.testing.assert_allclose(bars(axes), counts / counts.sum())
    np.testing.assert_allclose([patch.get_x() + patch.get_width() / 2 for patch in axes.patches], np.arange(60))
    (line,) = axes.lines
    assert set(line.get_ydata()) == {1 / 60}
    assert axes.get_title(loc="left") == "a model · layer 3"
    assert "1,000 rows" in labels(axes)
    assert axes.get_ylim()[1] > bars(axes).max()


def test_the_three_largest_are_marked_and_named():
    counts = np.full(60, 10)
    counts[[4, 5, 33]] = 30, 20, 40
    (axes,) = plots.expert_histogram(counts, title="").axes
    assert marked(axes) == [4, 5, 33]
    total = counts.sum()
    assert [text for text in labels(axes) if text.startswith("#")] == [
        f"#1  expert 33\n{4000 / total:.3g} %",
        f"#2  expert 4\n{3000 / total:.3g} %",
        f"#3  expert 5\n{2000 / total:.3g} %",
    ]


def test_dead_experts_are_crossed_and_counted():
    counts = np.array([5, 0, 3, 0])
    (axes,) = plots.expert_histogram(counts, title="").axes
    crosses = axes.lines[1]
    assert list(crosses.get_xdata()) == [1, 3]
    assert crosses.get_label() == "never chosen: 2 of 4"
    # With only two experts in use, a third "top" one would be a lie.
    assert marked(axes) == [0, 2]


@pytest.mark.parametrize("experts", [2, 60, 128, 129, 256, 512, 2048])
@pytest.mark.parametrize("heavy", [(0, 1, 2), (-1, -2, -3), (0, 1, -1)])
def test_labels_stay_apart_and_inside(experts, heavy):
    counts = np.ones(experts, dtype=int)
    counts[[e % experts for e in heavy]] += 100
    figure = plots.expert_histogram(counts, title="t")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    # Text's own extent: an annotation's includes its leader line.
    boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text().startswith("#")]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) == min(3, experts)
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
    assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1


def test_layers_show_the_mean_share_and_each_layer():
    counts = np.random.default_rng(1).integers(0, 50, size=(3, 8))
    counts[0, 0], counts[1, 1] = 0, 1
    figure = plots.layers_histogram([3, 5, 9], counts, title="m")
    above, below, _colours = figure.axes
    share = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(bars(above), share.mean(axis=0))
    drawn = below.images[0].get_array()
    lowest = below.images[0].norm.vmin
    np.testing.assert_allclose(np.where(share == 0, 0, drawn), np.where(share == 0, 0, np.maximum(share * 8, lowest)))
    assert (drawn[share == 0] < lowest).all() and (drawn[share > 0] >= lowest).all(), "black means: never chosen"
    assert 0 < share[1, 1] * 8 < lowest, "this layer is to have a load below the scale"
    assert [label.get_text() for label in below.get_yticklabels()] == ["3", "5", "9"]
    dots = {tuple(map(int, xy)) for xy in below.collections[0].get_offsets()}
    assert dots == {(int(e), row) for row in range(3) for e in np.argsort(-counts[row], kind="stable")[:3]}


def test_layers_may_differ_in_experts_and_be_empty():
    figure = plots.layers_histogram([0, 1, 2], [[2, 2], [1, 1, 2], [0, 0, 0, 0]], title="m")
    above, below, _colours = figure.axes
    np.testing.assert_allclose(bars(above), [0.375, 0.375, 0.5, np.nan])
    assert np.isnan(np.ma.filled(below.images[0].get_array(), np.nan)[2]).all()
    assert len(above.lines) == 1, "an id that no layer with rows has is not 'never chosen'"


def counts_of(groups, experts):
    random = np.random.default_rng(experts)
    return {name: random.integers(1, 500, size=experts) for name in groups}


def bars_of(axes):
    """Of each group its bars, in the order of the legend: `[groups, experts]` places and heights, and the colours."""
    places = [[patch.get_x() + patch.get_width() / 2 for patch in group] for group in axes.containers]
    heights = [[patch.get_height() for patch in group] for group in axes.containers]
    return np.array(places), np.array(heights), [group[0].get_facecolor() for group in axes.containers]


@pytest.mark.parametrize("experts", [1, 8, 32])
def test_groups_of_few_experts_are_all_drawn(experts):
    from matplotlib.colors import to_rgba

    counts = counts_of(["text", "image", "sound"], experts)
    (axes,) = plots.groups_histogram(counts, title="a model · layer 3", note="9 prompts").axes
    places, heights, colours = bars_of(axes)
    np.testing.assert_allclose(heights, [count / count.sum() for count in counts.values()])
    assert colours == [to_rgba(colour) for colour in ("#0072B2", "#E69F00", "#009E73")]
    np.testing.assert_allclose(places.mean(axis=0), np.arange(experts), atol=1e-9)  # around its expert
    width = axes.patches[0].get_width()
    np.testing.assert_allclose(np.diff(places, axis=0), width)  # side by side
    assert 3 * width < 1
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(e) for e in range(experts)]
    (line,) = axes.lines
    assert set(line.get_ydata()) == {1 / experts}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        *(f"{name}, {count.sum():,} assignments" for name, count in counts.items()),
        f"uniform, {100 / experts:.2f} %",
    ]
    assert axes.get_title(loc="left") == "a model · layer 3" and "9 prompts" in labels(axes)


def test_of_many_experts_those_that_differ_are_drawn_and_all_are_in_the_map():
    counts = {name: np.full(128, 100) for name in ("text", "image", "sound")}
    counts["sound"][7], counts["sound"][8], counts["sound"][9] = 300, 400, 0
    counts["text"][100], counts["image"][3] = 350, 250
    figure = plots.groups_histogram(counts, title="m", top=5)
    above, below, _colours = figure.axes
    share = np.stack([count / count.sum() for count in counts.values()])
    # Text has the most of expert 100, images of 3 and, of fewer assignments in all than text's, of 9.
    order = [100, 3, 9, 8, 7]
    assert [label.get_text() for label in above.get_xticklabels()] == [str(e) for e in order]
    np.testing.assert_allclose(bars_of(above)[1], share[:, order])
    assert above.get_xlabel().startswith("the 5 of 128 experts that differ most")
    assert [line.get_xdata()[0] for line in above.lines if line.get_linestyle() == ":"] == [0.5, 2.5]
    drawn = below.images[0].get_array()
    np.testing.assert_allclose(drawn[share > 0], (share * 128)[share > 0])
    assert drawn.shape == (3, 128) and drawn[2, 9] < below.images[0].norm.vmin
    assert [label.get_text() for label in below.get_yticklabels()] == list(counts)
    assert sorted(x for x, _ in below.collections[0].get_offsets()) == sorted(order)
    assert "never chosen" in below.get_xlabel()


@pytest.mark.parametrize(
    ("experts", "groups"),
    [
        (8, ["text", "image"]),
        (32, ["prompt", "early generation", "late generation"]),
        (33, [f"kind {n}" for n in range(8)]),
        (256, [f"a long name of a kind of picture {n}" for n in range(8)]),
        (2048, ["text", "image"]),
    ],
)
def test_labels_of_groups_stay_apart_and_inside(experts, groups):
    figure = plots.groups_histogram(counts_of(groups, experts), title="a model", note="note")
    figure.draw_without_rendering()
    whole = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [tick.get_window_extent() for tick in ticks if tick.get_text()]
            assert not any(left.overlaps(right) for left, right in pairwise(boxes))
    axes = figure.axes[0]
    legend = axes.get_legend().get_window_extent()
    note, title = axes.texts[0].get_window_extent(), axes._left_title.get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= whole.x1 and legend.y0 >= axes.bbox.y1
    assert legend.y1 <= note.y0 + 4 and note.y1 <= title.y0 and title.y1 <= whole.y1


def test_the_colours_of_groups_differ_in_brightness():
    from matplotlib.colors import to_rgb

    grey = [float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722))) for colour in plots.GROUPS]
    assert len(set(plots.GROUPS)) == 8
    assert all(abs(a - b) > 0.1 for a, b in pairwise(grey)), grey


def test_groups_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="all counts of image are 0"):
        plots.groups_histogram({"text": [1, 2], "image": [0, 0]}, title="")
    with pytest.raises(ValueError, match=r"same layer, not text \(2,\), image \(3,\)"):
        plots.groups_histogram({"text": [1, 2], "image": [1, 2, 3]}, title="")
    with pytest.raises(ValueError, match=r"\[experts\] of the same layer"):
        plots.groups_histogram({"text": [[1, 2]], "image": [[1, 2]]}, title="")
    for number in (0, 9):
        with pytest.raises(ValueError, match=f"{number} groups: give at least one, and at most 8"):
            plots.groups_histogram({str(n): [1] for n in range(number)}, title="")


@pytest.mark.parametrize("ending", plots.FORMATS)
def test_save_writes_the_format_of_the_ending(tmp_path, ending):
    path = tmp_path / f"picture.{ending}"
    plots.save(plots.expert_histogram([1, 2, 3], title="t"), path)
    start = path.read_bytes()[:400]
    assert {"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}[ending] in start
    if ending == "png":
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10


def test_nothing_to_draw_and_bad_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no assignment"):
        plots.expert_histogram([0, 0], title="")
    with pytest.raises(ValueError, match="no assignment"):
        plots.layers_histogram([0], [[0, 0]], title="")
    with pytest.raises(ValueError, match="one layer"):
        plots.expert_histogram([[1, 2], [3, 4]], title="")
    with pytest.raises(ValueError, match="2 layers with the counts of 1"):
        plots.layers_histogram([0, 1], [[1, 2]], title="")
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf"):
        plots.save(plots.expert_histogram([1], title=""), tmp_path / "picture.bmp")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_only_imported_to_draw():
    code = "import sys, moe_trace.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
