"""`moe-native summary`: the numbers of each layer."""

from __future__ import annotations

import argparse

from moe_trace.cli.common import (
    Commands,
    add_command,
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
    """Which experts each layer chose, how evenly, and what was lost. Reads block statistics, no rows."""
    from moe_trace import show, summary

    trace = open_trace(args)
    of, _ = summary.summarize(trace, select(trace, args), asked(args))
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
    add_json(parser)
