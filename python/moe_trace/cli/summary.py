"""`moe-native summary`: the numbers of each layer."""

from __future__ import annotations

import argparse

from moe_trace.cli.common import (
    Commands,
    add_command,
    add_jobs,
    add_json,
    add_selection,
    add_trace,
    asked,
    open_trace,
    print_json,
    select,
    verdict,
)


def run(args: argparse.Namespace) -> int:
    """Which experts each layer chose, how evenly, and what was lost. Reads block statistics, and rows only for
    --intervals."""
    from moe_trace import show, summary

    trace = open_trace(args)
    selection = select(trace, args)
    of, _ = summary.summarize(trace, selection, asked(args))
    if args.intervals:
        with show.progress("reading", trace.stored_rows) as advance:
            summary.add_intervals(of, selection, args.jobs, advance)
    if args.json:
        print_json(of)
    else:
        show.summary(show.console(), of)
    return verdict(trace)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "summary",
        run,
        "which experts each layer chose, how evenly, and what was lost",
        example="moe-native summary trace --layer 0,4-7 --since 10m",
    )
    add_trace(parser)
    add_selection(parser)
    parser.add_argument(
        "--intervals", action="store_true", help="how sure the shares are: 95 %% intervals over requests, from rows"
    )
    add_jobs(parser)
    add_json(parser)
