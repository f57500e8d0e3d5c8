"""`moe-native report`: one page that can be mailed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_trace.cli.common import (
    Commands,
    add_command,
    add_jobs,
    add_selection,
    add_trace,
    asked,
    check_place,
    open_trace,
    select,
    verdict,
)


def run(args: argparse.Namespace) -> int:
    """Write one HTML page: what was recorded and how completely, what stands out, and pictures and tables to look
    into. It opens from disk, loads nothing, and can be mailed as it is."""
    from moe_trace import report, show
    from moe_trace.exchange.made import whole_file

    trace = open_trace(args)
    check_place(args.output)
    selection = select(trace, args)
    with show.progress("reading", trace.executed_rows + trace.stored_rows) as advance:
        page = report.build(trace, selection, asked(args), jobs=args.jobs, progress=advance)
    if args.output == "-":
        sys.stdout.write(page)
    else:
        with whole_file(Path(args.output)) as part:
            part.write_text(page, encoding="utf-8")
        print(args.output)
    return verdict(trace)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        run,
        "write a page with findings, pictures and tables",
        example="moe-native report trace -o report.html",
    )
    add_trace(parser)
    add_selection(parser)
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="where to write (report.html); - for stdout"
    )
    add_jobs(parser)
