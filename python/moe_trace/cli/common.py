"""What the commands share: exit codes, messages, how a command is added, which part of a trace is meant.
What one command alone needs is in that command's module."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

if TYPE_CHECKING:
    from moe_trace import Selection, Trace

WHOLE, FAILED, USAGE, LOSSY = 0, 1, 2, 3


class UsageError(Exception):
    """The arguments do not fit the trace; the message says what would."""


def say(message: str) -> None:
    print(f"moe-native: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str, code: int) -> int:
    say(message)
    return code


class Parser(argparse.ArgumentParser):
    """The parser of the command and, because argparse makes them alike, of each subcommand."""

    def error(self, message: str) -> NoReturn:
        # "-5m" looks like an option, and the message would not say so.
        super().error(
            message.replace("--since: expected one argument", "--since: write --since 5m for the last 5 minutes")
        )


_EXAMPLE = "example:\n  "


class _Help(argparse.HelpFormatter):
    """Fills the lines of a description, and keeps an example as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLE) else super()._fill_text(text, width, indent)


# What add_subparsers returns; argparse has no public name for it, and this one takes no [] at run time.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], what: str, *, example: str
) -> Parser:
    """A subcommand `name` that calls `run` and exits with what it returns. `what` is its line in the list of commands,
    `run`'s docstring the text of its help, and `example` a command line that ends the help."""
    parser = commands.add_parser(
        name,
        help=what,
        description=(run.__doc__ or "").strip(),
        epilog=_EXAMPLE + example,
        formatter_class=_Help,
    )
    parser.set_defaults(command=run)
    return parser


def add_trace(parser: Parser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="a trace directory, a run or rank in it, or one segment file")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_jobs(parser: Parser) -> None:
    parser.add_argument(
        "--jobs", type=_jobs, default=0, metavar="N", help="processes that share the work (0: one for each core)"
    )


def _jobs(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: write 4, or 0 for one for each core")
    return int(text)


def add_selection(parser: Parser) -> None:
    """The options that `select` applies."""
    parser.add_argument("--layer", type=_layers, action=_AddLayers, metavar="N", help="only these layers: 12, or 0,4-7")
    parser.add_argument("--phase", choices=("prefill", "decode", "unknown"), help="only rows of this phase")
    parser.add_argument(
        "--since",
        metavar="WHEN",
        help="only what is newer: 30s, 10m, 2h, 1d, or an ISO time such as 2026-11-21T10:15 "
        "(local time, unless it names a zone as 2026-11-21T10:15Z does)",
    )
    parser.add_argument("--run", metavar="RUN", help="only this run: its name, or 0 for the oldest, -1 for the newest")


def _layers(text: str) -> list[int]:
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of layers: write 12, or 0,4-7") from None
        if not 0 <= low <= high <= 65534:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is no range of layers from 0 to 65534")
        layers.update(range(low, high + 1))
    return sorted(layers)


class _AddLayers(argparse.Action):
    """`--layer 1 --layer 2` is `--layer 1,2`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, layers: Any, *_: Any) -> None:
        setattr(namespace, self.dest, sorted({*(getattr(namespace, self.dest) or ()), *layers}))


def open_trace(args: argparse.Namespace) -> Trace:
    import moe_trace

    return moe_trace.open(args.trace)


def verdict(trace: Trace) -> int:
    return WHOLE if trace.complete else LOSSY


def said_verdict(trace: Trace) -> int:
    """The verdict of a command that prints nothing of the losses: why it is 3 goes to stderr."""
    if trace.complete:
        return WHOLE
    why = [*trace.problems, *(f"rows were lost ({cause})" for cause in trace.losses)]
    why += [f"layer {entry.layer} was missed" for entry in trace.coverage if entry.status == "missed"]
    more = f", and {len(why) - 1:,} more" if len(why) > 1 else ""
    say(f"the trace is not whole: {why[0]}{more}. See moe-native summary {trace.path}")
    return LOSSY


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The selection in the user's words, for a summary to repeat."""
    return {"layers": args.layer, "phase": args.phase, "since": args.since, "run": args.run}


def select(trace: Trace, args: argparse.Namespace) -> Selection:
    """The part of the trace that --run, --layer, --phase and --since name."""
    from moe_trace.errors import DamagedTrace, TraceError

    selection: Selection = trace
    try:
        if args.run is not None:
            selection = selection.run(int(args.run) if args.run.removeprefix("-").isdecimal() else args.run)
        if args.layer is not None:
            selection = selection.layer(args.layer)
    except DamagedTrace:
        raise
    except TraceError as error:
        raise UsageError(str(error)) from None
    if args.phase is not None:
        selection = selection.phase(args.phase)
    if args.since is not None:
        try:
            selection = selection.since(args.since)
        except ValueError as error:
            raise UsageError(f"--since {args.since}: {error}") from None
    return selection


def print_json(of: dict[str, Any]) -> None:
    print(json.dumps(of, indent=2, allow_nan=False))


def print_result(command: str, /, **result: Any) -> None:
    """What a command did, for a program: later versions may add keys, never change one's meaning."""
    print_json({"format": f"moe-native {command}", "version": 1, **result})


def check_place(output: str) -> None:
    """Before the work: is there a directory to write the file into?"""
    directory = Path(output).parent
    if output != "-" and not directory.is_dir():
        raise FileNotFoundError(f"cannot write {output}: there is no directory {directory}")
