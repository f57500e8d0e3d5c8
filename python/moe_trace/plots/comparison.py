"""Two sets of tokens against each other, layer by layer: prefill and decode, two modalities, two traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace.plots import style
from moe_trace.plots.histogram import load_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FEW = 5  # assignments; where neither side has as many, a ratio says nothing


def distance(
    axes: Axes, layers: Sequence[int], values: npt.ArrayLike, chance: npt.ArrayLike | None = None, *, label: str = ""
) -> None:
    """How far apart two sets of tokens are in each layer, as a share of their assignments.

    values: `[layers]`, the total variation distance, 0 (the same shares) to 1 (no expert in common), NaN where a layer
    has none; chance: `[layers]`, what the same number of assignments would differ by if nothing but chance told them
    apart, drawn as short lines. Call it again for further pairs, each with its `label`.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (len(layers),):
        raise ValueError(f"{len(layers)} layers with distances of the shape {found.shape}: give one a layer")
    at = np.arange(len(layers))
    number = sum(line.get_marker() == "o" for line in axes.lines)
    colour = style.GROUPS[number % len(style.GROUPS)]
    axes.plot(at, found, color=colour, linewidth=1.1, marker="o", markersize=4, label=label or None)
    if chance is not None:
        name = "by chance, were tokens independent" + (f" ({label})" if label else "")
        axes.hlines(np.asarray(chance), at - 0.4, at + 0.4, color=colour, linewidth=1.2, linestyle=":", label=name)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylim(0, max(axes.get_ylim()[1] if number else 0.0, float(np.nanmax(found, initial=0.0)) * 1.15, 0.01))
    shown = style.ticks(len(layers))
    axes.set_xticks(shown, [str(layers[i]) for i in shown])
    axes.set_ylabel("assignments that differ", fontsize=9)
    style.frame(axes, shares=True)
    if label or chance is not None:
        axes.legend(**style.legend(2))


def ratio(
    axes: Axes,
    layers: Sequence[int],
    first: Sequence[npt.ArrayLike],
    second: Sequence[npt.ArrayLike],
    names: tuple[str, str],
) -> AxesImage:
    """Layers x experts: an expert's share of the first set's assignments over its share of the second's, as a colour.

    first, second: of each layer `[experts]`, assignments; names: of the two sets. Grey where neither set has `FEW`
    assignments of an expert: a ratio of so few says nothing. Where one set has none at all, the colour is that of the
    end of the scale. Raises ValueError where a set has no assignments at all.
    """
    ours, theirs = load_table(layers, first), load_table(layers, second)
    few = np.ones(ours.shape, bool)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        most = np.maximum(np.asarray(a), np.asarray(b))
        few[row, : len(most)] = most < FEW
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(few, np.nan, ours / theirs)
    most_drawn = style.end_of_scale(quotient)
    # 0 is "none in the first set", which is no lack of data here: the end of the scale, and not grey.
    drawn = np.where(quotient == 0, 1 / most_drawn, quotient)
    scale = f"share of {names[0]} / share of {names[1]}" + ("\n(grey: too few to say)" if np.isnan(drawn).any() else "")
    image = style.ratio_map(axes, drawn, scale, most=most_drawn)
    style.label_rows(axes, [str(layer) for layer in layers])
    axes.set_xticks(style.ticks(ours.shape[1]))
    axes.set_ylabel("layer")
    axes.set_xlabel("expert")
    return image
