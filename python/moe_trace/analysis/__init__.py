"""Counting over traces of any size: one pass, block by block, fills several accumulators.

| accumulator | of |
|---|---|
| `Coactivation` | experts chosen together in a layer |
| `Transitions` | experts of one layer and of another, for the same token |
| `Repetition` | a token's experts and those of the token before it |
| `UsageOverTime` | counts by window of time |
| `RequestCounts` | counts by request, for intervals and tests over requests |
| `GroupCounts` | the same by group of requests, where there are many |
| `PhaseCounts` | prefill and decode by group of requests, however many there are |
| `DistinctExperts` | experts that a step needs, by its number of rows |
| `RouterScores` | confidence, margin and entropy, from logits |

`fill(selection, *accumulators, jobs=…)` reads; an accumulator is also its result, with the figures of
`moe_trace.metrics` as methods. What a trace's statistics hold already (counts, weight sums) `Selection.stats` gives
without reading rows, and `counts_over_time` gives it by window of time.
"""

from __future__ import annotations

from moe_trace.analysis.accumulator import Accumulator
from moe_trace.analysis.groups import GroupCounts
from moe_trace.analysis.load import DistinctExperts, RequestCounts, UsageOverTime
from moe_trace.analysis.one_pass import fill
from moe_trace.analysis.pairs import Coactivation, Transitions
from moe_trace.analysis.part import Part, Whose
from moe_trace.analysis.phases import PhaseCounts
from moe_trace.analysis.repetition import Repetition
from moe_trace.analysis.scores import RouterScores
from moe_trace.analysis.windows import counts_over_time

__all__ = [
    "Accumulator",
    "Coactivation",
    "DistinctExperts",
    "GroupCounts",
    "Part",
    "PhaseCounts",
    "Repetition",
    "RequestCounts",
    "RouterScores",
    "Transitions",
    "UsageOverTime",
    "Whose",
    "counts_over_time",
    "fill",
]
