"""`moe-native compare`: what differs between two traces."""

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
    """How differently two traces use their experts, layer by layer and with intervals; and of the tokens that both
    have, by request and position, how many went to other experts, near-ties told from the rest where logits were
    recorded."""
    import moe_trace
    from moe_trace import compare, show
    from moe_trace.compare.shown import compared

    first, second = open_trace(args), moe_trace.open(args.other)
    sides = select(first, args), select(second, args)
    rows = sum(trace.stored_rows for trace in (first, second))
    with show.progress("comparing", 2 * rows) as advance:
        of = compare.compare(*sides, asked=asked(args), near=args.near, jobs=args.jobs, progress=advance)
    if args.json:
        print_json(of)
    else:
        compared(show.console(), of)
    return verdict(first) or verdict(second)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        run,
        "what differs between two traces",
        example="moe-native compare before after --phase prefill",
    )
    add_trace(parser)
    parser.add_argument("other", metavar="OTHER", help="the trace that is held against it")
    add_selection(parser)
    parser.add_argument(
        "--near",
        type=_near,
        default=0.05,
        metavar="X",
        help="a near-tie is where the logits of the experts that changed places differ by no more (0.05)",
    )
    add_jobs(parser)
    add_json(parser)


def _near(text: str) -> float:
    try:
        near = float(text)
    except ValueError:
        near = -1
    if not near >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no difference of logits: write a number from 0")
    return near
