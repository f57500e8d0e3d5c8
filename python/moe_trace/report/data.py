"""The numbers that the page draws: arrays of a selection, as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import metrics
from moe_trace.analysis import Coactivation, GroupCounts, PhaseCounts, counts_over_time
from moe_trace.errors import DamagedTrace
from moe_trace.plots import comparison, counted, pairs, style
from moe_trace.plots.kinds import METRICS
from moe_trace.plots.time import unit_of
from moe_trace.report.phases import SwapTest, swap_test

if TYPE_CHECKING:
    from moe_trace import Selection

Ints = npt.NDArray[np.int64]
Advance = Callable[[int], Any]

TOPS = 16  # experts of each layer that are shown over time
STRONGEST = 50  # pairs of experts that are listed


@dataclass
class Data:
    """What the page draws.

    Attributes:
        layers: the layers of the summary that have assignments, with `gini` and `cv` added.
        counts: of each of them `[experts]`.
        sets: sets of tokens, the first is all: `{"name", "counts"}`.
        phases, time, pairs: of the sections of these names; None where they cannot be shown, and `why` says why.
        test: whether prefill and decode differ.
        sure: the 95 % interval over requests of the share of the most loaded expert; None where there is none.
        why: for a section, a sentence to be shown in its place, or beside what it shows.
        damage: a sentence for each part of the rows that should be there and could not be read.
    """

    layers: list[dict[str, Any]]
    counts: list[Ints]
    sets: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, Any] | None = None
    time: dict[str, Any] | None = None
    pairs: dict[str, Any] | None = None
    test: SwapTest | None = None
    sure: tuple[float, float] | None = None
    why: dict[str, str] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    @property
    def least_even(self) -> int:
        """Index of the layer with the lowest normalised entropy."""
        known = [(layer["normalized_entropy"], i) for i, layer in enumerate(self.layers)]
        return min((pair for pair in known if pair[0] is not None), default=(0, 0))[1]

    @property
    def busiest(self) -> tuple[int, int]:
        """Index of the layer with the largest share of an expert, times its number of experts; and that expert."""
        share = [float(metrics.imbalance(c)) for c in self.counts]
        at = max(range(len(share)), key=share.__getitem__)
        return at, self.layers[at]["top"][0]["expert"]

    def object(self) -> dict[str, Any]:
        """What is embedded in the page."""
        keys = ["layer", "experts", *(key for key, *_ in METRICS)]
        return {
            "layers": [{key: layer[key] for key in keys} for layer in self.layers],
            "sets": self.sets,
            "metrics": [{"key": key, "name": name, "even": even} for key, name, even, _ in METRICS],
            "chosen": self.least_even,
            "few": comparison.FEW,
            "phases": self.phases,
            "time": self.time,
            "pairs": self.pairs,
        }


def gather(
    selection: Selection,
    layers: Sequence[Mapping[str, Any]],
    counts: Sequence[Ints],
    stored: bool,
    jobs: int = 1,
    progress: Advance | None = None,
) -> Data:
    """The data of a selection.

    layers, counts: of `moe_trace.summary.summarize`; stored: whether the trace has rows, and not counts alone; jobs,
    progress: of `build`.
    """
    there = [i for i, layer in enumerate(layers) if layer["assignments"]]
    kept = [counts[i] for i in there]
    of_layers = [
        {**layers[i], "gini": _number(metrics.gini(counts[i])), "cv": _number(metrics.cv(counts[i]))} for i in there
    ]
    data = Data(of_layers, kept)
    data.sets.append({"name": "all tokens", "counts": [c.tolist() for c in kept]})
    if not kept:
        data.why = dict.fromkeys(("phases", "time", "pairs"), "There are no rows in this selection.")
        return data
    numbers = [layer["layer"] for layer in of_layers]
    selection = selection.layer(numbers)
    _phases(data, selection, numbers)
    _time(data, selection, numbers, progress)
    if stored:
        _rows(data, selection, jobs, progress)
    else:
        data.why["pairs"] = "The trace has counts only, and pairs of experts are counted from rows."
    data.damage = list(dict.fromkeys(data.damage))
    return data


def _phases(data: Data, selection: Selection, numbers: list[int]) -> None:
    sides = {}
    for name in ("prefill", "decode"):
        stats = selection.phase(name).stats()
        sides[name] = [_long(stats[n].counts, len(c)) for n, c in zip(numbers, data.counts, strict=True)]
        if any(c.any() for c in sides[name]):
            data.sets.append({"name": name, "counts": [c.tolist() for c in sides[name]]})
    prefill, decode = sides["prefill"], sides["decode"]
    rows = [i for i in range(len(numbers)) if prefill[i].any() and decode[i].any()]
    if not rows:
        data.why["phases"] = "No layer has both prefill and decode in this selection, so there is nothing to compare."
        return
    data.phases = {
        "rows": rows,
        "distance": [float(metrics.total_variation(prefill[i], decode[i])) for i in rows],
        "chance": [float(metrics.total_variation_by_chance(prefill[i], decode[i])) for i in rows],
    }


def _long(counts: Ints, experts: int) -> Ints:
    return np.pad(counts, (0, experts - len(counts)))


def _time(data: Data, selection: Selection, numbers: list[int], progress: Advance | None) -> None:
    try:
        edges, windows, said = counts_over_time(selection, progress=progress)
    except ValueError as error:
        data.why["time"] = f"{str(error)[0].upper()}{str(error)[1:]}."
        return
    except DamagedTrace as error:
        data.why["time"] = f"This cannot be shown: {error}."
        data.damage.append(str(error))
        return
    unit, name = unit_of(edges[-1])
    digits = max(math.ceil(1 - math.log10((edges[1] - edges[0]) / unit)), 0)  # two of a window's width
    written = [f"{edge / unit:.{digits}f}" for edge in edges]
    imbalance, tops = [], []
    for number, counts in zip(numbers, data.counts, strict=True):
        table = windows[number]
        imbalance.append([_number(value) for value in metrics.imbalance(table)])
        best = [int(e) for e in metrics.top(counts, TOPS) if counts[e]]
        tops.append({"experts": best, "counts": table[:, best].T.tolist(), "totals": table.sum(axis=1).tolist()})
    data.time = {
        "unit": name,
        "names": written[:-1],
        "spans": [f"{a} to {b} {name}" for a, b in pairwise(written)],
        "imbalance": imbalance,
        "tops": tops,
    }
    small = "of few tokens max/mean is larger by chance, so that a window with fewer of them seems less even"
    data.why["time"] = " ".join(f"{text[0].upper()}{text[1:]}." for text in (small, *said))


def _rows(data: Data, selection: Selection, jobs: int, progress: Advance | None) -> None:
    """What is made from rows, in one pass over them."""
    layer = data.layers[data.least_even]["layer"]
    tested = [data.layers[i]["layer"] for i in data.phases["rows"]] if data.phases else []
    at, expert = data.busiest
    busiest = data.layers[at]["layer"]
    together, phases, groups = Coactivation(layers=(layer,)), PhaseCounts(), GroupCounts(layers=(busiest,))
    wanted = [together, groups, phases] if tested else [together, groups]
    said = counted.count(selection.layer({layer, busiest, *tested}), *wanted, jobs=jobs, progress=progress)
    data.damage += [note for note in said if note not in groups.notes()]  # rows of nobody are whole
    if len(groups.groups(busiest)) > 1:
        interval = groups.shares(busiest)
        data.sure = float(interval.low[expert]), float(interval.high[expert])
    if tested:
        data.test = swap_test({number: phases.counts(number) for number in tested})
    _pairs(data, layer, counted.padded(together.counts.get(layer), len(data.counts[data.least_even])))


def _pairs(data: Data, layer: int, seen: Ints) -> None:
    experts = len(seen)
    expected = metrics.coactivation_by_chance(seen)
    if not seen.any():
        data.why["pairs"] = f"There are no rows of layer {layer} to count pairs from."
        return
    if not expected.any():
        data.why["pairs"] = f"Layer {layer} chooses one expert a token, so there are no pairs."
        return
    lift = metrics.lift(seen, expected)
    credible = pairs.credible(lift, seen, expected)
    strongest = pairs.strongest(credible, seen, expected, STRONGEST)
    upper = np.triu_indices(experts, 1)
    data.pairs = {
        "layer": layer,
        "experts": experts,
        "few": pairs.FEW,
        "most": style.end_of_scale(credible),
        "upper": seen[upper].tolist(),
        "chosen": np.diagonal(seen).tolist(),
        "factors": [float(f"{factor:.9g}") for factor in metrics.pair_factors(seen)],
        "strongest": strongest,
        "looked_at": int(np.isfinite(credible[upper]).sum()),
        "said": [{"a": a, "b": b, "tokens": int(seen[a, b]), "lift": float(lift[a, b])} for a, b in strongest[:1]],
    }


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
