"""How the usage of a layer's experts changes over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace import metrics
from moe_trace.plots import style
from moe_trace.plots.style import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

UNITS = ((86400.0 * 3, 86400.0, "days"), (3600.0 * 3, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def usage_over_time(axes: Axes, edges: npt.ArrayLike, counts: npt.ArrayLike) -> AxesImage:
    """Experts x windows: the load of each expert in each window over the uniform load, as a colour.

    edges: float `[windows + 1]`, seconds since the first step; the windows are equally long; counts: `[windows,
    experts]`, assignments. Grey where an expert was not chosen, and where nothing was executed. Raises ValueError
    without any assignment.
    """
    seconds, table = _checked(edges, counts)
    load = (metrics.shares(table) * table.shape[1]).T
    scale = "load / uniform load" + (" (grey: none)" if (load == 0).any() or np.isnan(load).any() else "")
    image = style.ratio_map(axes, load, scale)
    unit, name = unit_of(seconds[-1])
    image.set_extent((seconds[0] / unit, seconds[-1] / unit, len(load) - 0.5, -0.5))
    axes.set_yticks(style.ticks(len(load)))
    axes.set_ylabel("expert")
    axes.set_xlabel(f"{name} since the first step")
    return image


def top_shares(axes: Axes, edges: npt.ArrayLike, counts: npt.ArrayLike, *, top: int = 5) -> None:
    """The shares of the most chosen experts in each window, as steps; a gap where nothing was executed.

    edges, counts: as for `usage_over_time`; top: of how many experts, at most 8: the ones with the most assignments in
    all windows together.
    """
    seconds, table = _checked(edges, counts)
    share = metrics.shares(table)
    unit, name = unit_of(seconds[-1])
    best = metrics.top(table.sum(axis=0), min(top, len(style.GROUPS)))
    for number, expert in enumerate(best):
        axes.stairs(
            share[:, expert],
            seconds / unit,
            baseline=None,
            color=style.GROUPS[number],
            linewidth=1.6,
            label=f"expert {expert}",
        )
    uniform = 1 / table.shape[1]
    line = f"uniform, {style.percent(uniform)}"
    axes.axhline(uniform, color=style.LINE, linewidth=1.2, linestyle=(0, (5, 3)), label=line)
    axes.set_xlim(seconds[0] / unit, seconds[-1] / unit)
    axes.set_ylim(0, max(float(np.nanmax(share[:, best])), uniform) * 1.08)
    axes.set_ylabel("share of assignments")
    axes.set_xlabel(f"{name} since the first step")
    style.frame(axes, shares=True)
    axes.legend(**style.legend(len(best) + 1))


def unit_of(seconds: float) -> tuple[float, str]:
    """How many seconds the unit has in which a span is best read, and its name."""
    return next((unit, name) for least, unit, name in UNITS if seconds >= least)


def _checked(edges: npt.ArrayLike, counts: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
    seconds, table = np.asarray(edges, dtype=np.float64), np.asarray(counts)
    if table.ndim != 2 or seconds.shape != (len(table) + 1,):
        raise ValueError(
            f"counts must be [windows, experts] and edges [windows + 1], not {table.shape}, {seconds.shape}"
        )
    if not table.any():
        raise ValueError("no assignment to draw: all counts are 0")
    return seconds, table
