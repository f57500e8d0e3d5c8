"""Pictures of routing. `of(selection, kind)` makes a whole figure of a kind; `save` writes it.

What the figures are put together from can be called by itself. `expert_histogram`, `layers_histogram` and
`groups_histogram` make a figure from counts. The others draw arrays into an `Axes` of yours: `usage`, `groups`,
`layers_map`, `balance`, `distance`, `ratio`, `top_shares`, `usage_over_time`, `together`, `strongest_pairs`,
`chosen_experts`, `chosen_weights`.

matplotlib is imported when a picture is drawn, not when this package is. No global state of it (pyplot, the backend,
rcParams) is touched, so that a notebook's or a server's own settings stay as they are. The colours can be told apart
with any kind of colour vision.
"""

from __future__ import annotations

from moe_trace.plots.balance import balance
from moe_trace.plots.comparison import distance, ratio
from moe_trace.plots.groups import MOST_BARS, groups, groups_histogram
from moe_trace.plots.histogram import expert_histogram, layers_histogram, layers_map, usage
from moe_trace.plots.kinds import KINDS, of
from moe_trace.plots.pairs import strongest_pairs, together
from moe_trace.plots.request import chosen_experts, chosen_weights
from moe_trace.plots.style import BAR, DEAD, FORMATS, GROUPS, LINE, NONE, QUIET, TOP, ending_of, save
from moe_trace.plots.time import top_shares, usage_over_time

__all__ = [
    "BAR",
    "DEAD",
    "FORMATS",
    "GROUPS",
    "KINDS",
    "LINE",
    "MOST_BARS",
    "NONE",
    "QUIET",
    "TOP",
    "balance",
    "chosen_experts",
    "chosen_weights",
    "distance",
    "ending_of",
    "expert_histogram",
    "groups",
    "groups_histogram",
    "layers_histogram",
    "layers_map",
    "of",
    "ratio",
    "save",
    "strongest_pairs",
    "together",
    "top_shares",
    "usage",
    "usage_over_time",
]
