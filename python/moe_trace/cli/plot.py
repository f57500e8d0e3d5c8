"""`moe-native plot`: pictures."""

from __future__ import annotations

import argparse

from moe_trace.cli.common import (
    Commands,
    UsageError,
    add_command,
    add_jobs,
    add_selection,
    add_trace,
    asked,
    check_place,
    open_trace,
    select,
    verdict,
)


def run(args: argparse.Namespace) -> int:
    """Draw a picture of a trace. Without --kind: how often each expert is chosen, of one layer, or of all (or several)
    layers with a map of each."""
    import moe_trace
    from moe_trace import plots, show

    output = args.output or ("expert_hist.png" if args.kind == "histogram" else f"{args.kind}.png")
    try:
        plots.ending_of(output)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for kind, option, given in (("compare", "--against", args.against), ("request", "--request", args.request)):
        if (given is None) == (args.kind == kind):
            wanted = f"--kind {kind} needs {option}" if given is None else f"{option} is for --kind {kind}"
            raise UsageError(wanted)
    trace = open_trace(args)
    other = None if args.against is None else moe_trace.open(args.against)
    check_place(output)
    with show.progress("reading", trace.stored_rows) as advance:
        figure = plots.of(
            select(trace, args),
            args.kind,
            other=None if other is None else select(other, args),
            request=args.request,
            asked=asked(args),
            intervals=args.intervals,
            jobs=args.jobs,
            progress=advance,
        )
    plots.save(figure, output)
    print(output)
    return verdict(trace) or (0 if other is None else verdict(other))


def add(commands: Commands) -> None:
    from moe_trace.plots.kinds import KINDS

    parser = add_command(
        commands,
        "plot",
        run,
        "draw a picture: histogram, heatmap, balance, time, …",
        example="moe-native plot trace --kind heatmap -o heatmap.png",
    )
    add_trace(parser)
    add_selection(parser)
    what = "; ".join(f"{kind}: {text}" for kind, text in KINDS.items())
    parser.add_argument("--kind", choices=tuple(KINDS), default="histogram", metavar="KIND", help=f"{what} (histogram)")
    parser.add_argument("--against", metavar="TRACE", help="the second trace, for --kind compare")
    parser.add_argument("--request", metavar="ID", help="the request to draw, for --kind request")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="PNG, SVG or PDF (KIND.png; of the histogram expert_hist.png)"
    )
    parser.add_argument(
        "--intervals", action="store_true", help="of the histogram of one layer: how sure each share is, over requests"
    )
    add_jobs(parser)
