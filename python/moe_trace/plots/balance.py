"""How even the load of each layer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def balance(
    axes: Axes, layers: Sequence[int], values: npt.ArrayLike, name: str, *, even: float | None = None, worst: int = 1
) -> None:
    """One metric over the layers, a dot a layer.

    layers: the model's own indices; values: `[layers]`, NaN where a layer has none; name: of the metric; even: its
    value at an even load, a dashed line; worst: 1 where large values are uneven, -1 where small ones are. The most
    uneven layer is marked and named. Raises ValueError where no layer has a value.
    """
    from matplotlib.ticker import MaxNLocator

    found = np.asarray(values, dtype=np.float64)
    if found.shape != (len(layers),):
        raise ValueError(f"{len(layers)} layers with values of the shape {found.shape}: give one value a layer")
    if np.isnan(found).all():
        raise ValueError(f"no layer has a value of {name}")
    at = np.arange(len(layers))
    axes.plot(at, found, color=style.BAR, linewidth=1.1, marker="o", markersize=3.6, markerfacecolor=style.LINE)
    axes.lines[-1].set_markeredgewidth(0)
    low, high = float(np.nanmin(found)), float(np.nanmax(found))
    if even is not None:
        axes.axhline(even, color=style.LINE, linewidth=1.1, linestyle=(0, (5, 3)), clip_on=False)
        low, high = min(low, even), max(high, even)
    if np.nanmin(found) < np.nanmax(found):
        odd = int(np.nanargmax(worst * found))
        axes.plot(odd, found[odd], marker="o", markersize=6, color=style.TOP, linestyle="none")
        right = odd < len(layers) * 0.85
        axes.annotate(
            f"layer {layers[odd]}: {found[odd]:.4g}",
            xy=(odd, found[odd]),
            xytext=(5 if right else -5, 5 * worst),  # on the side where no other dot is
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if worst > 0 else "top",
            fontsize=9,
            color=style.TOP,
            fontweight="bold",
        )
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    below, above = (room, 2 * room) if worst > 0 else (2 * room, room)  # twice where the name of a layer is
    axes.set_ylim(max(low - below, 0) if low >= 0 else low - below, high + above)  # no metric of counts is below 0
    if (found[~np.isnan(found)] % 1 == 0).all():
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlim(-0.7, len(layers) - 0.3)
    shown = style.ticks(len(layers))
    axes.set_xticks(shown, [str(layers[i]) for i in shown])
    axes.set_ylabel(name, fontsize=9)
    style.frame(axes)
