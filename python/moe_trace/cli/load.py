"""`moe-native import`: logs of other tools.

`--json` prints (`"format": "moe-native import"`, `"version": 1`) `path` (of the trace), `runs` (names of those that
were added), `rows` (tokens that are stored or, of counts, that are counted), `requests` (how many have a name),
`layers`, `lines` (read, of JSONL; of SGLang's counts, steps), `skipped` (malformed lines), and `problems` (what is
missing from the trace) and `notes` (what the log did not say), lists of sentences.
"""

from __future__ import annotations

import argparse

from moe_trace.cli.common import LOSSY, WHOLE, Commands, UsageError, add_command, add_json, print_result, say


def run(args: argparse.Namespace) -> int:
    """Make a trace of a log: of JSON lines (a line for each token and layer, as moe-native export and others write
    them; one layer in each file, or one part after the other), or of the counts in SGLang's .pt (needs torch). If TRACE
    is a trace, it gets a run more. What the log does not say stays unknown, and is named: positions, phases, times."""
    from moe_trace import exchange

    try:
        name = args.format or exchange.format_of(args.files[0])
    except ValueError as error:
        raise UsageError(str(error).replace("name the format", "give --format")) from None
    if args.top_k is not None and name != "sglang":
        raise UsageError("--top-k is for --format sglang: in JSONL each line has its experts")
    if name != "jsonl" and (args.keep_going or args.token_idx != "auto"):
        raise UsageError("--keep-going and --token-idx are for --format jsonl")
    done = exchange.load(
        args.files,
        args.output,
        name,
        keep_going=args.keep_going,
        model=args.model,
        experts=args.experts,
        top_k=args.top_k,
        token_idx=args.token_idx,
    )
    code = LOSSY if done.problems else WHOLE
    if args.json:
        print_result("import", **{**vars(done), "path": str(done.path)})
        return code
    print(done)
    for note in done.notes:
        print(f"  {note}")
    for problem in done.problems:
        say(problem)
    return code


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "import",
        run,
        "make a trace of another tool's log",
        example="moe-native import moe_routes.jsonl --experts 60 -o imported",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="files of one recording")
    parser.add_argument("-o", "--output", required=True, metavar="TRACE", help="a new directory, or a trace")
    parser.add_argument("--format", choices=("jsonl", "sglang"), help="of the files (what the first one's ending says)")
    parser.add_argument("--keep-going", action="store_true", help="skip and count malformed lines (exit code 3)")
    parser.add_argument("--model", metavar="NAME", help="the model's name, where the log does not say it")
    parser.add_argument("--experts", type=int, metavar="N", help="experts a layer, where the log does not say it")
    parser.add_argument("--top-k", type=int, metavar="K", help="of sglang: experts a token, which counts do not say")
    parser.add_argument(
        "--token-idx",
        choices=("auto", "position", "step"),
        default="auto",
        help="what token_idx is: the position in the request, a place in the step, or auto (see whether it restarts)",
    )
    add_json(parser)
