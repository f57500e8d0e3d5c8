"""What routing says, as pure functions on arrays; each gives its formula, shapes and source.

| module | of |
|---|---|
| `load` | how evenly experts are used: counts `[..., E]` |
| `choices` | rows of ids `[..., k]`: the first choice, what two rows share |
| `pairs` | experts chosen together, and which follow which from layer to layer |
| `tokens` | repetition, saturation, specialisation, distinct experts of a step |
| `scores` | how sure a router is: logits `[..., E]` |
| `differences` | flips between two runs, divergence of two loads |
| `uncertainty` | intervals by bootstrap over requests, and tests by permutation |

Where a figure has no value it is NaN, never 0. `moe_trace.analysis` counts what these need, over traces of any size.
"""

from __future__ import annotations

from moe_trace.metrics.arrays import valid
from moe_trace.metrics.choices import by_rank, first_choice, overlap
from moe_trace.metrics.differences import (
    flip_rate,
    flipped_tokens,
    js_divergence,
    total_variation,
    total_variation_by_chance,
)
from moe_trace.metrics.load import (
    balancedness,
    cv,
    dead_experts,
    effective_experts,
    entropy,
    gini,
    imbalance,
    max_violation,
    normalized_entropy,
    shares,
    top,
)
from moe_trace.metrics.pairs import (
    adjacent_counts,
    coactivation,
    coactivation_by_chance,
    coactivation_counts,
    lift,
    mutual_information,
    pair_factors,
    transition,
    transition_counts,
)
from moe_trace.metrics.scores import confidence, margin, router_entropy, softmax
from moe_trace.metrics.tokens import (
    counts_by_group,
    distinct_by_chance,
    distinct_experts,
    follows,
    repetition,
    repetition_by_chance,
    saturation,
    specialization,
    vocabulary_specialization,
)
from moe_trace.metrics.uncertainty import Interval, PermutationTest, bootstrap, bootstrap_ratio, permutation_test

__all__ = [
    "Interval",
    "PermutationTest",
    "adjacent_counts",
    "balancedness",
    "bootstrap",
    "bootstrap_ratio",
    "by_rank",
    "coactivation",
    "coactivation_by_chance",
    "coactivation_counts",
    "confidence",
    "counts_by_group",
    "cv",
    "dead_experts",
    "distinct_by_chance",
    "distinct_experts",
    "effective_experts",
    "entropy",
    "first_choice",
    "flip_rate",
    "flipped_tokens",
    "follows",
    "gini",
    "imbalance",
    "js_divergence",
    "lift",
    "margin",
    "max_violation",
    "mutual_information",
    "normalized_entropy",
    "overlap",
    "pair_factors",
    "permutation_test",
    "repetition",
    "repetition_by_chance",
    "router_entropy",
    "saturation",
    "shares",
    "softmax",
    "specialization",
    "top",
    "total_variation",
    "total_variation_by_chance",
    "transition",
    "transition_counts",
    "valid",
    "vocabulary_specialization",
]
