"""`moe-native recover`: after a crash.

`--json` prints (`"format": "moe-native recover"`, `"version": 1`) `path`, `ranks` (directories of the dead processes
that were recovered), `steps` and `rows` (folded from their rings into their segments), `problems` (a list of sentences:
what could not be recovered) and `complete` (whether the trace is whole now; true of one that nobody has begun).
"""

from __future__ import annotations

import argparse

from moe_trace.cli.common import (
    LOSSY,
    WHOLE,
    Commands,
    add_command,
    add_json,
    add_trace,
    open_trace,
    print_result,
    said_verdict,
    verdict,
)


def run(args: argparse.Namespace) -> int:
    """Fold what crashed processes left in memory into their segments, and close those. It may be repeated, and rings
    of living processes are left alone. Reading needs no recovery, every command sees such rings: it frees their memory.
    """
    import moe_trace

    report = moe_trace.recover(args.trace)
    if not args.json:
        print(report)
    try:
        standing = (verdict if args.json else said_verdict)(open_trace(args))
    except moe_trace.NotATrace:
        standing = WHOLE  # an empty directory: a trace that nobody has begun
    if args.json:
        of = {**vars(report), "ranks": [str(rank) for rank in report.ranks]}
        print_result("recover", path=args.trace, **of, complete=standing == WHOLE)
    return standing or (LOSSY if report.problems else WHOLE)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "recover",
        run,
        "fold what crashed processes left in memory into their segments",
        example="moe-native recover trace",
    )
    add_trace(parser)
    add_json(parser)
