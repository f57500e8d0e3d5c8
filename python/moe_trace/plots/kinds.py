"""Whole figures of a selection, by kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace import metrics
from moe_trace.errors import TraceError
from moe_trace.plots import counted, style
from moe_trace.plots.balance import balance
from moe_trace.plots.comparison import distance, ratio
from moe_trace.plots.groups import groups_histogram
from moe_trace.plots.histogram import expert_histogram, layers_histogram, layers_map
from moe_trace.plots.pairs import strongest_pairs, together
from moe_trace.plots.request import chosen_experts, chosen_weights
from moe_trace.plots.time import top_shares, usage_over_time
from moe_trace.summary import summarize
from moe_trace.units import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_trace import Selection

KINDS = {
    "histogram": "how often each expert is chosen; of several layers the mean, and a map of each",
    "heatmap": "layers x experts",
    "balance": "how even each layer is: max/mean, entropy, Gini coefficient, dead experts",
    "coactivation": "which experts of a layer are chosen together more often than by chance",
    "time": "the usage of a layer's experts over time",
    "phases": "prefill against decode",
    "modality": "text against images, video, audio",
    "compare": "two traces, side by side",
    "request": "one request, token by token: the expert that each layer chose first",
}
METRICS = (  # of the kind `balance`: key in a layer of the summary, name, value of an even load, which side is uneven
    ("imbalance", "max/mean", 1.0, 1),
    ("normalized_entropy", "normalised entropy", 1.0, -1),
    ("gini", "Gini coefficient", 0.0, 1),
    ("dead_experts", "dead experts", 0.0, 1),
)
MOST_POSITIONS = 2000  # columns that a picture of a request can tell apart


@dataclass(frozen=True)
class _Asked:
    """What a picture is to be made of.

    Attributes:
        of: the object of `moe_trace.summary`.
        layers: its layers that have assignments, each with its counts `[experts]`.
    """

    selection: Selection
    of: dict[str, Any]
    layers: list[tuple[dict[str, Any], npt.NDArray[np.int64]]]
    note: str
    other: Selection | None
    request: str | None
    interval: metrics.Interval | None = None  # of each expert's share

    @property
    def model(self) -> str:
        return str(self.of["model"] or Path(self.of["path"]).name)

    @property
    def numbers(self) -> list[int]:
        return [layer["layer"] for layer, _ in self.layers]

    @property
    def counts(self) -> list[npt.NDArray[np.int64]]:
        return [counts for _, counts in self.layers]

    def title(self, what: str) -> str:
        layers = self.numbers
        which = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
        return " · ".join(part for part in (self.model, which, what) if part)

    def rows(self) -> str:
        rows = sorted({layer["rows"] for layer, _ in self.layers})
        each = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
        return f"{each} rows" + (" a layer" if len(self.layers) > 1 else "")


def of(
    selection: Selection,
    kind: str,
    *,
    other: Selection | None = None,
    request: str | None = None,
    asked: Mapping[str, Any] | None = None,
    intervals: bool = False,
    jobs: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Figure:
    """The figure of a kind, one of `KINDS`, of a selection of a trace.

    Kinds that show one layer (`coactivation`, `time`) take the first that was selected, and say which. The line below
    the title says how much is shown, and where not everything was recorded.

    Args:
        other: the second selection, for the kind `compare`.
        request: the name of the request, for the kind `request`.
        asked: what the user selected by, to be said in the picture: `phase`, `since` and `run` (`moe_trace.summary`).
        intervals: of each share, over requests, for the kind `histogram` of one layer; reads rows.
        jobs, progress: as of `analysis.fill`, where rows are read.

    Raises:
        ValueError: there is no such kind, something that it needs was not given, or there is nothing to draw.
        TraceError: the trace does not have what the kind shows.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no picture {kind!r}: use {', '.join(KINDS)}")
    if (other is None) == (kind == "compare"):
        raise ValueError("compare needs a second trace" if other is None else f"{kind} shows one trace, not two")
    if (request is None) == (kind == "request"):
        raise ValueError("name the request to be drawn" if request is None else f"{kind} does not show one request")
    summary, counts = summarize(selection._trace, selection, asked or {})
    layers = [(layer, c) for layer, c in zip(summary["layers"], counts, strict=True) if layer["assignments"]]
    if not layers and kind != "request":
        raise ValueError(f"there is nothing to draw: no rows. See what is there: moe-native summary {summary['path']}")
    interval = None
    if intervals:
        if kind != "histogram" or len(layers) != 1:
            raise ValueError("intervals are of the histogram of one layer: select one")
        number = layers[0][0]["layer"]
        interval = _of_shares(selection.layer([number]), number, jobs, progress)
    return _DRAWN[kind](_Asked(selection, summary, layers, note(summary), other, request, interval))


def _of_shares(selection: Selection, layer: int, jobs: int, progress: Callable[[int], Any] | None) -> metrics.Interval:
    """The interval over requests of each expert's share. Raises ValueError where there are no two requests."""
    from moe_trace.analysis import GroupCounts, fill  # for the help of `moe-native plot`, which lists kinds, too much

    found = GroupCounts()
    fill(selection, found, jobs=jobs, progress=progress)
    if len(found.groups(layer)) < 2:
        raise ValueError("there are no intervals: they are over requests, of which fewer than two have stored rows")
    return found.shares(layer)


def note(summary: Mapping[str, Any]) -> str:
    """What a picture has to say beside its rows: how they were selected, and that some are missing."""
    asked = summary["selection"]
    parts = [f"{asked['phase']} only"] if asked["phase"] else []
    parts += [f"{key} {asked[key]}" for key in ("since", "run") if asked[key]]
    parts += [f"{summary['stored_rows']:,} stored"] if summary["executed_rows"] > summary["stored_rows"] else []
    parts += ["whole blocks counted at the ends"] if summary["warnings"] else []
    missed = len(summary["coverage"]["missed"])
    parts += [f"{count(missed, 'layer')} missed"] if missed else []
    parts += ["with losses"] if summary["losses"] or summary["problems"] else []
    return "".join(f" · {part}" for part in parts)


def _histogram(asked: _Asked) -> Figure:
    if len(asked.layers) > 1:
        note = f"{asked.rows()}{asked.note}"
        return layers_histogram(asked.numbers, asked.counts, title=asked.title(""), note=note)
    ((layer, counts),) = asked.layers
    evenness = "" if layer["normalized_entropy"] is None else f" · entropy {layer['normalized_entropy']:.4f}"
    note = f"{asked.rows()}{asked.note}{evenness} · max/mean {layer['imbalance']:.2f}"
    return expert_histogram(counts, title=asked.title(""), note=note, interval=asked.interval)


def _heatmap(asked: _Asked) -> Figure:
    figure = style.new_figure(max(map(len, asked.counts)), height=1.6 + style.map_height(len(asked.layers)))
    axes = figure.add_subplot()
    layers_map(axes, asked.numbers, asked.counts)
    style.title(axes, asked.title("load of each expert"), f"{asked.rows()}{asked.note}")
    return figure


def _balance(asked: _Asked) -> Figure:
    figure = style.new_figure(0, height=2.0 * len(METRICS) + 1.2)
    rows = figure.subplots(len(METRICS), 1, sharex=True)
    for axes, (key, name, even, worst) in zip(rows, METRICS, strict=True):
        values = [_metric(key, layer, counts) for layer, counts in asked.layers]
        if not np.isnan(values).all():
            balance(axes, asked.numbers, values, name, even=even, worst=worst)
    rows[-1].set_xlabel("layer")
    figure.align_ylabels()
    note = f"{asked.rows()}{asked.note} · dashed: an even load"
    style.title(rows[0], asked.title("balance"), note)
    return figure


def _metric(key: str, layer: Mapping[str, Any], counts: npt.NDArray[np.int64]) -> float:
    value = layer[key] if key in layer else float(getattr(metrics, key)(counts))
    return np.nan if value is None else float(value)


def _first_layer(asked: _Asked, what: str) -> tuple[dict[str, Any], npt.NDArray[np.int64], str]:
    layer, counts = asked.layers[0]
    title = f"{asked.model} · layer {layer['layer']} · {what}"
    return layer, counts, title + (f" (1 of {len(asked.layers)} layers)" if len(asked.layers) > 1 else "")


def _coactivation(asked: _Asked) -> Figure:
    layer, counts, title = _first_layer(asked, "chosen together")
    if not asked.of["stored_rows"]:
        raise TraceError(f"{asked.of['path']} has counts only, and pairs of experts are counted from rows")
    seen, notes = counted.pairs(asked.selection, layer["layer"], len(counts))
    expected = metrics.coactivation_by_chance(seen)
    lift = metrics.lift(seen, expected)
    if not seen.any():
        raise ValueError(f"there is nothing to draw: no rows of layer {layer['layer']}. {' '.join(notes)}")
    if not expected.any():
        raise ValueError(f"layer {layer['layer']} chooses one expert a token: there are no pairs to draw")
    more = min(max(len(counts) - 128, 0) / 64, 6)  # as much higher as wider
    figure = style.new_figure(len(counts), height=8.2 + more)
    left, right = figure.subplots(1, 2, width_ratios=[3.2, 1])
    together(left, lift, seen, expected)
    strongest_pairs(right, lift, seen, expected)
    lack = " · rows left out" if notes else ""
    by_chance = "by chance: as often as each is chosen, never one twice"
    style.title(left, title, f"{layer['rows']:,} rows{asked.note}{lack} · {by_chance}")
    return figure


def _time(asked: _Asked) -> Figure:
    from moe_trace.analysis import counts_over_time  # for the help of `moe-native plot`, which lists kinds, too much

    layer, counts, title = _first_layer(asked, "over time")
    edges, of_layers, said = counts_over_time(asked.selection.layer([layer["layer"]]))
    table = of_layers[layer["layer"]]
    figure = style.new_figure(0, height=4.2 + min(max(0.06 * len(counts), 2.4), 6.5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, min(max(0.06 * len(counts), 2.4), 6.5)])
    top_shares(above, edges, table)
    above.set_xlabel("")
    usage_over_time(below, edges, table)
    start = asked.of["first_time"][:19].replace("T", " ")
    since = f" · first step of the trace {start} UTC"
    note = f"{layer['rows']:,} rows{asked.note} · {len(table)} windows{since}" + "".join(f" · {text}" for text in said)
    style.title(above, title, note)
    return figure


def _groups(asked: _Asked, groups: Mapping[str, Selection], what: str) -> Figure:
    """Sets of tokens of one trace, or of two: the bars of one layer, or the distances and ratios of several."""
    stats = {name: selection.stats() for name, selection in groups.items()}
    shared = [n for n in asked.numbers if all(n in of and of[n].counts.any() for of in stats.values())]
    if not shared:
        raise ValueError(f"no layer has assignments of {' and '.join(groups)}: there is nothing to compare")
    rows = {name: max(of[layer].rows for layer in shared) for name, of in stats.items()}
    note = ", ".join(f"{name} {number:,} rows" for name, number in rows.items()) + asked.note
    names = sorted(groups, key=lambda name: -rows[name])
    sides = {name: [of[layer].counts for layer in shared] for name, of in stats.items()}
    for position, layer in enumerate(shared):
        if len({len(side[position]) for side in sides.values()}) > 1:
            raise ValueError(f"layer {layer} has not as many experts in each of {' and '.join(groups)}")
    which = f"layer {shared[0]}" if len(shared) == 1 else f"{len(shared)} layers"
    title = f"{asked.model} · {which} · {what}"
    if len(shared) == 1:
        return groups_histogram({name: side[0] for name, side in sides.items()}, title=title, note=note)
    first, second = names[:2] if len(groups) > 2 else list(groups)
    experts = max(map(len, sides[first]))
    height = style.map_height(len(shared))
    figure = style.new_figure(experts, height=4.2 + height)
    above, below = figure.subplots(2, 1, height_ratios=[2.4, height])
    for name in names[1:] if len(groups) > 2 else [second]:
        far = _each(metrics.total_variation, sides[first], sides[name])
        chance = _each(metrics.total_variation_by_chance, sides[first], sides[name])
        distance(above, shared, far, chance, label=f"{first}, {name}" if len(groups) > 2 else "")
    above.set_xlabel("layer")
    ratio(below, shared, sides[first], sides[second], (first, second))
    lines = len(names) - 1 if len(groups) > 2 else 1
    style.title(above, title, note, lift=15 * (lines - 1))
    return figure


def _each(
    of: Callable[[Any, Any], npt.NDArray[np.float64]], first: Sequence[Any], second: Sequence[Any]
) -> npt.NDArray[np.float64]:
    return np.array([float(of(a, b)) for a, b in zip(first, second, strict=True)])


def _phases(asked: _Asked) -> Figure:
    groups = {"prefill": asked.selection.prefill(), "decode": asked.selection.decode()}
    return _groups(asked, groups, "prefill against decode")


def _modality(asked: _Asked) -> Figure:
    there = {name: asked.selection.modality(name) for name in fmt.MODALITIES}
    groups = {name: s for name, s in there.items() if any(of.rows for of in s.stats().values())}
    if len(groups) < 2:
        raise ValueError(f"all rows are of one modality ({', '.join(groups)}): there is nothing to compare")
    return _groups(asked, groups, "by modality")


def _compare(asked: _Asked) -> Figure:
    other = asked.other
    assert other is not None
    second, counts = summarize(other._trace, other, asked.of["selection"])
    theirs = [(layer, c) for layer, c in zip(second["layers"], counts, strict=True) if layer["assignments"]]
    if not theirs:
        raise ValueError(f"there is nothing to draw: no rows in {second['path']}")
    names = _names(asked.of, second)
    groups = dict(zip(names, (asked.selection, other), strict=True))
    if len(asked.layers) == 1 or len(theirs) == 1:
        return _groups(asked, groups, "two traces")
    sides = [asked.layers, theirs]
    experts = max(len(c) for side in sides for _, c in side)
    height = 0.7 * style.map_height(max(map(len, sides))) + 0.4
    figure = style.new_figure(2 * experts, height=5.2 + 2 * height)
    grid = figure.add_gridspec(3, 2, height_ratios=[height, 2.2, height])
    most = max(float(np.nanmax(metrics.shares(c) * len(c))) for side in sides for _, c in side)
    upper = [figure.add_subplot(grid[0, column]) for column in range(2)]
    for axes, side, name, of_side in zip(upper, sides, names, (asked.of, second), strict=True):
        numbers, loads = [layer["layer"] for layer, _ in side], [c for _, c in side]
        image = layers_map(axes, numbers, loads, most=max(most, 2.0), bar=False, labels=13)
        rows = max(layer["rows"] for layer, _ in side)
        axes.set_title(f"{name} · {rows:,} rows{note(of_side)}", loc="left", fontsize=10)
    zero = any((c == 0).any() for side in sides for _, c in side)
    style.ratio_bar(image, upper, "load / uniform load" + (" (grey: none)" if zero else ""), zero=zero)
    shared = [n for n, _ in _paired(*sides)]
    pairs = [pair for _, pair in _paired(*sides)]
    if not shared:
        raise ValueError("the two traces have no layer in common with as many experts: there is nothing to compare")
    middle, below = figure.add_subplot(grid[1, :]), figure.add_subplot(grid[2, :])
    first, last = [a for a, _ in pairs], [b for _, b in pairs]
    distance(
        middle,
        shared,
        _each(metrics.total_variation, first, last),
        _each(metrics.total_variation_by_chance, first, last),
    )
    middle.set_xlabel("layer")
    ratio(below, shared, first, last, names)
    figure.suptitle(f"{asked.model} · two traces", x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def _paired(
    ours: Sequence[tuple[dict[str, Any], npt.NDArray[np.int64]]],
    theirs: Sequence[tuple[dict[str, Any], npt.NDArray[np.int64]]],
) -> list[tuple[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]]:
    """The layers that both have, with as many experts."""
    known = {layer["layer"]: c for layer, c in theirs}
    found = ((layer["layer"], (c, known.get(layer["layer"]))) for layer, c in ours)
    return [(n, (a, b)) for n, (a, b) in found if b is not None and len(a) == len(b)]


def _names(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str]:
    """What tells two traces apart: the ends of their paths that differ."""
    ours, theirs = (Path(of["path"]).absolute().parts for of in (first, second))
    for length in range(1, min(len(ours), len(theirs)) + 1):
        if ours[-length:] != theirs[-length:]:
            return str(Path(*ours[-length:])), str(Path(*theirs[-length:]))
    return f"{first['path']} (first)", f"{second['path']} (second)"


def _request(asked: _Asked) -> Figure:
    assert asked.request is not None
    selection = asked.selection
    layers = list(selection.layers)
    sequence = selection.layer(layers).sequence(asked.request)
    positions = min(len(sequence), MOST_POSITIONS)
    if not positions:
        raise ValueError(f"there is nothing to draw: no row of {asked.request!r} is in the trace")
    weights = sequence.weights[:positions].astype(np.float64)
    known = ~np.isnan(weights).all(axis=2)
    choice = np.where(known, np.nan_to_num(weights, nan=-1).argmax(axis=2), 0)
    first = np.take_along_axis(sequence.ids[:positions].astype(np.int64), choice[:, :, None], axis=2)[:, :, 0]
    largest = np.where(known, np.take_along_axis(weights, choice[:, :, None], axis=2)[:, :, 0], np.nan)
    total = max(selection._trace.experts.get(layer, 0) for layer in layers)
    total = max(total, int(first[known].max(initial=0)) + 1)
    prompt_len = selection._trace.requests[asked.request].prompt_len
    height = min(max(0.13 * len(layers), 1.2), 7.0)
    figure = style.new_figure(0, height=2 * height + 2.4)
    above, below = figure.subplots(2, 1, sharex=True)
    chosen_experts(above, layers, np.where(known, first, -1), total, prompt_len=prompt_len)
    chosen_weights(below, layers, largest, prompt_len=prompt_len)
    above.set_xlabel("")
    states = [f"{int((sequence.state == 2).sum()):,} cached"] if (sequence.state == 2).any() else []
    lacking = int((sequence.state < 2).sum())
    states += [f"{lacking:,} without a row"] if lacking else []
    shown = f"the first {positions:,} of {len(sequence):,} positions" if positions < len(sequence) else ""
    facts = [shown or count(len(sequence), "position"), *states]
    style.title(above, f"{asked.model} · request {asked.request}", " · ".join(facts) + asked.note)
    return figure


_DRAWN: dict[str, Callable[[_Asked], Figure]] = {
    "histogram": _histogram,
    "heatmap": _heatmap,
    "balance": _balance,
    "coactivation": _coactivation,
    "time": _time,
    "phases": _phases,
    "modality": _modality,
    "compare": _compare,
    "request": _request,
}
