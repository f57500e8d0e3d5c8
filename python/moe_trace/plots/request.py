"""One request, token by token: which expert each layer chose first, and with what weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def chosen_experts(
    axes: Axes,
    layers: Sequence[int],
    experts: npt.ArrayLike,
    total: int,
    *,
    first: int = 0,
    prompt_len: int | None = None,
) -> AxesImage:
    """Layers x tokens: the expert with the largest weight, as a colour.

    experts: int `[positions, layers]`, -1 where no row is in the trace (grey); total: number of experts; first: the
    position of the first column; prompt_len: where the prompt ends, a line. Up to 8 experts have a colour each; of
    more, neighbouring ids have similar colours, which means nothing: ids have no order.
    """
    import matplotlib as mpl
    from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize

    table = _checked(layers, experts).astype(np.int64)
    few = total <= len(style.GROUPS)
    image = axes.imshow(
        np.where(table.T < 0, np.nan, table.T),
        aspect="auto",
        interpolation="nearest",
        cmap=(ListedColormap(style.GROUPS[:total]) if few else mpl.colormaps["viridis"]).with_extremes(bad=style.NONE),
        norm=BoundaryNorm(np.arange(total + 1) - 0.5, total) if few else Normalize(0, max(total - 1, 1)),
    )
    bar = style.root(axes).colorbar(image, ax=axes, pad=0.01, aspect=30, fraction=0.03)
    bar.set_label("first choice (expert)" + (", grey: no row" if (table < 0).any() else ""), fontsize=9)
    if few:
        bar.set_ticks(list(range(total)))
    _finish(axes, image, layers, table.shape[0], first, prompt_len)
    return image


def chosen_weights(
    axes: Axes, layers: Sequence[int], weights: npt.ArrayLike, *, first: int = 0, prompt_len: int | None = None
) -> AxesImage:
    """Layers x tokens: the largest weight of each row, the darker the larger.

    weights: float `[positions, layers]`, NaN where no row is in the trace (grey); the rest as for `chosen_experts`.
    """
    import matplotlib as mpl

    table = _checked(layers, weights).astype(np.float64)
    image = axes.imshow(
        table.T,
        aspect="auto",
        interpolation="nearest",
        cmap=mpl.colormaps["Blues"].with_extremes(bad=style.NONE),
        vmin=0,
        vmax=max(float(np.nanmax(table, initial=0)), 1e-9),
    )
    bar = style.root(axes).colorbar(image, ax=axes, pad=0.01, aspect=30, fraction=0.03)
    bar.set_label("its weight", fontsize=9)
    _finish(axes, image, layers, table.shape[0], first, prompt_len)
    return image


def _finish(
    axes: Axes, image: AxesImage, layers: Sequence[int], positions: int, first: int, prompt_len: int | None
) -> None:
    image.set_extent((first - 0.5, first + positions - 0.5, len(layers) - 0.5, -0.5))
    style.label_rows(axes, [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_xlabel("position")
    if prompt_len is not None and first < prompt_len < first + positions:
        axes.axvline(prompt_len - 0.5, color="white", linewidth=2.6)
        axes.axvline(prompt_len - 0.5, color=style.TOP, linewidth=1.2)
        axes.annotate(
            "prompt | generated", xy=(prompt_len - 0.5, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize=8, color=style.TOP,
        )  # fmt: skip


def _checked(layers: Sequence[int], values: npt.ArrayLike) -> npt.NDArray[np.generic]:
    table = np.asarray(values)
    if table.ndim != 2 or table.shape[1] != len(layers) or not len(table):
        raise ValueError(f"{len(layers)} layers with values of the shape {table.shape}: give [positions, layers]")
    return table
