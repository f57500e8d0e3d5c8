"""What the functions that take an Axes draw, read back from the axes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_trace import metrics, plots
from moe_trace.plots import pairs, style


@pytest.fixture
def axes():
    return Figure(layout="constrained").add_subplot()


def drawn(axes):
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def test_usage_draws_into_given_axes(axes):
    plots.usage(axes, [3, 1, 0])
    assert [patch.get_height() for patch in axes.patches] == [0.75, 0.25, 0]
    assert axes.get_title(loc="left") == ""


def test_layers_map(axes):
    plots.layers_map(axes, [4, 9], [[1, 3], [0, 0]], marked=1)
    np.testing.assert_allclose(drawn(axes)[0], [0.5, 1.5])
    assert np.isnan(drawn(axes)[1]).all()
    assert axes.collections[0].get_offsets().tolist() == [[1, 0]]
    assert axes.get_xlabel() == "expert   (dots: the 1 largest of each layer)"


def test_balance_marks_the_most_uneven_layer(axes):
    plots.balance(axes, [3, 7, 9], [0.9, 0.5, np.nan], "entropy", even=1, worst=-1)
    line, even, odd = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), [0.9, 0.5, np.nan])
    assert set(even.get_ydata()) == {1} and odd.get_xdata() == [1] and odd.get_ydata() == [0.5]
    assert [text.get_text() for text in axes.texts] == ["layer 7: 0.5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "7", "9"]
    assert axes.get_ylim()[0] < 0.5 and axes.get_ylim()[1] > 1


def test_balance_counts_in_whole_numbers_and_keeps_the_name_off_the_dots(axes):
    plots.balance(axes, [3, 7, 9, 10], [1, 2, 1, 2], "dead experts", even=0)
    assert all(tick % 1 == 0 for tick in axes.get_yticks())
    axes.figure.canvas.draw()
    (text,) = axes.texts
    box = text.get_window_extent()
    assert box.y0 > max(axes.transData.transform((at, v))[1] for at, v in enumerate([1, 2, 1, 2]))
    assert box.y1 < axes.bbox.y1


def test_balance_marks_none_where_all_are_alike(axes):
    plots.balance(axes, [3, 7], [2, 2], "dead experts", even=0)
    assert not axes.texts and axes.get_ylim()[0] == 0


def test_balance_refuses(axes):
    with pytest.raises(ValueError, match="one value a layer"):
        plots.balance(axes, [1, 2], [1.0], "x")
    with pytest.raises(ValueError, match="no layer has a value of entropy"):
        plots.balance(axes, [1], [np.nan], "entropy")


def test_distance_of_several_pairs(axes):
    plots.distance(axes, [0, 1], [0.1, 0.3], [0.02, 0.03], label="text, image")
    plots.distance(axes, [0, 1], [0.5, 0.4], [0.02, 0.03], label="text, audio")
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.1, 0.3], [0.5, 0.4]]
    assert len({line.get_color() for line in axes.lines}) == 2
    assert axes.get_ylim() == (0, pytest.approx(0.575))
    chance = axes.collections[0].get_segments()
    assert [segment[0, 1] for segment in chance] == [0.02, 0.03]
    with pytest.raises(ValueError, match="one a layer"):
        plots.distance(axes, [0, 1], [0.1])


def test_ratio_is_of_shares_and_grey_where_there_are_few(axes):
    #       twice    half     none of one    few      few
    first = [40, 10, 0, 1, 49]
    second = [20, 20, 30, 4, 26]
    plots.ratio(axes, [2], [first], [second], ("a", "b"))
    found = drawn(axes)[0]
    most = axes.images[0].norm.vmax
    np.testing.assert_allclose(found[[0, 1]], [2, 0.5])
    assert found[2] == 1 / most, "none of one set is the end of the scale"
    assert np.isnan(found[3]) and found[4] == pytest.approx(49 / 26, rel=1e-6)


def test_time_needs_windows(axes):
    with pytest.raises(ValueError, match=r"\[windows, experts\]"):
        plots.usage_over_time(axes, [0, 1], [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="all counts are 0"):
        plots.top_shares(axes, [0, 1], [[0, 0]])


def test_usage_over_time(axes):
    plots.usage_over_time(axes, [0, 120, 240], [[1, 3], [0, 0]])
    np.testing.assert_allclose(drawn(axes)[:, 0], [0.5, 1.5])
    assert np.isnan(drawn(axes)[:, 1]).all(), "nothing was executed"
    assert axes.images[0].get_extent() == [0, 4, 1.5, -0.5] and axes.get_xlabel() == "minutes since the first step"


def test_top_shares_have_gaps_where_nothing_was_executed(axes):
    plots.top_shares(axes, [0, 1, 2, 3], [[1, 3, 0], [0, 0, 0], [2, 2, 4]], top=2)
    values = [patch.get_data().values for patch in axes.patches]
    np.testing.assert_allclose(values, [[0.75, np.nan, 0.25], [0, np.nan, 0.5]])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["expert 1", "expert 2", "uniform, 33.33 %"]


@pytest.mark.parametrize(
    ("seconds", "name"), [(0.2, "seconds"), (179, "seconds"), (180, "minutes"), (3 * 86400, "days")]
)
def test_units_of_time(seconds, name):
    assert plots.time.unit_of(seconds)[1] == name


LIFT = np.array([[np.nan, 2.0, 0.0], [2.0, np.nan, 0.5], [0.0, 0.5, np.nan]])
SEEN = np.array([[30, 20, 0], [20, 40, 5], [0, 5, 9]])
EXPECTED = np.array([[0, 10, 8], [10, 0, 10], [8, 10, 0.0]])


def test_together(axes):
    plots.together(axes, LIFT, SEEN, EXPECTED)
    found = drawn(axes)
    assert np.isnan(np.diag(found)).all()
    assert found[0, 1] == 2 and found[1, 2] == 0.5
    assert found[0, 2] == 1 / axes.images[0].norm.vmax, "never together, though 8 were expected"
    few = plots.pairs.credible(LIFT, SEEN // 10, EXPECTED / 10)
    assert np.isnan(few).all()
    with pytest.raises(ValueError, match=r"\[experts, experts\]"):
        plots.together(axes, LIFT[:2], SEEN, EXPECTED)


def test_strongest_pairs_are_the_surprising_ones(axes):
    seen = np.array([[0, 100, 6], [100, 0, 3], [6, 3, 0]])
    expected = np.array([[0, 50, 1.0], [50, 0, 3], [1, 3, 0]])
    lift = np.divide(seen, expected, out=np.full((3, 3), np.nan), where=expected > 0)
    assert pairs.strongest(lift, seen, expected, 5) == [(0, 1), (0, 2)]  # not by lift, which would be the other way
    plots.strongest_pairs(axes, lift, seen, expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 + 1", "0 + 2"]
    assert [patch.get_width() for patch in axes.patches] == [2, 6]
    assert [text.get_text() for text in axes.texts] == ["100", "6"]


def test_chosen_experts(axes):
    plots.chosen_experts(axes, [1, 4], [[0, 2], [-1, 7], [3, 1]], 8, first=10, prompt_len=12)
    np.testing.assert_array_equal(drawn(axes), [[0, np.nan, 3], [2, 7, 1]])
    assert axes.images[0].get_extent() == [9.5, 12.5, 1.5, -0.5]
    assert [text.get_text() for text in axes.texts] == ["prompt | generated"]
    assert axes.lines[0].get_xdata()[0] == 11.5
    assert len(axes.images[0].cmap.colors) == 8, "few experts have a colour each"


def test_chosen_weights(axes):
    plots.chosen_weights(axes, [1], [[0.2], [np.nan], [0.8]], prompt_len=3)
    np.testing.assert_array_equal(drawn(axes), [[0.2, np.nan, 0.8]])
    assert axes.images[0].get_clim() == (0, 0.8) and not axes.texts
    with pytest.raises(ValueError, match=r"\[positions, layers\]"):
        plots.chosen_weights(axes, [1, 2], [[0.2]])


def test_the_end_of_a_scale():
    assert style.end_of_scale([1.0, np.nan, 0.0]) == 2
    assert style.end_of_scale([1e9]) == 64
    assert style.end_of_scale([8.0, 1 / 8]) == pytest.approx(8)


def test_axes_without_a_figure_are_refused():
    axes = Figure().add_subplot()
    axes.remove()
    with pytest.raises(ValueError, match="no figure"):
        plots.usage(axes, [1, 2])


def test_intervals_are_lines_from_end_to_end(axes):
    low, high = np.array([0.1, np.nan, 0.3]), np.array([0.4, np.nan, 0.7])
    plots.usage(axes, [2, 3, 5], interval=metrics.Interval(np.array([0.2, 0.3, 0.5]), low, high))
    (lines,) = (c for c in axes.collections if c.get_label() == "95 % interval over requests")
    np.testing.assert_allclose(
        [path.vertices for path in lines.get_paths()], [[[0, 0.1], [0, 0.4]], [[2, 0.3], [2, 0.7]]]
    )
    assert axes.get_ylim()[1] > 0.7
