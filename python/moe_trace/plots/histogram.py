"""How often the experts of a layer, and of several layers, were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace import metrics
from moe_trace.metrics import Interval
from moe_trace.plots import style
from moe_trace.plots.style import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def expert_histogram(
    counts: npt.ArrayLike, *, title: str, note: str = "", marked: int = 3, interval: Interval | None = None
) -> Figure:
    """The expert usage histogram of one layer, as `usage` draws it. `note` is a second, smaller line of the title.

    Raises ValueError without any assignment.
    """
    figure = style.new_figure(np.shape(np.atleast_1d(counts))[-1], height=4.8)
    axes = figure.add_subplot()
    usage(axes, counts, marked=marked, interval=interval)
    style.title(axes, title, note)
    return figure


def layers_histogram(
    layers: Sequence[int], counts: Sequence[npt.ArrayLike], *, title: str, note: str = "", marked: int = 3
) -> Figure:
    """The expert usage of many layers: the histogram of the mean share of each id, and below it each layer by itself.

    layers: the model's own layer indices; counts: for each of them `[experts]`, and the numbers of experts may differ.
    A bar is the mean of an id's share over the layers that have it, so every layer weighs the same. Expert 5 of one
    layer has nothing to do with expert 5 of another, so it is the map below that tells of skew: `layers_map`.
    Raises ValueError without any assignment at all.
    """
    load = load_table(layers, counts)
    experts = np.array([[len(np.atleast_1d(np.asarray(c)))] for c in counts])
    share = load / experts
    known = ~np.isnan(share)
    # An id that no drawn layer has stays NaN: no bar, and not one that was "never chosen".
    mean = np.where(known.any(axis=0), np.nansum(share, axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)
    uniform = float(np.mean(1 / experts[known.any(axis=1), 0]))

    height = style.map_height(len(layers))
    figure = style.new_figure(load.shape[1], height=4.6 + height)
    grid = figure.add_gridspec(2, 1, height_ratios=[3.6, height])
    above = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=above)
    _bars(above, mean, uniform, marked, "mean share over layers")
    style.title(above, title, note)
    layers_map(below, layers, counts, marked=marked)
    return figure


def usage(axes: Axes, counts: npt.ArrayLike, *, marked: int = 3, interval: Interval | None = None) -> None:
    """The histogram of one layer.

    counts: `[experts]`, assignments of each expert. One bar an expert in the order of the ids, as high as its share of
    the assignments; a line at the uniform share 1/E; the `marked` largest named; experts that were never chosen crossed
    on the axis. interval: of each share, `[experts]`, drawn as a line from end to end (`analysis.GroupCounts.shares`);
    of fewer experts, the others have none. Raises ValueError without any assignment.
    """
    share = metrics.shares(np.atleast_1d(counts))
    if share.ndim != 1:
        raise ValueError(f"a histogram shows one layer: counts must be [experts], not {share.shape}")
    if np.isnan(share).any():
        raise ValueError("no assignment to draw: all counts are 0")
    peak = 0.0
    if interval is not None:
        known = np.flatnonzero(~np.isnan(interval.low[: len(share)]))
        low, high = interval.low[known], interval.high[known]
        axes.vlines(
            known, low, high, color=style.INTERVAL, linewidth=1.1, zorder=4, label="95 % interval over requests"
        )
        peak = float(high.max(initial=0.0))
    _bars(axes, share, 1 / len(share), marked, "share of assignments", peak)
    axes.set_xlabel("expert")


def layers_map(
    axes: Axes,
    layers: Sequence[int],
    counts: Sequence[npt.ArrayLike],
    *,
    marked: int = 3,
    most: float | None = None,
    bar: bool = True,
    labels: int = 26,
) -> AxesImage:
    """Layers x experts: each layer's share times its number of experts (1: as much as the uniform share) as a colour,
    its `marked` largest dotted. A layer without assignments is grey.

    layers, counts: as for `layers_histogram`; most, bar: as for `style.ratio_map`; labels: at most
    so many experts are named.
    """
    load = load_table(layers, counts)
    scale = "load / uniform load" + (" (grey: none)" if (load == 0).any() else "")
    image = style.ratio_map(axes, load, scale, most=most, bar=bar)
    style.label_rows(axes, [str(layer) for layer in layers])
    filled = np.nan_to_num(load)
    best = metrics.top(filled, marked) if marked > 0 else np.zeros((len(layers), 0), dtype=np.int64)
    rows, columns = np.repeat(np.arange(len(layers)), best.shape[1]), best.ravel()
    used = filled[rows, columns] > 0
    size = float(np.clip(900 / load.shape[1], 1.2, 9))
    axes.scatter(columns[used], rows[used], s=size, color="black", linewidths=0)
    axes.set_xticks(style.ticks(load.shape[1], labels))
    axes.set_ylabel("layer")
    axes.set_xlabel(f"expert   (dots: the {best.shape[1]} largest of each layer)" if best.shape[1] else "expert")
    return image


def load_table(layers: Sequence[int], counts: Sequence[npt.ArrayLike]) -> Floats:
    """Each layer's share of its assignments times its number of experts: float64 `[layers, most experts]`, NaN where a
    layer has no such expert or no assignments. Raises ValueError without any assignment at all.
    """
    if len(layers) != len(counts) or not len(layers):
        raise ValueError(f"{len(layers)} layers with the counts of {len(counts)}: give one array of counts a layer")
    rows = [np.atleast_1d(np.asarray(c)) for c in counts]
    load = np.full((len(rows), max(map(len, rows))), np.nan)
    for into, row in zip(load, rows, strict=True):
        into[: len(row)] = metrics.shares(row) * len(row)
    if np.isnan(load).all():
        raise ValueError("no assignment to draw: all counts are 0")
    return load


def _bars(axes: Axes, share: Floats, uniform: float, marked: int, ylabel: str, peak: float = 0.0) -> None:
    experts = np.arange(len(share))
    best = [int(e) for e in metrics.top(np.nan_to_num(share), marked) if share[e] > 0] if marked > 0 else []
    colours = [style.TOP if e in best else style.BAR for e in experts]
    # Bars of a dense picture touch: a gap of less than a pixel would be drawn as a moiré of light and dark bars.
    axes.bar(experts, share, width=0.82 if len(share) <= 128 else 1.0, color=colours)
    line = f"uniform, {style.percent(uniform)}"
    axes.axhline(uniform, color=style.LINE, linewidth=1.2, linestyle=(0, (5, 3)), label=line)
    peak = max(float(np.nanmax(share)), uniform, peak)
    axes.set_ylim(0, peak * 1.25)
    axes.set_xlim(-0.7, len(share) - 0.3)
    dead = experts[share == 0]
    if len(dead):
        axes.plot(
            dead,
            np.zeros(len(dead)),
            linestyle="none",
            marker="x",
            markersize=5,
            markeredgewidth=1.1,
            color=style.DEAD,
            clip_on=False,
            zorder=5,
            label=f"never chosen: {len(dead)} of {len(share)}",
        )
    room = len(share) * 1.35 / style.root(axes).get_size_inches()[0]  # what a label needs
    for rank, (e, x) in enumerate(zip(best, _spread(best, len(share), room), strict=True), start=1):
        axes.annotate(
            f"#{rank}  expert {e}\n{style.percent(share[e])}",
            xy=(e, share[e]),
            xytext=(x, peak * 1.11),
            ha="center",
            va="bottom",
            fontsize=9,
            color=style.TOP,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": style.TOP, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 0},
        )
    axes.set_ylabel(ylabel)
    axes.set_xticks(style.ticks(len(share)))
    style.frame(axes, shares=True)
    axes.legend(**style.legend(2))


def _spread(places: Sequence[int], experts: int, room: float) -> list[float]:
    """Where the labels of these bars go: near them, at least `room` (in experts) apart, and not out of the picture."""
    low, high = room / 2 - 0.5, experts - 0.5 - room / 2
    order = sorted(range(len(places)), key=lambda i: places[i])
    x = [min(max(float(places[i]), low), high) for i in order]
    for _ in range(100):  # a crowd settles within a few rounds; each pair that is too near parts by the same amount
        for i in range(len(x) - 1):
            lack = room - (x[i + 1] - x[i])
            if lack > 0:
                x[i], x[i + 1] = max(x[i] - lack / 2, low), min(x[i + 1] + lack / 2, high)
    spread = [0.0] * len(x)
    for place, i in zip(x, order, strict=True):
        spread[i] = place
    return spread
