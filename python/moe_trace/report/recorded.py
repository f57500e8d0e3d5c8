"""What was recorded, and how completely: the lines of `moe-native summary`, so that none is said in two ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_trace import show
from moe_trace.units import count

LEVELS = {"green": "good", "yellow": "note", "red": "bad"}  # of the terminal's colours


def lines(summary: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Facts of a trace: what each is of, what it says, and how bad that is: `good`, `note`, `bad` or nothing.

    summary: the object of `moe_trace.summary`; metadata: of the trace.
    """
    yield "trace", str(summary["path"]), ""
    layers = summary["layers"]
    shapes = sorted({(layer["experts"], layer["top_k"] or 0) for layer in layers})
    each = ", ".join(f"{experts} experts" + (f" (top-{k})" if k else "") for experts, k in shapes)
    yield "model", f"{summary['model'] or 'nobody said'}: {count(len(layers), 'layer')} with {each or 'nothing'}", ""
    ranks = [count(summary["runs"], "run"), count(summary["ranks"], "rank")]
    ranks += [count(summary["stages"], "pipeline stage")] if summary["stages"] > 1 else []
    ranks += [count(summary["shards"], "sequence-parallel shard")] if summary["shards"] > 1 else []
    yield "runs", ", ".join(ranks), ""
    if summary["first_time"]:
        first, last = (summary[key][:19].replace("T", " ") for key in ("first_time", "last_time"))
        yield "time", f"{first} to {last} UTC", ""
    for key in ("versions", "device", "dtype"):
        value = metadata.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        if value:
            yield key, str(value), ""
    if summary["fields"]:
        yield "fields", ", ".join(map(str, summary["fields"])), ""
    asked = {key: value for key, value in summary["selection"].items() if value is not None}
    if asked:
        text = ", ".join(f"{k} {show.ranges(v) if k == 'layers' else v}" for k, v in asked.items())
        yield "selected", f"{text}; this page is of these rows only", "note"
    for warning in summary["warnings"]:
        yield "note", warning, "note"
    for line in show.losses_and_coverage(summary):
        yield line.plain[:10].strip(), line.plain[10:], LEVELS.get(str(line.style), "")
