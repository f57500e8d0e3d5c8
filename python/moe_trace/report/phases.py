"""How far prefill and decode differ, and whether that is more than requests differ by among themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_trace import metrics

FEWEST = 6  # groups of requests; with fewer no test
SHUFFLES = 999
LEVEL = 0.05


@dataclass(frozen=True)
class SwapTest:
    """Whether prefill and decode differ within requests.

    Attributes:
        layers: the layers that were tested.
        p: float64 `[layers]`: how often swapping prefill and decode within requests at random gives as large a
            difference, in any of the layers; so it needs no further correction for how many layers there are.
        groups: how many groups of requests were swapped as one.
    """

    layers: tuple[int, ...]
    p: npt.NDArray[np.float64]
    groups: int


def swap_test(groups: dict[int, npt.NDArray[np.int64]], seed: int = 0) -> SwapTest | None:
    """A randomisation test on counts of groups of requests, int64 `[groups, 2, experts]` by layer (`PhaseCounts`); None
    with fewer than `FEWEST` groups that have both phases in each layer.

    The statistic of a layer is half the sum over experts of |mean over groups of (p - q)|, with p and q the shares of a
    group's prefill and decode. Were there no difference within requests, p and q of a group could as well be swapped:
    that is done at random (Fisher's randomisation test; the same swaps in all layers). The largest standardised
    statistic of any layer is what each layer is held against (Westfall and Young 1993).
    """
    usable = {layer: table for layer, table in groups.items() if (table.sum(axis=2) > 0).all(axis=1).sum() >= FEWEST}
    if not usable:
        return None
    whole = np.all([(table.sum(axis=2) > 0).all(axis=1) for table in usable.values()], axis=0)
    if whole.sum() < FEWEST:
        return None
    number = int(whole.sum())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (SHUFFLES, number))
    values, null = [], []
    for table in usable.values():
        share = metrics.shares(table[whole])
        difference = share[:, 0] - share[:, 1]
        values.append(np.abs(difference.mean(axis=0)).sum() / 2)
        null.append(np.abs(signs @ difference / number).sum(axis=1) / 2)
    value, swapped = np.array(values), np.stack(null, axis=1)
    spread = swapped.std(axis=0)
    spread[spread == 0] = 1.0
    mean = swapped.mean(axis=0)
    largest = ((swapped - mean) / spread).max(axis=1)
    least = (value - mean) / spread - 1e-12
    p = (1 + (largest[:, None] >= least).sum(axis=0)) / (1 + SHUFFLES)
    return SwapTest(tuple(usable), p, number)
