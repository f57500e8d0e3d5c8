"""The median of a sample, and how sure it is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

RESAMPLES = 2_000


def median(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 90 % interval by bootstrap (percentile method)."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return statistics.median(values), medians[RESAMPLES // 20], medians[-RESAMPLES // 20]
