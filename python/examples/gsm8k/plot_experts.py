"""Which experts a layer uses: a histogram, the three most chosen, entropy, and how many are active.

    python plot_experts.py moe_routes.jsonl [--layer 0] [--out expert_hist.png]
    python plot_experts.py TRACE …

Reads a file of JSON lines, as `VLLM_LOG_MOE` and `moe-native export` write it and other loggers do, or a trace. One
layer gets its histogram; several get one of the mean shares, and a map of each.

What is counted are assignments: a token with four experts makes four. Entropy is that of the experts' shares, in bits;
normalised, it is divided by the entropy of an even use of all E experts: 1 is even, 0 is one expert alone. A trace
knows E. A file of JSON lines does not, so E is the largest id that it has, and one more, unless `--experts` says it;
with experts at the end of the ids that were never chosen, the entropy would come out too high.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_trace import metrics, plots


class BadInput(Exception):
    """What is wrong with the input, in one line."""


@dataclass
class Usage:
    """`counts`: for each layer `[experts]`, int64; `rows`: its tokens; `invalid`: ids that are no expert's."""

    model: str
    counts: dict[int, npt.NDArray[np.int64]]
    rows: dict[int, int]
    invalid: int = 0
    notes: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw and tabulate the usage of experts.")
    parser.add_argument("routes", type=Path, help="a file of JSON lines, or a trace's directory")
    parser.add_argument("--layer", type=int, action="append", help="only this layer (may be given several times)")
    parser.add_argument("--experts", type=int, help="number of experts of each layer, where the file does not tell")
    parser.add_argument("--out", type=Path, default=Path("expert_hist.png"), help="PNG, SVG or PDF (%(default)s)")
    options = parser.parse_args()
    try:
        plots.ending_of(options.out)
        if options.routes.is_dir():
            usage = of_trace(options.routes, options.layer)
        else:
            usage = of_jsonl(options.routes, options.layer, options.experts)
        print(table(usage))
        plots.save(figure(usage), options.out)
    except (BadInput, OSError, ValueError) as error:
        print(f"plot_experts: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


def of_trace(path: Path, layers: list[int] | None) -> Usage:
    """Raises ValueError or TraceError's subclasses where it cannot be read, BadInput for a layer it does not have."""
    import moe_trace

    try:
        trace = moe_trace.open(path)
        stats = (trace if layers is None else trace.layer(layers)).stats()
    except moe_trace.TraceError as error:
        raise BadInput(str(error)) from None
    notes = [] if trace.complete else [f"the trace is not whole: see moe-native summary {path}"]
    return Usage(
        str(trace.metadata.get("model") or path.name),
        {layer: of.counts for layer, of in sorted(stats.items())},
        {layer: of.rows for layer, of in stats.items()},
        sum(of.invalid for of in stats.values()),
        notes,
    )


def of_jsonl(path: Path, layers: list[int] | None, experts: int | None) -> Usage:
    """Raises BadInput, with the line's number, for one that is not understood."""
    counted: dict[int, Counter[int]] = {}
    rows: Counter[int] = Counter()
    model = ""
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line: dict[str, Any] = json.loads(text)
                if line.get("type") == "meta":
                    model = str(line.get("model_id") or "")
                    continue
                layer, ids = int(line.get("layer", 0)), [int(expert) for expert in line["topk_ids"]]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise BadInput(f"{path}, line {number} is no line of routes ({what})") from None
            if layers is None or layer in layers:
                rows[layer] += 1
                counted.setdefault(layer, Counter()).update(ids)
    missing = sorted(set(layers or ()) - set(counted))
    if missing or not counted:
        what = f"layer {missing[0]}" if missing else "any layer"
        raise BadInput(f"{path} has no line of {what}")
    largest = max(max(of) for of in counted.values())
    notes = []
    if experts is None:
        experts = largest + 1
        notes.append(f"{experts} experts are taken for all, the largest id being {largest}: --experts says it for sure")
    elif largest >= experts:
        raise BadInput(f"{path} has expert {largest}, so there are more than {experts}")
    counts = {}
    for layer, of in sorted(counted.items()):
        counts[layer] = np.array([of[expert] for expert in range(experts)], np.int64)
    invalid = sum(n for of in counted.values() for expert, n in of.items() if expert < 0)
    return Usage(model or path.name, counts, dict(rows), invalid, notes)


def table(usage: Usage) -> str:
    """A line a layer, and what there is to remark."""
    lines = [
        usage.model,
        "layer     rows  top 1         top 2         top 3         entropy  normalised  active  max/mean",
    ]
    for layer, counts in usage.counts.items():
        shares, active = metrics.shares(counts), np.count_nonzero(counts)
        best = [f"{e:>4} {100 * shares[e]:6.2f} %" if counts[e] else "" for e in metrics.top(counts, 3)]
        lines.append(
            f"{layer:>5} {usage.rows[layer]:>8,}  {'  '.join(f'{text:<12}' for text in best)}"
            f"  {float(metrics.entropy(counts)) / math.log(2):7.4f}  {float(metrics.normalized_entropy(counts)):10.4f}"
            f"  {active:>3}/{len(counts):<3}  {float(metrics.imbalance(counts)):7.2f}"
        )
    if usage.invalid:
        lines.append(f"{usage.invalid:,} ids are no expert's, and not counted")
    return "\n".join(lines + usage.notes)


def figure(usage: Usage) -> Any:
    drawn = {layer: counts for layer, counts in usage.counts.items() if counts.any()}
    if not drawn:
        raise BadInput("there is nothing to draw: no token was routed")
    if len(drawn) > 1:
        title = f"{usage.model} · {len(drawn)} layers"
        return plots.layers_histogram(list(drawn), list(drawn.values()), title=title)
    ((layer, counts),) = drawn.items()
    evenness = float(metrics.normalized_entropy(counts))
    note = f"{usage.rows[layer]:,} tokens · entropy {evenness:.4f} · {np.count_nonzero(counts)}/{len(counts)} active"
    return plots.expert_histogram(counts, title=f"{usage.model} · layer {layer}", note=note)


if __name__ == "__main__":
    sys.exit(main())
