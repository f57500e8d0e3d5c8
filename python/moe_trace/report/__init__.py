"""A report: one HTML page that holds everything it shows, opens from disk without a network, and can be mailed.

`build(trace, selection)` gives the page. What it says of the trace is the object of `moe_trace.summary`; what is
computed besides has a room each:

| room | what |
|---|---|
| `recorded` | what was recorded, and how completely: losses, problems, missed layers, what was sampled or paused |
| `phases` | how far prefill and decode differ, and whether requests differ by as much among themselves |
| `findings` | sentences, from numbers alone |
| `data` | the JSON that the page draws from |
| `page` | the page: page.html, page.css, charts.js and page.js, with all of this in its places |

A page has no link to anything, and its Content-Security-Policy allows no request and no script but its own.
"""

from __future__ import annotations

from moe_trace.report.page import build

__all__ = ["build"]
