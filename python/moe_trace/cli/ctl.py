"""`moe-native ctl`: commands to what is recording now.

`--json` prints (`"format": "moe-native ctl"`, `"version": 1`) `path`, `command` and `answers`, a list with an object
for each process that records: `run`, `rank`, `ok`, and `error` where that is false, else how it stands, as
`Recorder.status` says: `state`, `fields`, `layers` (null for all), `sample`, `steps` and `rows` (written),
`rows_stored`, `lost` and `paused`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from moe_trace.cli.common import (
    FAILED,
    WHOLE,
    Commands,
    UsageError,
    add_command,
    add_json,
    add_trace,
    print_result,
    say,
)

if TYPE_CHECKING:
    from moe_trace.ctl import Answer


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
    if args.json:
        print_result("ctl", path=args.trace, command=args.ctl, answers=[_object(answer) for answer in answers])
    else:
        for answer in answers:
            name = "/".join(_names(answer))
            if answer.ok:
                print(f"{name}  {ctl.line(answer.reply)}")
            else:
                say(f"{name}: {answer.reply.get('error')}")
    return WHOLE if all(answer.ok for answer in answers) else FAILED


def _names(answer: Answer) -> tuple[str, str]:
    """Of the run and the rank."""
    return answer.directory.absolute().parent.name, answer.directory.name


def _object(answer: Answer) -> dict[str, Any]:
    run, rank = _names(answer)
    return {"run": run, "rank": rank, **{key: value for key, value in answer.reply.items() if key != "id"}}


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
    add_json(parser)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds
