"""Pictures of expert usage, from counts. Each function gives a matplotlib Figure; `save` writes it.

matplotlib is imported when a picture is drawn, not when this module is. No global state of it (pyplot, the backend,
rcParams) is touched, so that a notebook's or a server's own settings stay as they are. The colours can be told apart
with any kind of colour vision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, TOP, LINE, DEAD, QUIET = "#8FA3B5", "#D55E00", "#0B3C5D", "#000000", "#5A5A5A"
NONE = "#CFCFCF"
# Okabe and Ito's colours; neighbours differ in brightness too.
GROUPS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#000000", "#F0E442")
MOST_BARS = 32  # experts whose bars are all drawn, when there are several of each
FORMATS = ("png", "svg", "pdf")


def expert_histogram(counts: npt.ArrayLike, *, title: str, note: str = "", marked: int = 3) -> Figure:
    """The expert usage histogram of one layer.

    counts: `[experts]`, assignments of each expert. One bar an expert in the order of the ids, as high as its share of
    the assignments; a line at the uniform share 1/E; the `marked` largest named; experts that were never chosen crossed
    on the axis. `note` is a second, smaller line of the title. Raises ValueError without any assignment.
    """
    share = metrics.shares(np.atleast_1d(counts))
    if share.ndim != 1:
        raise ValueError(f"a histogram shows one layer: counts must be [experts], not {share.shape}")
    if np.isnan(share).any():
        raise ValueError("no assignment to draw: all counts are 0")
    figure = _figure(len(share), height=4.8)
    axes = figure.add_subplot()
    _bars(axes, share, 1 / len(share), marked, "share of assignments")
    axes.set_xlabel("expert")
    _title(axes, title, note)
    return figure


def layers_histogram(
    layers: Sequence[int], counts: Sequence[npt.ArrayLike], *, title: str, note: str = "", marked: int = 3
) -> Figure:
    """The expert usage of many layers: the histogram of the mean share of each id, and below it each layer by itself.

    layers: the model's own layer indices; counts: for each of them `[experts]`, and the numbers of experts may differ.
    A bar is the mean of an id's share over the layers that have it, so every layer weighs the same. Expert 5 of one
    layer has nothing to do with expert 5 of another, so it is the map below that tells of skew: each layer's share
    times its number of experts (1: as much as the uniform share), its `marked` largest dotted. A layer without
    assignments is grey. Raises ValueError without any assignment at all.
    """
    if len(layers) != len(counts) or not layers:
        raise ValueError(f"{len(layers)} layers with the counts of {len(counts)}: give one array of counts a layer")
    width = max(len(np.atleast_1d(np.asarray(c))) for c in counts)
    share, load = np.full((len(layers), width), np.nan), np.full((len(layers), width), np.nan)
    for row, of_layer in enumerate(counts):
        of_layer = np.atleast_1d(np.asarray(of_layer))
        share[row, : len(of_layer)] = metrics.shares(of_layer)
        load[row, : len(of_layer)] = share[row, : len(of_layer)] * len(of_layer)
    if np.isnan(share).all():
        raise ValueError("no assignment to draw: all counts are 0")
    known = ~np.isnan(share)
    # An id that no drawn layer has stays NaN: no bar, and not one that was "never chosen".
    mean = np.where(known.any(axis=0), np.nansum(share, axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)
    uniform = float(np.mean([1 / np.isfinite(row).sum() for row in share if np.isfinite(row).any()]))

    map_height = min(max(0.17 * len(layers), 1.2), 9.0)
    figure = _figure(width, height=4.6 + map_height)
    grid = figure.add_gridspec(2, 1, height_ratios=[3.6, map_height])
    above = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=above)
    _bars(above, mean, uniform, marked, "mean share over layers")
    _title(above, title, note)
    scale = "load / uniform load" + (" (grey: none)" if (load == 0).any() else "")
    _map(figure, below, [str(layer) for layer in layers], load, scale)
    filled = np.nan_to_num(load)
    best = metrics.top(filled, marked) if marked > 0 else np.zeros((len(layers), 0), dtype=np.int64)
    rows, columns = np.repeat(np.arange(len(layers)), best.shape[1]), best.ravel()
    used = filled[rows, columns] > 0
    size = float(np.clip(900 / width, 1.2, 9))
    below.scatter(columns[used], rows[used], s=size, color="black", linewidths=0)
    below.set_ylabel("layer")
    below.set_xlabel(f"expert   (dots: the {best.shape[1]} largest of each layer)" if best.shape[1] else "expert")
    return figure


def groups_histogram(counts: Mapping[str, npt.ArrayLike], *, title: str, note: str = "", top: int = 16) -> Figure:
    """The expert usage of one layer by groups of tokens, side by side: text and image, or the stages of a request.

    counts: for each group's name `[experts]`, assignments of each expert, at most 8 groups. A bar is an expert's share
    of the assignments of one group, so that large and small groups compare; a line at the uniform share 1/E. The legend
    says how many assignments a group has: groups of a few dozen differ by chance.

    Up to `MOST_BARS` experts are all drawn, in the order of their ids. Of more, bars are drawn of the `top` ones whose
    largest and smallest share are furthest apart: first those that the first group chooses most, then the second's, and
    so on, with a dotted line between. Below them is a map of all experts, a row a group, as in `layers_histogram`;
    marks at its upper edge say which ones have bars.

    Raises ValueError for no group or too many, groups that differ in experts, and a group without any assignment.
    """
    share = _shares_of_groups(counts)
    groups, experts = share.shape
    if experts <= MOST_BARS:
        shown = np.arange(experts)
        figure = _figure(experts, height=4.8)
        axes = figure.add_subplot()
        axes.set_xlabel("expert")
    else:
        shown = _differing(share, top)
        map_height = 0.8 + 0.3 * groups
        figure = _figure(experts, height=5.0 + map_height)
        grid = figure.add_gridspec(2, 1, height_ratios=[4.2, map_height])
        axes = figure.add_subplot(grid[0])
        axes.set_xlabel(f"the {len(shown)} of {experts} experts that differ most, by the group that chooses them most")
        for place in np.flatnonzero(np.diff(share[:, shown].argmax(axis=0))):
            axes.axvline(place + 0.5, color=QUIET, linewidth=0.9, linestyle=":")
        _map_of_groups(figure, figure.add_subplot(grid[1]), list(counts), share, shown)
    _bars_of_groups(axes, counts, share, shown)
    handles, labels = axes.get_legend_handles_labels()
    handles, labels = handles[1:] + handles[:1], labels[1:] + labels[:1]  # the line last
    columns = _columns([len(label) for label in labels])
    axes.legend(handles, labels, **_legend(columns))
    _title(axes, title, note, lift=15 * (-(-len(labels) // columns) - 1))
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the ending of `path`. Raises ValueError for another ending."""
    figure.savefig(path, format=ending_of(path))


def ending_of(path: str | Path) -> str:
    """The format that a file's name asks for. Raises ValueError where it is none of `FORMATS`."""
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in FORMATS:
        raise ValueError(f"cannot write {path}: give it one of the endings .{', .'.join(FORMATS)}")
    return ending


def _figure(experts: int, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(min(11 + max(experts - 128, 0) / 64, 17), height), dpi=150, layout="constrained")


def _bars(axes: Axes, share: npt.NDArray[np.float64], uniform: float, marked: int, ylabel: str) -> None:
    experts = np.arange(len(share))
    best = [int(e) for e in metrics.top(np.nan_to_num(share), marked) if share[e] > 0] if marked > 0 else []
    colours = [TOP if e in best else BAR for e in experts]
    # Bars of a dense picture touch: a gap of less than a pixel would be drawn as a moiré of light and dark bars.
    axes.bar(experts, share, width=0.82 if len(share) <= 128 else 1.0, color=colours)
    axes.axhline(uniform, color=LINE, linewidth=1.2, linestyle=(0, (5, 3)), label=f"uniform, {_percent(uniform)}")
    peak = max(float(np.nanmax(share)), uniform)
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
            color=DEAD,
            clip_on=False,
            zorder=5,
            label=f"never chosen: {len(dead)} of {len(share)}",
        )
    room = len(share) * 1.35 / axes.figure.get_figure(root=True).get_size_inches()[0]  # what a label needs
    for rank, (e, x) in enumerate(zip(best, _spread(best, len(share), room), strict=True), start=1):
        axes.annotate(
            f"#{rank}  expert {e}\n{_percent(share[e])}",
            xy=(e, share[e]),
            xytext=(x, peak * 1.11),
            ha="center",
            va="bottom",
            fontsize=9,
            color=TOP,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": TOP, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 0},
        )
    axes.set_ylabel(ylabel)
    axes.set_xticks(_ticks(len(share)))
    _frame(axes)
    axes.legend(**_legend(2))


def _bars_of_groups(
    axes: Axes, counts: Mapping[str, npt.ArrayLike], share: npt.NDArray[np.float64], shown: npt.NDArray[np.int64]
) -> None:
    groups, experts = share.shape
    width = 0.84 / groups
    for number, (name, of_group) in enumerate(counts.items()):
        axes.bar(
            np.arange(len(shown)) + (number - (groups - 1) / 2) * width,
            share[number, shown],
            width=width,
            color=GROUPS[number],
            label=f"{name}, {int(np.asarray(of_group).sum()):,} assignments",
        )
    uniform = 1 / experts
    label = f"uniform, {_percent(uniform)}"
    axes.axhline(uniform, color=DEAD, linewidth=1.2, linestyle=(0, (5, 3)), label=label)
    axes.set_xlim(-0.7, len(shown) - 0.3)
    axes.set_ylim(0, max(float(share[:, shown].max()), uniform) * 1.05)
    axes.set_xticks(range(len(shown)), [str(expert) for expert in shown])
    axes.set_ylabel("share of the group's assignments")
    _frame(axes)


def _frame(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes.yaxis.grid(True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(columns: int) -> dict[str, Any]:
    return {
        "loc": "lower right",
        "bbox_to_anchor": (1.0, 1.0),
        "ncols": columns,
        "frameon": False,
        "fontsize": 9,
        "borderaxespad": 0.2,
    }


def _columns(lengths: Sequence[int]) -> int:
    """How many columns of a legend with labels of these lengths fit above the narrowest picture."""
    taken, fit = 9, 140  # in letters: by a column beside its label, by a line
    if sum(lengths) + taken * len(lengths) <= fit:
        return len(lengths)
    return max(fit // (max(lengths) + taken), 1)


def _shares_of_groups(counts: Mapping[str, npt.ArrayLike]) -> npt.NDArray[np.float64]:
    """`[groups, experts]`; raises ValueError where there is nothing to compare."""
    if not 1 <= len(counts) <= len(GROUPS):
        raise ValueError(f"{len(counts)} groups: give at least one, and at most {len(GROUPS)}")
    arrays = {name: np.atleast_1d(np.asarray(of_group)) for name, of_group in counts.items()}
    if len({of_group.shape for of_group in arrays.values()}) > 1 or next(iter(arrays.values())).ndim != 1:
        shapes = ", ".join(f"{name} {of_group.shape}" for name, of_group in arrays.items())
        raise ValueError(f"the counts of each group must be [experts] of the same layer, not {shapes}")
    for name, of_group in arrays.items():
        if not of_group.any():
            raise ValueError(f"no assignment to draw: all counts of {name} are 0")
    return np.stack([metrics.shares(of_group) for of_group in arrays.values()])


def _differing(share: npt.NDArray[np.float64], top: int) -> npt.NDArray[np.int64]:
    """The `top` experts whose shares, `[groups, experts]`, are furthest apart: those of the first group that chooses
    them most come first, and of these the ones that differ most."""
    spread = share.max(axis=0) - share.min(axis=0)
    most = metrics.top(spread, top)
    return most[np.argsort(share[:, most].argmax(axis=0), kind="stable")]


def _map(figure: Figure, axes: Axes, labels: Sequence[str], load: npt.NDArray[np.float64], scale: str) -> None:
    """Load over uniform load, `[labels, experts]`, as colours, which `scale` names."""
    import matplotlib as mpl
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator

    # The scale is logarithmic, so that half and twice the uniform load stand out alike and one heavy expert does not
    # fade the rest. Zero is below any logarithmic scale: it is drawn as the colour of "under", a light grey, which is
    # far from the dark lower end of the scale; a load below the scale, which is symmetric, has that end's colour.
    most = max(float(np.nanmax(load)), 2.0)
    image = axes.imshow(
        np.where(load == 0, 1e-12, np.maximum(load, 1 / most)),
        aspect="auto",
        interpolation="nearest",
        cmap=mpl.colormaps["PuOr_r"].with_extremes(bad=NONE, under=NONE),
        norm=LogNorm(vmin=1 / most, vmax=most),
    )
    step = max(1, -(-len(labels) // 31))
    axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=8)
    dead = bool((load == 0).any())
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, fraction=0.03, extend="min" if dead else "neither")
    bar.set_label(scale, fontsize=9)
    bar.ax.yaxis.set_major_locator(LogLocator(base=2 if most < 32 else 4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}"))
    bar.minorticks_off()


def _map_of_groups(
    figure: Figure, axes: Axes, names: Sequence[str], share: npt.NDArray[np.float64], shown: npt.NDArray[np.int64]
) -> None:
    groups, experts = share.shape
    _map(figure, axes, names, share * experts, "load / uniform")
    axes.set_ylim(groups - 0.5, -0.75)
    axes.scatter(shown, np.full(len(shown), -0.62), marker="v", s=14, color="black", linewidths=0)
    axes.set_xticks(_ticks(experts))
    axes.set_xlabel("expert   (marks: those above" + ("; grey: never chosen)" if (share == 0).any() else ")"))


def _title(axes: Axes, title: str, note: str, lift: float = 0) -> None:
    """`lift`: points that the legend takes beyond a first line."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=(40 if note else 22) + lift)
    if note:
        axes.annotate(
            note, xy=(0, 1), xycoords="axes fraction", xytext=(0, 22 + lift), textcoords="offset points", color=QUIET
        )


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


def _ticks(experts: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128, 256, 2048, 65536) if experts <= 26 * step)
    return list(range(0, experts, step))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
