"""`moe-native info`: what a trace consists of."""

from __future__ import annotations

import argparse

from moe_trace.cli.common import Commands, add_command, add_json, add_trace, open_trace, print_json, verdict


def run(args: argparse.Namespace) -> int:
    """What a trace consists of: model, runs, ranks, segments, sizes, bytes per row, fields, times, versions."""
    from moe_trace import info, show

    trace = open_trace(args)
    of = info.describe(trace)
    if args.json:
        print_json(of)
    else:
        show.info(show.console(), of)
    return verdict(trace)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "info",
        run,
        "what a trace consists of: model, runs, segments, sizes, fields, versions",
        example="moe-native info trace --json",
    )
    add_trace(parser)
    add_json(parser)
