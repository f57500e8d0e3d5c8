"""What all pictures share: colours, frames, titles, ticks, legends, colour bars, and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Floats = npt.NDArray[np.float64]

BAR, TOP, LINE, DEAD, QUIET = "#8FA3B5", "#D55E00", "#0B3C5D", "#000000", "#5A5A5A"
INTERVAL = "#222222"
NONE = "#CFCFCF"
# Okabe and Ito's colours; neighbours differ in brightness too.
GROUPS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#000000", "#F0E442")
FORMATS = ("png", "svg", "pdf")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the ending of `path`. Raises ValueError for another ending."""
    figure.savefig(path, format=ending_of(path))


def ending_of(path: str | Path) -> str:
    """The format that a file's name asks for. Raises ValueError where it is none of `FORMATS`."""
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in FORMATS:
        raise ValueError(f"cannot write {path}: give it one of the endings .{', .'.join(FORMATS)}")
    return ending


def new_figure(experts: int, height: float) -> Figure:
    """A figure as wide as so many experts beside each other need."""
    from matplotlib.figure import Figure

    return Figure(figsize=(min(11 + max(experts - 128, 0) / 64, 17), height), dpi=150, layout="constrained")


def map_height(rows: int) -> float:
    """The height in inches of a map with so many rows."""
    return min(max(0.17 * rows, 1.6), 9.0)


def root(axes: Axes) -> Figure:
    """The figure of these axes, also where they are in a part of one."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes belong to no figure")
    return figure


def title(axes: Axes, text: str, note: str = "", lift: float = 0) -> None:
    """A title at the left and, below it, a smaller line. `lift`: points that the legend takes beyond a first line."""
    axes.set_title(text, loc="left", fontsize=13, fontweight="bold", pad=(40 if note else 22) + lift)
    if note:
        axes.annotate(
            note, xy=(0, 1), xycoords="axes fraction", xytext=(0, 22 + lift), textcoords="offset points", color=QUIET
        )


def frame(axes: Axes, *, shares: bool = False) -> None:
    """Lines behind what is drawn, no box around it; `shares`: the y axis is in percent."""
    from matplotlib.ticker import FuncFormatter

    if shares:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes.yaxis.grid(True, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend(columns: int) -> dict[str, Any]:
    """The arguments of a legend above the axes, at the right."""
    return {
        "loc": "lower right",
        "bbox_to_anchor": (1.0, 1.0),
        "ncols": columns,
        "frameon": False,
        "fontsize": 9,
        "borderaxespad": 0.2,
    }


def ticks(experts: int, most: int = 26) -> list[int]:
    """At most so many round ids."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128, 256, 2048, 65536) if experts <= most * step)
    return list(range(0, experts, step))


def label_rows(axes: Axes, labels: Sequence[str], most: int = 31) -> None:
    """Name the rows of a map, or every n-th of them where there is no room for all."""
    step = max(1, -(-len(labels) // most))
    axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=8)


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def ratio_map(axes: Axes, ratio: Floats, scale: str, *, most: float | None = None, bar: bool = True) -> AxesImage:
    """Ratios `[rows, columns]` as colours: orange above 1, violet below, white at 1; 0 and NaN grey.

    The scale is logarithmic, so that half and twice stand out alike and one large ratio does not fade the rest. Zero is
    below any logarithmic scale, so it is drawn as the colour of "under", a light grey, which is far from the dark lower
    end; a ratio below the scale, which is symmetric, has that end's colour.

    scale: what the colours mean; most: the end of the scale, the largest ratio unless given; bar: draw the scale.
    """
    import matplotlib as mpl
    from matplotlib.colors import LogNorm

    known = ratio[np.isfinite(ratio)]
    top = max(float(known.max(initial=0)), 2.0) if most is None else most
    image = axes.imshow(
        np.where(ratio == 0, 1e-12, np.clip(ratio, 1 / top, top)),
        aspect="auto",
        interpolation="nearest",
        cmap=mpl.colormaps["PuOr_r"].with_extremes(bad=NONE, under=NONE),
        norm=LogNorm(vmin=1 / top, vmax=top),
    )
    if bar:
        ratio_bar(image, [axes], scale, zero=bool((ratio == 0).any()), beyond=bool((known > top).any()))
    return image


def end_of_scale(ratios: npt.ArrayLike) -> float:
    """Where 99.9 % of the ratios end, above 1 or below: 2 at least, 64 at most. Zeros and NaN are not counted."""
    found = np.asarray(ratios, np.float64)
    known = np.abs(np.log2(found[np.isfinite(found) & (found > 0)]))
    return float(np.clip(2 ** np.quantile(known, 0.999), 2, 64)) if len(known) else 2.0


def ratio_bar(image: AxesImage, beside: Sequence[Axes], scale: str, *, zero: bool, beyond: bool = False) -> None:
    """The scale of a `ratio_map`, beside one or several axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[zero, beyond]
    bar = root(beside[0]).colorbar(image, ax=list(beside), pad=0.01, aspect=30, fraction=0.03, extend=extend)
    bar.set_label(scale, fontsize=9)
    most = float(image.get_clim()[1] or 2.0)
    bar.ax.yaxis.set_major_locator(LogLocator(base=2 if most < 32 else 4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}"))
    bar.minorticks_off()
