"""What `moe-native info` says: what a trace consists of. `show.info` prints it; `--json` gives it as it is.

The object (`"format": "moe-native info"`, `"version": 1`; later versions may add keys, never change one's meaning) has
`path`, `model`, the keys `state` to `last_time` of `moe_trace.summary`, and

| key | value |
|---|---|
| `metadata` | of the newest rank: csrc/FORMAT.md, section 6, without `layers` |
| `recorded` | `{"ids": "uint8", …}`: the columns of the newest rows and their types; several types are joined by `/` |
| `steps`, `rows` | executed steps, and tokens that are stored; of the stages of a pipeline, the most |
| `layer_rows` | rows of layers: the sum over layers of their tokens |
| `requests` | how many requests have a name (one in several runs is counted once) |
| `cached` | how many tokens of them were not executed, because the engine had them in its prefix cache |
| `bytes`, `bytes_per_layer_row` | of all segment files; `bytes / layer_rows`, null without rows |
| `rank_list` | an object a rank: `run`, `rank`, `layers` (those it recorded), `state`, `pid`, `ring` (path or |
| | null), `ring_steps` and `ring_rows` (what a dead process left in its ring and no segment has yet), `bytes`, |
| | `segments` |

A segment: `file`, `number`, `bytes`, `closed`, `blocks`, `steps`, `rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_trace.format import FIELD_NAMES, ROWS_BLOCK
from moe_trace.joined import groups
from moe_trace.summary import standing

if TYPE_CHECKING:
    from moe_trace import Trace
    from moe_trace.rank import Rank
    from moe_trace.segment import Segment

DTYPES = {1: "uint8", 2: "uint16", 3: "uint32", 4: "float16", 5: "bfloat16", 6: "float32"}


def describe(trace: Trace) -> dict[str, Any]:
    """The object above."""
    said = {rank.directory: _rank(run.name, rank) for run in trace.runs for rank in run.ranks}
    ranks = list(said.values())
    of_groups = [[[said[rank.directory] for rank in shard] for shard in group] for group in groups(trace.ranks)]
    layer_rows = sum(stats.rows for stats in trace.stats().values())
    size = sum(rank["bytes"] for rank in ranks)
    return {
        "format": "moe-native info",
        "version": 1,
        "path": str(trace.path),
        "model": trace.metadata.get("model"),
        **standing(trace),
        "metadata": {key: value for key, value in trace.metadata.items() if key != "layers"},
        "recorded": _recorded(trace),
        "steps": sum(max(_of(rank, "steps") for shard in group for rank in shard) for group in of_groups),
        "rows": sum(max(_of(rank, "rows") for rank in shard) for group in of_groups for shard in group),
        "layer_rows": layer_rows,
        "requests": len(trace.requests),
        "cached": sum(_cached(group[0][0]) for group in groups(trace.ranks)),
        "bytes": size,
        "bytes_per_layer_row": size / layer_rows if layer_rows else None,
        "rank_list": ranks,
    }


def _cached(rank: Rank) -> int:
    return sum(request.cached_tokens for request in rank.requests.values())


def _of(rank: dict[str, Any], what: str) -> int:
    steps_or_rows: int = rank[f"ring_{what}"] + sum(segment[what] for segment in rank["segments"])
    return steps_or_rows


def _rank(run: str, rank: Rank) -> dict[str, Any]:
    segments = [_segment(segment) for segment in rank.segments]
    return {
        "run": run,
        "rank": rank.name,
        "layers": sorted(rank.layers),
        "state": rank.state,
        "pid": rank.owner.get("pid"),
        "ring": None if rank.ring_path is None else str(rank.ring_path),
        "ring_steps": len(rank.tail.blocks),
        "ring_rows": sum(block.rows for block in rank.tail.blocks),
        "bytes": sum(segment["bytes"] for segment in segments),
        "segments": segments,
    }


def _segment(segment: Segment) -> dict[str, Any]:
    index = segment.index
    whole = index[index["kind"] == ROWS_BLOCK]  # fragments are parts of a step that one of these completes
    return {
        "file": segment.path.name,
        "number": segment.number,
        "bytes": segment.size,
        "closed": segment.closed,
        "blocks": len(index),
        "steps": int(whole["steps"].sum()),
        "rows": int(whole["rows"].sum()),
    }


def _recorded(trace: Trace) -> dict[str, str]:
    """The columns of the newest block that has rows."""
    for rank in reversed(trace.ranks):
        for block in rank.blocks(newest_first=True):
            if block.rows:
                types: dict[str, set[str]] = {}
                for (field, _), (dtype, _) in sorted(block.columns.items()):
                    types.setdefault(FIELD_NAMES[field], set()).add(DTYPES.get(dtype, f"type {dtype}"))
                return {name: "/".join(sorted(found)) for name, found in types.items()}
    return {}
