"""`moe-native export`: rows for other tools.

`--json` prints (`"format": "moe-native export"`, `"version": 1`) `trace` (its path), `path` (what was written), `kind`
(the format that it has: jsonl, npz, …), `rows` (tokens; of --per-step, steps), `complete` (false when something is
missing, from the trace or from the export), and `problems` and `notes`, lists of sentences.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from moe_trace.cli.common import (
    LOSSY,
    Commands,
    UsageError,
    add_command,
    add_json,
    add_selection,
    add_trace,
    check_place,
    open_trace,
    print_result,
    said_verdict,
    say,
    select,
    verdict,
)

_FORMATS = ("jsonl", "npz", "parquet", "safetensors", "sglang", "vllm")  # exchange.FORMATS, without its imports


def run(args: argparse.Namespace) -> int:
    """Write rows in a format that other tools read: jsonl (a line for each token and layer), npz (NumPy arrays),
    parquet (a row for each token and layer; needs pyarrow), safetensors (router logits), sglang (counts, for its
    --init-expert-location; needs torch) or vllm (a directory with the array that it returns of each request)."""
    from moe_trace import exchange, show

    name = args.format or _format_of(args.output)
    if args.output == "-" and name != "jsonl":
        raise UsageError(f"only jsonl is text, and goes to stdout: name a file for {name}")
    if args.per_step and name != "sglang":
        raise UsageError("--per-step is for --format sglang")
    if args.json and args.output == "-":
        raise UsageError("--json says on stdout what was written: name a file for the rows")
    trace = open_trace(args)
    check_place(args.output)
    selection = select(trace, args)
    if args.request:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            selection = selection.request(*args.request)
        for warning in said:
            say(f"{warning.message}; --run takes one")
    total = sum(batch.rows for batch in selection.batches([])) if sys.stderr.isatty() else None
    to = sys.stdout if args.output == "-" else args.output
    with show.progress("exporting", total) as advance:
        done = exchange.export(selection, to, name, per_step=args.per_step, advance=advance)
    if args.json:
        code = LOSSY if done.problems else verdict(trace)
        print_result(
            "export",
            trace=str(trace.path),
            path=str(done.path),
            kind=name,
            rows=done.rows,
            complete=code != LOSSY,
            problems=done.problems,
            notes=done.notes,
        )
        return code
    for sentence in done.notes + done.problems:
        say(sentence)
    return LOSSY if done.problems else said_verdict(trace)


def _format_of(output: str) -> str:
    """What the ending of the name says; JSON lines where it has none, as pipes and devices do."""
    from moe_trace import exchange

    try:
        return exchange.format_of(output) if Path(output).suffix else "jsonl"
    except ValueError as error:
        raise UsageError(str(error).replace("name the format", "give --format")) from None


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
    parser.add_argument("--format", choices=_FORMATS, help="the format to write (what the ending of FILE says)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="where to write; - for stdout; of vllm a new directory"
    )
    parser.add_argument(
        "--request", action="append", metavar="ID", help="only rows of this request; may be given several times"
    )
    parser.add_argument("--per-step", action="store_true", help="of sglang: the counts of each step, not their sum")
    add_json(parser)
