"""`moe-native doctor`: why nothing would be, or was, recorded.

`--json` prints (`"format": "moe-native doctor"`, `"version": 1`) `trace` (its path, or null) and `findings`, a list of
`{"status", "what", "todo"}`: `status` is ok, warning, lossy or problem, and `todo` is empty where nothing is to do.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from moe_trace.cli.common import FAILED, LOSSY, WHOLE, Commands, add_command, add_json, print_result


def run(args: argparse.Namespace) -> int:
    """Say why nothing would be, or was, recorded: this environment, vLLM's plugins, the settings, the room there is,
    and, of a trace, what is missing from it. Exit code 1 if there is a problem, 3 if only the trace is lossy."""
    from moe_trace import doctor, show

    out, findings = show.console(), []
    for finding in doctor.examine(args.trace):
        findings.append(finding)
        if not args.json:
            show.finding(out, finding.status, finding.what, finding.todo)
    if args.json:
        print_result("doctor", trace=args.trace, findings=[asdict(finding) for finding in findings])
    found = {finding.status for finding in findings}
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
    add_json(parser)
