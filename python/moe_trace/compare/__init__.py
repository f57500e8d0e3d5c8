"""What differs between two traces: how they use experts, and where the same tokens went to other ones.

`compare(a, b)` gives one object, which `moe-native compare` prints, and `--json` as it is (`"format": "moe-native
compare"`, `"version": 1`; later versions may add keys, never change one's meaning):

| key | value |
|---|---|
| `a`, `b` | of each trace: `path`, `model`, `complete`, `rows` (compared: current ones of requests), `requests` |
| `paired` | whether both have the same requests, whose loads are then held against each other request by request |
| `selection` | as asked for, of both |
| `layers` | list, an object for each layer that both have; below |
| `only_a`, `only_b` | layers that only one of them has |
| `aligned` | of the rows that both have, by request and position; null where there is none; below |
| `notes` | list of sentences: what was left out, and how sure the rest is |

A layer: `layer`, `experts`, `rows` `{"a", "b"}`, and of the loads `groups` (of requests, that all of this is made
from), `distance` (`difference`: the total variation distance, which is the share of assignments that go to other
experts; `chance`: what it is on average where the requests are shuffled between the traces, and `p`, how often it then
is as large, not corrected for looking at many layers), `normalized_entropy` and `imbalance` (`a`, `b`, and
`difference`, b - a), `changed_experts` (how many have a share whose interval leaves out 0: of those that did not
change, 5 % do by chance) and `top` (the largest changes of a share: a list of `{"expert", "a", "b", "difference",
"low", "high"}`). `low` and `high` are the 95 % interval of a difference over requests (`metrics.bootstrap`). What
needs two groups is null with fewer.

And of its aligned rows `flips`: null, or by `all`, `prefill`, `decode` an object or null: `rows`, `changed` (rows with
another set of experts), `rate` (the share of choices that differ, `metrics.flip_rate`) with `low` and `high`
(`metrics.bootstrap_ratio`), and `near`, `real`, `unknown`: the changed rows by what the logits say, null where none
has logits.

`aligned`: `requests`, `rows` (places that both have), `parted` (requests whose tokens differ from some position on,
up to which they are compared; null where tokens were not recorded), `near` (the tolerance) and `tokens`: by `all`,
`prefill`, `decode` null or `rows`, `changed` (a token of which any layer differs, `metrics.flipped_tokens`), `rate`,
`low`, `high`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_trace import metrics
from moe_trace.analysis import GroupCounts, fill
from moe_trace.batch import these
from moe_trace.compare.aligned import (
    CHANGED,
    LOST,
    PHASES,
    ROWS,
    Extents,
    Flips,
    Store,
    Tokens,
    places,
    until_they_part,
)
from moe_trace.compare.loads import FEW, difference, number
from moe_trace.errors import TraceError
from moe_trace.metrics.arrays import Ints
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_trace import Selection

NEAR_TIE = 0.05  # of logits: softmax gives the two experts probabilities within 5 % of each other

Advance = Callable[[int], Any]


def compare(
    a: Selection,
    b: Selection,
    *,
    asked: Mapping[str, Any] | None = None,
    near: float = NEAR_TIE,
    jobs: int = 1,
    progress: Advance | None = None,
) -> dict[str, Any]:
    """The object above for two selections, of one trace or of two.

    Rows are the current ones (`Selection.current`) of requests. They are aligned by the request's name and the
    position, requests of one name in the order of their first rows; whether both then had the same tokens before them
    is known only where tokens were recorded, and of prompts where the names stand for the same prompts. What is aligned
    needs a temporary file of 2 bytes for each choice.

    Args:
        asked: what the user selected by, for the key `selection`.
        near: a row that differs is a near-tie where the logits of the experts that changed places differ by no more.
        jobs, progress: as of `analysis.fill`.

    Raises:
        TraceError: there is nothing to compare: no layer in common, or a trace without rows.
    """
    if not near >= 0:
        raise ValueError(f"near is a difference of logits, 0 or above, not {near}")
    layers = tuple(sorted(set(a.layers) & set(b.layers)))
    if not layers:
        raise TraceError(f"no layer is in both: {_has(a)}; {_has(b)}")
    both = tuple(side.layer(layers).current() for side in (a, b))
    loads, extents = (GroupCounts(), GroupCounts()), (Extents(), Extents())
    notes: list[str] = []
    for name, side, load, extent in zip("ab", both, loads, extents, strict=True):
        said = fill(side, load, extent, jobs=jobs, progress=progress)
        notes += [f"{name.upper()}: {sentence}" for sentence in said]
        if not any(load.rows.values()):
            raise TraceError(_nothing(side))
    names = [set(extent.requests) for extent in extents]
    paired = bool(names[0]) and names[0] == names[1]
    aligned, flips = _align(both, extents, max(load.width for load in loads), near, jobs, progress, notes)
    found = [_layer(layer, loads, paired, flips) for layer in layers]
    notes += _doubts(found, names, flips, aligned)
    return {
        "format": "moe-native compare",
        "version": 1,
        **{
            name: {
                "path": str(side._trace.path),
                "model": side._trace.metadata.get("model"),
                "complete": side._trace.complete,
                "rows": max(load.rows.values()) - load.nobodys,
                "requests": len(extent.requests),
            }
            for name, side, load, extent in zip("ab", both, loads, extents, strict=True)
        },
        "paired": paired,
        "selection": {"layers": None, "phase": None, "since": None, "run": None, **(asked or {})},
        "layers": found,
        "only_a": sorted(set(a.layers) - set(b.layers)),
        "only_b": sorted(set(b.layers) - set(a.layers)),
        "aligned": aligned,
        "notes": list(dict.fromkeys(notes)),
    }


def _has(side: Selection) -> str:
    return f"{side._trace.path} has {these(side.layers) if side.layers else 'none'}"


def _nothing(side: Selection) -> str:
    trace = side._trace
    if trace.executed_rows and not trace.stored_rows:
        return (
            f"{trace.path} has counts only and no rows: there are no requests to compare. "
            f"moe-native plot {trace.path} --kind compare --against OTHER shows how its counts differ from others"
        )
    return f"there are no rows in this selection of {trace.path}"


def _layer(layer: int, loads: tuple[GroupCounts, GroupCounts], paired: bool, flips: Flips | None) -> dict[str, Any]:
    empty = np.zeros((0, 1), np.int64)
    a, b = (load.counts.get(layer, empty) for load in loads)
    return {
        "layer": layer,
        "experts": max(a.shape[1], b.shape[1]),
        "rows": {side: load.rows.get(layer, 0) for side, load in zip("ab", loads, strict=True)},
        **difference(a, b, paired=paired),
        "flips": None if flips is None or layer not in flips.sums else _flips(flips, layer),
    }


def _flips(flips: Flips, layer: int) -> dict[str, Any]:
    """The key `flips` of a layer."""
    found: dict[str, Any] = {}
    for name, phases in _PHASES.items():
        sums = flips.sums[layer][:, phases].sum(axis=1)
        near, real, unknown = flips.ties[layer][phases].sum(axis=0).tolist()
        found[name] = _rate(sums[:, ROWS], sums[:, CHANGED], sums[:, LOST], flips.k[layer])
        if found[name] is not None:
            of_ties = (near, real, unknown) if near or real else (None, None, None)  # None: there are no logits at all
            found[name].update(zip(("near", "real", "unknown"), of_ties, strict=True))
    return found


def _tokens(flips: Flips) -> dict[str, Any]:
    """The key `tokens` of what is aligned."""
    of_phases = {name: flips.tokens[:, phases].sum(axis=1) for name, phases in _PHASES.items()}
    return {name: _rate(of[:, 0], of[:, 1], of[:, 1], 1) for name, of in of_phases.items()}


def _rate(rows: Ints, changed: Ints, lost: Ints, k: int) -> dict[str, Any] | None:
    """By group of requests: rows, those that differ, and choices that differ, of k in a row; None without rows."""
    there = rows > 0
    if not there.any():
        return None
    found = metrics.bootstrap_ratio(lost[there], rows[there] * k)
    return {
        "rows": int(rows.sum()),
        "changed": int(changed.sum()),
        "rate": number(found.value),
        "low": number(found.low),
        "high": number(found.high),
    }


def _align(
    both: tuple[Selection, ...],
    extents: tuple[Extents, Extents],
    width: int,
    near: float,
    jobs: int,
    progress: Advance | None,
    notes: list[str],
) -> tuple[dict[str, Any] | None, Flips | None]:
    """The key `aligned`, and the flips; None of both where the traces have no row in common."""
    at = places(*extents)
    if not at[0].number:
        return None, None
    layers = both[0].layers
    with tempfile.TemporaryDirectory(prefix="moe-native-compare-") as name:
        directory, parted = Path(name), None
        if all("tokens" in _fields(side) for side in both):
            tokens = [Tokens(_room(directory / f"tokens-{i}", at[i].number * 4), at[i]) for i in (0, 1)]
            for side, of in zip(both, tokens, strict=True):
                fill(side, of, jobs=jobs, progress=progress)
            known = [of.known() for of in tokens]
            cut, parted = until_they_part(at[0], *known)
            at = cut, until_they_part(at[1], *known)[0]
        # The one whose logits say how near a choice was is read against the other.
        first, second = (1, 0) if "logits" in _fields(both[0]) and "logits" not in _fields(both[1]) else (0, 1)
        path = _room(directory / "ids", at[0].number * len(layers) * width * 2)
        store = Store(path, at[first], layers, width)
        fill(both[first], store, progress=progress)  # in one process: of several rows of a position the last counts
        flips = Flips(path, at[second], layers, width, store.k, near)
        fill(both[second], flips, jobs=jobs, progress=progress)
    notes += [
        f"layer {layer} is not aligned: its rows have different numbers of choices"
        for layer in sorted(flips.other_k | {layer for layer, k in store.k.items() if not k})
    ]
    aligned = {
        "requests": sum(length > 0 for _, length in at[0].first.values()),
        "rows": sum(length for _, length in at[0].first.values()),
        "parted": parted,
        "near": near,
        "tokens": _tokens(flips),
    }
    return aligned, flips


def _room(path: Path, size: int) -> Path:
    """A new file of this size: of disk it takes what is written."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _fields(side: Selection) -> Iterable[str]:
    """What was stored of rows, in any of the ranks."""
    return {field for rank in side._ranks for field in rank.metadata.get("fields") or ()}


def _doubts(
    layers: list[dict[str, Any]],
    names: list[set[tuple[str, int]]],
    flips: Flips | None,
    aligned: dict[str, Any] | None,
) -> Iterable[str]:
    """What a reader of the numbers has to know."""
    if not any(names):
        yield "no request has a name, so that there are no intervals, and no rows are aligned"
    elif aligned is None:
        yield "no request of one name is in both, so that no rows are aligned"
    groups = min(layer["groups"] for layer in layers)
    if groups < FEW:
        yield f"intervals are from {count(groups, 'group')} of requests only, and too narrow for that"
    if any(sum(name == other for other, _ in side) > 1 for side in names for name, nth in side if nth):
        yield "requests of one name are paired in the order of their first rows"
    if aligned is not None and aligned["parted"] is None:
        yield (
            "tokens were not recorded in both: whether rows of one request and position have the same text before them "
            "is not known, and after a generated token that differs they have not"
        )
    if aligned is not None and aligned["parted"]:
        yield f"the tokens of {count(aligned['parted'], 'request')} differ from some position on: aligned up to there"


# Which phases each of the keys has.
_PHASES = {"all": [0, 1, 2], "prefill": [PHASES.index("prefill")], "decode": [PHASES.index("decode")]}
