"""`moe-native doctor`: why nothing would be, or was, recorded."""

from __future__ import annotations

import argparse

from moe_trace.cli.common import FAILED, LOSSY, WHOLE, Commands, add_command


def run(args: argparse.Namespace) -> int:
    """Say why nothing would be, or was, recorded: this environment, vLLM's plugins, the settings, the room there is,
    and, of a trace, what is missing from it. Exit code 1 if there is a problem, 3 if only the trace is lossy."""
    from moe_trace import doctor, show

    out = show.console()
    found = set()
    for finding in doctor.examine(args.trace):
        show.finding(out, finding.status, finding.what, finding.todo)
        found.add(finding.status)
    return FAILED if "problem" in found else LOSSY if "lossy" in found else WHOLE


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        run,
        "why nothing would be, or was, recorded",
        example="moe-native doctor trace",
    )
    parser.add_argument("trace", metavar="TRACE", nargs="?", help="a trace to look into as well")
