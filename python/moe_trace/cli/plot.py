"""`moe-native plot`: pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_trace.cli.common import (
    FAILED,
    Commands,
    UsageError,
    add_command,
    add_selection,
    add_trace,
    asked,
    check_place,
    fail,
    open_trace,
    select,
    verdict,
)


def run(args: argparse.Namespace) -> int:
    """Draw the histogram of expert usage: of one layer, or of all (or several) layers with a map of each."""
    from moe_trace import plots, summary

    try:
        plots.ending_of(args.output)
    except ValueError as error:
        raise UsageError(str(error)) from None
    trace = open_trace(args)
    check_place(args.output)
    of, counts = summary.summarize(trace, select(trace, args), asked(args))
    drawn = [(layer, c) for layer, c in zip(of["layers"], counts, strict=True) if layer["assignments"]]
    if not drawn:
        return fail(f"there is nothing to draw: no rows. See what is there: moe-native summary {args.trace}", FAILED)
    model = of["model"] or Path(of["path"]).name
    note = _note(of, args)
    if len(drawn) == 1:
        layer, c = drawn[0]
        evenness = "" if layer["normalized_entropy"] is None else f" · entropy {layer['normalized_entropy']:.4f}"
        note = f"{layer['rows']:,} rows{note}{evenness} · max/mean {layer['imbalance']:.2f}"
        figure = plots.expert_histogram(c, title=f"{model} · layer {layer['layer']}", note=note)
    else:
        layers = [layer["layer"] for layer, _ in drawn]
        rows = sorted({layer["rows"] for layer, _ in drawn})
        each = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
        figure = plots.layers_histogram(
            layers,
            [c for _, c in drawn],
            title=f"{model} · {len(layers)} layers",
            note=f"{each} rows a layer{note}",
        )
    plots.save(figure, args.output)
    print(args.output)
    return verdict(trace)


def _note(of: dict[str, Any], args: argparse.Namespace) -> str:
    """What a picture has to say beside its rows: how they were selected, and that some are missing."""
    from moe_trace.units import count

    note = f" · {args.phase} only" if args.phase else ""
    note += f" · since {args.since}" if args.since else ""
    note += f" · run {args.run}" if args.run else ""
    note += f" · {of['stored_rows']:,} stored" if of["executed_rows"] > of["stored_rows"] else ""
    note += " · whole blocks counted at the ends" if of["warnings"] else ""
    missed = len(of["coverage"]["missed"])
    note += f" · {count(missed, 'layer')} missed" if missed else ""
    return note + (" · with losses" if of["losses"] or of["problems"] else "")


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plot",
        run,
        "draw the histogram of expert usage",
        example="moe-native plot trace --layer 12 -o layer12.png",
    )
    add_trace(parser)
    add_selection(parser)
    parser.add_argument(
        "-o", "--output", default="expert_hist.png", metavar="FILE", help="PNG, SVG or PDF (expert_hist.png)"
    )
