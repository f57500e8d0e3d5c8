"""The experts of one layer by groups of tokens: prefill and decode, text and images, two traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace import metrics
from moe_trace.plots import style
from moe_trace.plots.style import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 32  # experts whose bars are all drawn, when there are several of each


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
    number, experts = share.shape
    if experts <= MOST_BARS:
        shown = np.arange(experts)
        figure = style.new_figure(experts, height=4.8)
        axes = figure.add_subplot()
        axes.set_xlabel("expert")
    else:
        shown = _differing(share, top)
        map_height = 0.8 + 0.3 * number
        figure = style.new_figure(experts, height=5.0 + map_height)
        grid = figure.add_gridspec(2, 1, height_ratios=[4.2, map_height])
        axes = figure.add_subplot(grid[0])
        axes.set_xlabel(f"the {len(shown)} of {experts} experts that differ most, by the group that chooses them most")
        for place in np.flatnonzero(np.diff(share[:, shown].argmax(axis=0))):
            axes.axvline(place + 0.5, color=style.QUIET, linewidth=0.9, linestyle=":")
        _map_of_groups(figure.add_subplot(grid[1]), list(counts), share, shown)
    lines = groups(axes, counts, shown=shown)
    style.title(axes, title, note, lift=15 * (lines - 1))
    return figure


def groups(axes: Axes, counts: Mapping[str, npt.ArrayLike], *, shown: npt.ArrayLike | None = None) -> int:
    """The bars of `groups_histogram`, of the experts `shown` (int64 `[n]`, in this order; all unless given), and their
    legend above the axes. Returns how many lines the legend has.
    """
    share = _shares_of_groups(counts)
    experts = np.arange(share.shape[1]) if shown is None else np.asarray(shown)
    width = 0.84 / len(share)
    for number, (name, of_group) in enumerate(counts.items()):
        axes.bar(
            np.arange(len(experts)) + (number - (len(share) - 1) / 2) * width,
            share[number, experts],
            width=width,
            color=style.GROUPS[number],
            label=f"{name}, {int(np.asarray(of_group).sum()):,} assignments",
        )
    uniform = 1 / share.shape[1]
    label = f"uniform, {style.percent(uniform)}"
    axes.axhline(uniform, color=style.DEAD, linewidth=1.2, linestyle=(0, (5, 3)), label=label)
    axes.set_xlim(-0.7, len(experts) - 0.3)
    axes.set_ylim(0, max(float(share[:, experts].max()), uniform) * 1.05)
    axes.set_xticks(range(len(experts)), [str(expert) for expert in experts])
    axes.set_ylabel("share of the group's assignments")
    style.frame(axes, shares=True)
    handles, labels = axes.get_legend_handles_labels()
    handles, labels = handles[1:] + handles[:1], labels[1:] + labels[:1]  # the line last
    columns = _columns([len(label) for label in labels])
    axes.legend(handles, labels, **style.legend(columns))
    return -(-len(labels) // columns)


def _columns(lengths: Sequence[int]) -> int:
    """How many columns of a legend with labels of these lengths fit above the narrowest picture."""
    taken, fit = 9, 140  # in letters: by a column beside its label, by a line
    if sum(lengths) + taken * len(lengths) <= fit:
        return len(lengths)
    return max(fit // (max(lengths) + taken), 1)


def _shares_of_groups(counts: Mapping[str, npt.ArrayLike]) -> Floats:
    """`[groups, experts]`; raises ValueError where there is nothing to compare."""
    if not 1 <= len(counts) <= len(style.GROUPS):
        raise ValueError(f"{len(counts)} groups: give at least one, and at most {len(style.GROUPS)}")
    arrays = {name: np.atleast_1d(np.asarray(of_group)) for name, of_group in counts.items()}
    if len({of_group.shape for of_group in arrays.values()}) > 1 or next(iter(arrays.values())).ndim != 1:
        shapes = ", ".join(f"{name} {of_group.shape}" for name, of_group in arrays.items())
        raise ValueError(f"the counts of each group must be [experts] of the same layer, not {shapes}")
    for name, of_group in arrays.items():
        if not of_group.any():
            raise ValueError(f"no assignment to draw: all counts of {name} are 0")
    return np.stack([metrics.shares(of_group) for of_group in arrays.values()])


def _differing(share: Floats, top: int) -> npt.NDArray[np.int64]:
    """The `top` experts whose shares, `[groups, experts]`, are furthest apart: those of the first group that chooses
    them most come first, and of these the ones that differ most."""
    spread = share.max(axis=0) - share.min(axis=0)
    most = metrics.top(spread, top)
    return most[np.argsort(share[:, most].argmax(axis=0), kind="stable")]


def _map_of_groups(axes: Axes, names: Sequence[str], share: Floats, shown: npt.NDArray[np.int64]) -> None:
    number, experts = share.shape
    style.ratio_map(axes, share * experts, "load / uniform")
    style.label_rows(axes, names)
    axes.set_ylim(number - 0.5, -0.75)
    axes.scatter(shown, np.full(len(shown), -0.62), marker="v", s=14, color="black", linewidths=0)
    axes.set_xticks(style.ticks(experts))
    axes.set_xlabel("expert   (marks: those above" + ("; grey: never chosen)" if (share == 0).any() else ")"))
