"""The command `moe-native`: summaries, pictures and exports of traces, and what is wrong with a set-up.

Each subcommand is a module here with two functions: `run` does the work and returns the exit code, `add` adds its
parser. A new one is such a module, named in `_COMMANDS`; what it alone needs it imports in `run`, so that the others
start quickly. What several share is in `common`.

Exit codes, of every command: 0 whole; 1 failed, and one line on stderr says why; 2 usage; 3 lossy: the command did its
work, but the trace has losses, damage or layers that were missed. Of `doctor`: 1 something keeps rows from being
recorded, 3 only the trace that it looked into is lossy. Whoever stops reading our output (`| head`) gets 141, and an
interrupt 130, as shells have it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from moe_trace.cli import compare, ctl, doctor, export, info, load, plot, recover, report, summary
from moe_trace.cli.common import FAILED, LOSSY, USAGE, WHOLE, Parser, UsageError, fail

__all__ = ["FAILED", "LOSSY", "USAGE", "WHOLE", "main"]

INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell says of a program that SIGINT or SIGPIPE ended

# In the order in which the help lists them.
_COMMANDS = (summary, info, plot, report, compare, export, load, recover, ctl, doctor)

_EXAMPLES = """
examples:
  moe-native summary trace
  moe-native plot trace --layer 12 -o layer12.png
  moe-native doctor trace

Of each command: moe-native COMMAND --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv`: the arguments without the program's name; None: sys.argv's."""
    if sys.stdout is None:
        return fail("standard output is closed", FAILED)
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser()
    try:
        args = parser.parse_args(arguments) if arguments else None
    except SystemExit as done:  # argparse has printed what there is to say
        return done.code if isinstance(done.code, int) else USAGE
    from moe_trace.errors import TraceError

    try:
        code: int = _overview(parser) if args is None else args.command(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return fail(str(error), USAGE)
    except BrokenPipeError:
        _discard_output()  # whoever reads has had enough
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        # Without "[Errno 2]", which says nothing to a person.
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error.strerror
        return fail(named or str(error) or type(error).__name__, FAILED)
    except (TraceError, ValueError, MemoryError) as error:
        return fail(str(error) or type(error).__name__, FAILED)


def _discard_output() -> None:
    """What is still buffered must not raise again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _overview(parser: Parser) -> int:
    """What `moe-native` alone prints: whoever types it wants to know what there is."""
    print(parser.format_help() + _EXAMPLES)
    return WHOLE


def _parser() -> Parser:
    parser = Parser(
        prog="moe-native",
        description="Read Mixture-of-Experts routing that moe_native recorded.",
        epilog="Exit codes: 0 whole, 1 failed, 2 usage, 3 lossy (the trace has losses, damage or missed layers).",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from moe_trace import __version__

        print(f"moe-native {__version__}")
        parser.exit()
