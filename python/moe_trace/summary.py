"""What `moe-native summary` says, as one object. `show.summary` prints it; `--json` gives it as it is.

The object (`"format": "moe-native summary"`, `"version": 1`; later versions may add keys, never change one's meaning):

| key | value |
|---|---|
| `path`, `model` | of the trace; `model` is null where nobody said |
| `state` | `closed`, `live` (a process is recording) or `crashed` (its owner died; what it had committed is counted) |
| `complete` | false when there is any loss, problem or missed layer; the next three say which |
| `losses` | list of `{"cause", "steps", "layers", "rows"}`: totals of the whole trace, whatever was selected |
| `stored_rows`, `executed_rows` | tokens of the whole trace that are stored, and that are counted: more, |
| | where requests were sampled, or with the field `counts` |
| `kinds` | the executed tokens: list of `{"phase", "modality", "recomputed", "draft", "rows"}` |
| `fields`, `sample` | what the newest rank stores: names of fields or `["counts"]`, and the share of requests |
| `paused` | `{"steps", "rows"}` that were not recorded because recording was paused, on request; no loss |
| `deleted_segments` | the oldest segments, deleted to keep the trace within its max_bytes; no loss |
| `whole_since` | ISO 8601 in UTC: since when all steps are there, if segments were deleted; else null |
| `problems` | list of sentences: torn or damaged segments, rings that could not be read |
| `coverage` | `{"exact", "derived", "missed", "skipped"}`: lists of `{"layer", "name", "detail"}` |
| `left_out` | list of sentences: what routed and was not to be recorded, such as a draft model's layers |
| `runs`, `ranks` | how many there are |
| `stages`, `shards` | how many of the ranks are the pipeline stages and the sequence-parallel shards of one of them |
| `first_time`, `last_time` | of the whole trace: ISO 8601 in UTC, or null without a step |
| `selection` | `{"layers", "phase", "since", "run"}` as asked for, null for all |
| `warnings` | list of sentences: where the counts are of more than was selected |
| `layers` | list, an object for each layer that was recorded and selected; below |
| `all` | over these layers; below |

A layer: `layer`, `name`, `experts`, `top_k`, `status`; `rows` (tokens), `assignments` (the sum of the counts),
`invalid` (ids that were no expert's), `top` (the most chosen: a list of `{"expert", "count", "share"}`, and of
`add_intervals` `low` and `high`), and, as `moe_trace.metrics` defines them, `normalized_entropy`, `effective_experts`,
`imbalance` (max/mean) and `dead_experts`;
null where a ratio has no value, as in a layer without rows.

`all`: sums over the layers of `rows`, `assignments`, `invalid`, `experts` and `dead_experts`; `top` of the counts added
up by expert id (which mixes unrelated experts of different layers); `normalized_entropy` `{"mean", "min", "min_layer"}`
and `imbalance` `{"mean", "max", "max_layer"}`, where the mean is unweighted, over the layers that have a value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace import metrics
from moe_trace.joined import groups

if TYPE_CHECKING:
    from moe_trace import Selection, Trace

TOP = 3
STATUSES = ("exact", "derived", "missed", "skipped")


def summarize(
    trace: Trace, selection: Selection, asked: Mapping[str, Any]
) -> tuple[dict[str, Any], list[npt.NDArray[np.int64]]]:
    """The object above for one selection of a trace, and beside its `layers` their counts, each int64 `[experts]`.

    asked: what the user selected by, for the key `selection`. Block statistics are all that is read, unless the
    selection cuts through blocks (by time or request).
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stats = selection.stats()
    ledger = {entry.layer: entry for entry in trace.coverage}
    layers: list[dict[str, Any]] = []
    counts: list[npt.NDArray[np.int64]] = []
    for layer in sorted(stats):
        numbers, entry = stats[layer], ledger.get(layer)
        layers.append(
            {
                "layer": layer,
                "name": entry.name if entry else "",
                "experts": len(numbers.counts),
                "top_k": entry.top_k or None if entry else None,
                "status": entry.status if entry else "exact",
                **of_layer(numbers.counts, numbers.rows, numbers.invalid),
            }
        )
        counts.append(numbers.counts)
    whole = {
        "format": "moe-native summary",
        "version": 1,
        "path": str(trace.path),
        "model": trace.metadata.get("model"),
        **standing(trace),
        "selection": {"layers": None, "phase": None, "since": None, "run": None, **asked},
        "warnings": [str(warning.message) for warning in said],
        "layers": layers,
        "all": of_all(layers, counts),
    }
    return whole, counts


def add_intervals(
    of: dict[str, Any], selection: Selection, jobs: int = 1, progress: Callable[[int], Any] | None = None
) -> None:
    """Adds `low` and `high` to each entry of `top` of the layers: the 95 % interval of its share over requests
    (`metrics.bootstrap_ratio`), null with fewer than two; and to `warnings` what they are not of. Reads rows, as
    `analysis.fill` does with `jobs` and `progress`.
    """
    from moe_trace.analysis import GroupCounts, fill  # which a summary without them does not need

    found = GroupCounts()
    of["warnings"] += [f"intervals: {note}" for note in fill(selection, found, jobs=jobs, progress=progress)]
    for layer in of["layers"]:
        groups = found.groups(layer["layer"])
        groups = np.pad(groups, [(0, 0), (0, layer["experts"] - groups.shape[1])])
        best = [entry["expert"] for entry in layer["top"]]
        interval = metrics.bootstrap_ratio(groups[:, best], groups.sum(axis=1))
        for entry, low, high in zip(layer["top"], interval.low, interval.high, strict=True):
            entry |= {"low": _number(low), "high": _number(high)}


def standing(trace: Trace) -> dict[str, Any]:
    """How whole a trace is: the keys `state` to `last_time` of the object above."""
    of_groups = groups(trace.ranks)
    coverage: dict[str, list[dict[str, Any]]] = {status: [] for status in STATUSES}
    for entry in trace.coverage:
        item = {"layer": entry.layer, "name": entry.name, "detail": entry.detail}
        coverage.setdefault(entry.status, []).append(item)
    return {
        "state": trace.state,
        "complete": trace.complete,
        "losses": [
            {"cause": cause, "steps": loss.steps, "layers": loss.layers, "rows": loss.rows}
            for cause, loss in trace.losses.items()
        ],
        "stored_rows": trace.stored_rows,
        "executed_rows": trace.executed_rows,
        "kinds": [{**_kind(cls), "rows": rows} for cls, rows in trace.rows_by_class.items()],
        "fields": trace.metadata.get("fields"),
        "sample": trace.metadata.get("sample", 1.0),
        "paused": {"steps": trace.paused.steps, "rows": trace.paused.rows},
        "deleted_segments": trace.deleted_segments,
        "whole_since": _iso(trace.whole_since),
        "problems": list(trace.problems),
        "coverage": coverage,
        "left_out": trace.left_out,
        "runs": len(trace.runs),
        "ranks": len(trace.ranks),
        "stages": max((len(shard) for group in of_groups for shard in group), default=0),
        "shards": max((len(group) for group in of_groups), default=0),
        "first_time": _iso(trace.first_time),
        "last_time": _iso(trace.last_time),
    }


def _kind(cls: int) -> dict[str, Any]:
    modality = cls >> 2 & 15
    return {
        "phase": fmt.PHASES[cls & 3] if cls & 3 < len(fmt.PHASES) else "unknown",
        "modality": fmt.MODALITIES[modality] if modality < len(fmt.MODALITIES) else "unknown",
        "recomputed": bool(cls & fmt.CLASS_RECOMPUTED),
        "draft": bool(cls & fmt.CLASS_DRAFT),
    }


def of_layer(counts: npt.NDArray[np.int64], rows: int, invalid: int) -> dict[str, Any]:
    """The numbers of one layer, from its counts `[experts]`."""
    return {
        "rows": rows,
        "assignments": int(counts.sum()),
        "invalid": invalid,
        "top": _top(counts),
        "normalized_entropy": _number(metrics.normalized_entropy(counts)),
        "effective_experts": _number(metrics.effective_experts(counts)),
        "imbalance": _number(metrics.imbalance(counts)),
        "dead_experts": int(metrics.dead_experts(counts)),
    }


def of_all(layers: list[dict[str, Any]], counts: list[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """The numbers over all layers, from the objects of the layers and, beside them, their counts."""
    pooled = np.zeros(max((len(c) for c in counts), default=1), dtype=np.int64)
    for of_one in counts:
        pooled[: len(of_one)] += of_one
    whole: dict[str, Any] = {
        key: sum(layer[key] or 0 for layer in layers)
        for key in ("rows", "assignments", "invalid", "experts", "dead_experts")
    }
    whole["top"] = _top(pooled)
    for key, extreme in (("normalized_entropy", min), ("imbalance", max)):
        known = [layer for layer in layers if layer[key] is not None]
        far = extreme(known, key=lambda layer: layer[key]) if known else None
        whole[key] = {
            "mean": math.fsum(layer[key] for layer in known) / len(known) if known else None,
            extreme.__name__: far[key] if far else None,
            f"{extreme.__name__}_layer": far["layer"] if far else None,
        }
    return whole


def _top(counts: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    share = metrics.shares(counts)
    return [
        {"expert": int(e), "count": int(counts[e]), "share": float(share[e])}
        for e in metrics.top(counts, TOP)
        if counts[e] > 0
    ]


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
