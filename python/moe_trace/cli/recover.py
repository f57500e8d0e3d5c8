"""`moe-native recover`: after a crash."""

from __future__ import annotations

import argparse

from moe_trace.cli.common import LOSSY, WHOLE, Commands, add_command, add_trace, open_trace, said_verdict


def run(args: argparse.Namespace) -> int:
    """Fold what crashed processes left in memory into their segments, and close those. It may be repeated, and rings
    of living processes are left alone. Reading needs no recovery, every command sees such rings: it frees their memory.
    """
    import moe_trace

    report = moe_trace.recover(args.trace)
    print(report)
    try:
        return said_verdict(open_trace(args)) or (LOSSY if report.problems else WHOLE)
    except moe_trace.NotATrace:
        return WHOLE  # an empty directory: a trace that nobody has begun


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "recover",
        run,
        "fold what crashed processes left in memory into their segments",
        example="moe-native recover trace",
    )
    add_trace(parser)
