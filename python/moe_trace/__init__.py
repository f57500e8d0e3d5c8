"""moe_trace reads what moe_native recorded: `moe_trace.open("trace").layer(12).decode().ids`. It needs no torch."""

from __future__ import annotations

from moe_trace.batch import Batch
from moe_trace.coverage import Layer
from moe_trace.errors import DamagedTrace, NotATrace, TraceError, TraceNotFound, UnsupportedVersion
from moe_trace.recover import Recovery, recover
from moe_trace.select import Selection
from moe_trace.sequence import TokenSequence
from moe_trace.statistics import LayerStats
from moe_trace.trace import Loss, Trace, open

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "DamagedTrace",
    "Layer",
    "LayerStats",
    "Loss",
    "NotATrace",
    "Recovery",
    "Selection",
    "TokenSequence",
    "Trace",
    "TraceError",
    "TraceNotFound",
    "UnsupportedVersion",
    "__version__",
    "open",
    "recover",
]
