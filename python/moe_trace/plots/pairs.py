"""Which experts of a layer are chosen together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace.plots import style
from moe_trace.plots.style import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FEW = 5  # rows; a pair that neither has nor should have as many says nothing


def together(axes: Axes, lift: npt.ArrayLike, pairs: npt.ArrayLike, expected: npt.ArrayLike) -> AxesImage:
    """Experts x experts: how much more often than expected two experts are chosen by the same token, as a colour.

    lift: float `[experts, experts]`, pairs over expected; pairs: int64 of that shape, tokens that chose both; expected:
    float of that shape, how many would by chance. Grey where both are below `FEW` (a ratio of so few says nothing), and
    on the diagonal. The scale ends where 99.9 % of the pairs end, at 64 at most.
    """
    drawn = credible(lift, pairs, expected)
    most = style.end_of_scale(drawn)
    scale = f"times as often as by chance (grey: fewer than {FEW} tokens)"
    image = style.ratio_map(axes, np.where(drawn == 0, 1 / most, drawn), scale, most=most)
    axes.set_xticks(style.ticks(len(drawn), 13))
    axes.set_yticks(style.ticks(len(drawn)))
    axes.set_xlabel("expert")
    axes.set_ylabel("expert")
    return image


def strongest_pairs(
    axes: Axes, lift: npt.ArrayLike, pairs: npt.ArrayLike, expected: npt.ArrayLike, *, most: int = 16
) -> None:
    """Bars of the pairs that are chosen together most beyond chance, by how surprising that is. Arguments as for
    `together`. A bar is as long as the lift; beside it is how many tokens chose both.
    """
    drawn, counts = credible(lift, pairs, expected), np.asarray(pairs)
    found = strongest(drawn, counts, expected, most)
    heights = [drawn[pair] for pair in found]
    axes.barh(range(len(found)), heights, color=style.BAR, height=0.7)
    axes.axvline(1, color=style.LINE, linewidth=1.2, linestyle=(0, (5, 3)))
    for row, pair in enumerate(found):
        axes.annotate(
            f"{int(counts[pair]):,}", xy=(heights[row], row), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color=style.QUIET,
        )  # fmt: skip
    axes.set_yticks(range(len(found)), [f"{a} + {b}" for a, b in found], fontsize=8)
    axes.set_ylim(max(len(found), 1) - 0.4, -0.6)
    axes.set_xlim(0, max(heights, default=1.0) * 1.2)
    axes.set_xlabel("times as often\nas by chance")
    axes.set_title("strongest pairs\n(and tokens of both)", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def strongest(lift: npt.ArrayLike, pairs: npt.ArrayLike, expected: npt.ArrayLike, most: int) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of a lift above 1 that are most surprising: n ln(n / e) - (n - e) is the largest, half
    the deviance of a Poisson count n of the expected e. Unlike the lift, it is not largest where the counts are small.
    """
    times, n, e = (np.asarray(a, np.float64) for a in (lift, pairs, expected))
    above = np.triu(np.isfinite(times) & (times > 1) & (n > 0), 1)
    surprise = np.full(times.shape, -np.inf)
    surprise[above] = n[above] * np.log(times[above]) - (n[above] - e[above])
    order = np.argsort(-surprise, axis=None, kind="stable")[:most]
    return [divmod(int(cell), len(times)) for cell in order if surprise.flat[cell] > -np.inf]


def credible(lift: npt.ArrayLike, pairs: npt.ArrayLike, expected: npt.ArrayLike) -> Floats:
    """The lift, as for `together`; NaN on the diagonal and where it says nothing."""
    drawn = np.array(lift, dtype=np.float64)
    if drawn.ndim != 2 or drawn.shape[0] != drawn.shape[1] or drawn.shape != np.shape(pairs) != np.shape(expected):
        raise ValueError(f"pairs of experts must be [experts, experts], not {drawn.shape}")
    drawn[np.maximum(np.asarray(pairs), np.asarray(expected)) < FEW] = np.nan
    np.fill_diagonal(drawn, np.nan)
    return drawn
