"""`moe-native ctl`: commands to what is recording now."""

from __future__ import annotations

import argparse

from moe_trace.cli.common import FAILED, WHOLE, Commands, UsageError, add_command, add_trace, say


def run(args: argparse.Namespace) -> int:
    """Steer what records into a trace now, without touching its server: `pause` and `resume` recording, `flush` what is
    recorded to readers, `status`, or `set` what is stored from the next step on:
    `set fields=ids,weights,logits layers=0-3 sample=0.1` (fields=counts for statistics alone, layers=all for all).
    Every process that records into the trace gets the command, and one line is printed for each. Exit code 1 when
    nobody records, or one does not answer or refuses."""
    from moe_trace import ctl

    try:
        arguments = ctl.settings(args.settings) if args.ctl == "set" else {}
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.settings and args.ctl != "set":
        raise UsageError(f"{args.ctl} takes no settings: {' '.join(args.settings)}")
    if args.ctl == "flush":
        arguments = {"seconds": 0.8 * args.timeout}
    answers = ctl.send(args.trace, args.ctl, arguments, args.timeout)
    for answer in answers:
        name = f"{answer.directory.absolute().parent.name}/{answer.directory.name}"
        if answer.ok:
            print(f"{name}  {ctl.line(answer.reply)}")
        else:
            say(f"{name}: {answer.reply.get('error')}")
    return WHOLE if all(answer.ok for answer in answers) else FAILED


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "ctl",
        run,
        "pause, resume, flush or change what records into a trace now",
        example="moe-native ctl trace set fields=ids,weights layers=0-3 sample=0.1",
    )
    add_trace(parser)
    parser.add_argument(
        "ctl",
        metavar="COMMAND",
        choices=("pause", "resume", "flush", "status", "set"),
        help="pause, resume, flush, status or set",
    )
    parser.add_argument("settings", metavar="SETTING", nargs="*", help="of set: fields=…, layers=…, sample=…")
    parser.add_argument("--timeout", type=_seconds, default=10.0, metavar="SECONDS", help="how long to wait (10)")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds
