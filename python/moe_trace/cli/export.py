"""`moe-native export`: rows for other tools."""

from __future__ import annotations

import argparse
import sys
import warnings

from moe_trace.cli.common import (
    FAILED,
    LOSSY,
    Commands,
    add_command,
    add_selection,
    add_trace,
    check_place,
    fail,
    open_trace,
    output_file,
    said_verdict,
    say,
    select,
)


def run(args: argparse.Namespace) -> int:
    """Write a line of JSON for each token and layer, after a first line that describes the model."""
    from moe_trace import export, show

    trace = open_trace(args)
    check_place(args.output)
    if trace.executed_rows > trace.stored_rows:
        if not trace.stored_rows:
            return fail(f"{args.trace} has counts only, and no row to export. See moe-native summary", FAILED)
        say(f"{trace.stored_rows:,} of {trace.executed_rows:,} rows are stored, and exported; the others are counted")
    selection = select(trace, args)
    if args.request:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            selection = selection.request(*args.request)
        for warning in said:
            say(f"{warning.message}; --run takes one")
    problems: list[str] = []
    total = sum(batch.rows for batch in selection.batches([])) if sys.stderr.isatty() else None
    with output_file(args.output) as out, show.progress("exporting", total) as advance:
        for lines, rows in export.jsonl(trace, selection, problems):
            out.write(lines)
            advance(rows)
    for problem in problems:
        say(problem)
    return LOSSY if problems else said_verdict(trace)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        run,
        "write rows in another format",
        example="moe-native export trace --format jsonl --phase decode -o rows.jsonl",
    )
    add_trace(parser)
    add_selection(parser)
    parser.add_argument("--format", choices=("jsonl",), default="jsonl", help="the format to write (jsonl)")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write; - for stdout")
    parser.add_argument(
        "--request", action="append", metavar="ID", help="only rows of this request; may be given several times"
    )
