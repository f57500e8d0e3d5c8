"""What the numbers of a trace say, in words. Every sentence is made from numbers, and says how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_trace import metrics
from moe_trace.report.phases import LEVEL, SHUFFLES, SwapTest
from moe_trace.show import ranges
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_trace.report.data import Data

CARE = (
    "Each sentence is computed from the counts of this page. What few tokens show may be chance: where a number by "
    "chance is given, it is that of tokens which choose independently of each other, and tokens of one text do not. An "
    "expert of one layer has nothing to do with the expert of the same number in another."
)


def sentences(summary: Mapping[str, Any], data: Data) -> Iterator[str]:
    """The findings of a selection, plain text, a paragraph each."""
    layers = [layer for layer in summary["layers"] if layer["assignments"]]
    if not layers:
        yield "There are no rows in this selection, so there is nothing to say about its experts."
        return
    yield _size(summary, layers)
    yield from _evenness(summary, layers)
    yield _busiest(data)
    yield _dead(layers)
    invalid = [layer for layer in layers if layer["invalid"]]
    if invalid:
        number = sum(layer["invalid"] for layer in invalid)
        where = ranges(layer["layer"] for layer in invalid)
        yield f"{count(number, 'id')} of layer {where} named no expert. No count has any of them."
    if data.phases is not None:
        yield _phases(data)
    if data.pairs is not None:
        yield from _pairs(data.pairs)


def _size(summary: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    rows = sorted({layer["rows"] for layer in layers})
    each = f"{rows[0]:,}" if len(rows) == 1 else f"between {rows[0]:,} and {rows[-1]:,}"
    kinds: dict[str, int] = {}
    for kind in summary["kinds"]:
        kinds[kind["phase"]] = kinds.get(kind["phase"], 0) + kind["rows"]
    parts = ", ".join(f"{number:,} {phase}" for phase, number in kinds.items())
    whole = "" if any(value is not None for value in summary["selection"].values()) else f" ({parts})"
    return f"{count(len(layers), 'layer')} with {each} tokens each{whole}."


def _evenness(summary: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    known = [layer for layer in layers if layer["normalized_entropy"] is not None]
    if not known:
        return
    worst = sorted(known, key=lambda layer: layer["normalized_entropy"])[: 3 if len(known) > 3 else 1]
    said = ", ".join(
        f"layer {layer['layer']} ({layer['normalized_entropy']:.4f}, as even as {layer['effective_experts']:.1f} of "
        f"{layer['experts']} experts)"
        for layer in worst
    )
    mean = summary["all"]["normalized_entropy"]["mean"]
    least = worst[0]
    by_chance = even_by_chance(least["experts"], least["assignments"])
    on_average = f"Normalised entropy is {mean:.4f} on average over the layers (1 is even). " if len(known) > 1 else ""
    yield (
        f"{on_average}Least even: {said}. An even router would, by chance, show about {by_chance:.4f} with as many "
        f"tokens as layer {least['layer']}."
    )
    imbalance = summary["all"]["imbalance"]
    if len(known) > 1 and imbalance["max"] is not None:
        yield (
            f"The busiest expert of a layer has {imbalance['mean']:.2f} times the mean load, on average over the "
            f"layers, and {imbalance['max']:.2f} times in layer {imbalance['max_layer']}."
        )


def even_by_chance(experts: int, assignments: int) -> float:
    """The normalised entropy that n independent assignments to E equally likely experts are expected to show: 1 -
    (E - 1) / (2 n ln E), to first order (Miller 1955), 0 at least.
    """
    return max(1 - (experts - 1) / (2 * assignments * math.log(experts)), 0.0) if experts > 1 else 1.0


def _busiest(data: Data) -> str:
    at, expert = data.busiest
    layer = data.layers[at]
    share = layer["top"][0]["share"]
    sure = f" (95 % interval over requests: {data.sure[0]:.2%} to {data.sure[1]:.2%})" if data.sure else ""
    return (
        f"The most loaded expert is {expert} of layer {layer['layer']}: {share:.2%} of its assignments{sure}, "
        f"{share * layer['experts']:.2f} times the even load."
    )


def _dead(layers: Sequence[Mapping[str, Any]]) -> str:
    dead = [layer for layer in layers if layer["dead_experts"]]
    if not dead:
        return "Every expert of every layer was chosen at least once."
    number, experts = sum(layer["dead_experts"] for layer in dead), sum(layer["experts"] for layer in layers)
    by_chance = sum(_dead_by_chance(layer) for layer in layers)
    worst = max(dead, key=lambda layer: layer["dead_experts"])
    return (
        f"{number:,} of {experts:,} experts were never chosen, in one layer (layer {worst['layer']}) up to "
        f"{worst['dead_experts']} of {worst['experts']}. Even routers would, by chance, leave about {by_chance:,.1f} "
        "without a token in as many."
    )


def _dead_by_chance(layer: Mapping[str, Any]) -> float:
    """How many experts a layer with as many tokens leaves out if each is as likely."""
    k = layer["top_k"] or max(round(layer["assignments"] / layer["rows"]), 1)
    return float(layer["experts"] - metrics.distinct_by_chance(layer["experts"], k, layer["rows"]))


def _phases(data: Data) -> str:
    found = data.phases
    assert found is not None
    far = max(range(len(found["rows"])), key=lambda i: found["distance"][i])
    layer = data.layers[found["rows"][far]]["layer"]
    mean = sum(found["distance"]) / len(found["distance"])
    chance = found["chance"][far]
    text = f"Prefill and decode give {mean:.1%} of their assignments to different experts, on average over the layers, "
    if len(found["rows"]) == 1:
        text = f"Prefill and decode give {mean:.1%} of their assignments to different experts "
    else:
        text += f"and most, {found['distance'][far]:.1%}, in layer {layer} "
    text += f"({chance:.1%} would be chance, were tokens independent). "
    return text + difference(data.test)


def difference(test: SwapTest | None) -> str:
    """What `phases.swap_test` says."""
    if test is None:
        return "There are too few requests with both phases to say whether requests differ as much among themselves."
    sure = [layer for layer, p in zip(test.layers, test.p, strict=True) if p <= LEVEL]
    how = (
        f"(randomisation test over {test.groups} groups of requests, {SHUFFLES} swaps, at {LEVEL:.0%} for all layers "
        "together)"
    )
    if not sure:
        return f"This is not more than swapping the two within requests at random gives {how}."
    if len(test.layers) == 1:
        those = "this layer"
    elif len(sure) == len(test.layers):
        those = f"all {len(sure)} layers"
    else:
        those = f"{len(sure)} of {len(test.layers)} layers ({ranges(sure)})"
    return f"In {those} this is more than swapping the two within requests at random gives {how}."


def _pairs(pairs: Mapping[str, Any]) -> Iterator[str]:
    if not pairs["said"]:
        return
    first = pairs["said"][0]
    yield (
        f"Of the experts of layer {pairs['layer']}, {first['a']} and {first['b']} are chosen together most beyond "
        f"chance: by {first['tokens']:,} tokens, {first['lift']:.2f} times as many as if each were chosen as often but "
        f"independently. It is the strongest of {pairs['looked_at']:,} pairs, of which some stand out by chance."
    )
