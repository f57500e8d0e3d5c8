"""The command `moe-native`: summaries, pictures and exports of traces, and what is wrong with a set-up.

Exit codes, of every command: 0 whole; 1 failed, and one line on stderr says why; 2 usage; 3 lossy: the command did its
work, but the trace has losses, damage or layers that were missed. Of `doctor`: 1 something keeps rows from being
recorded, 3 only the trace that it looked into is lossy. Whoever stops reading our output (`| head`) gets 141, and an
interrupt 130, as shells have it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from moe_trace import Selection, Trace

WHOLE, FAILED, USAGE, LOSSY = 0, 1, 2, 3
INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell says of a program that SIGINT or SIGPIPE ended


class UsageError(Exception):
    """The arguments do not fit the trace; the message says what would."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv`: the arguments without the program's name; None: sys.argv's."""
    if sys.stdout is None:
        return _fail("standard output is closed", FAILED)
    try:
        args = _parser().parse_args(argv)
    except SystemExit as done:  # argparse has printed what there is to say
        return done.code if isinstance(done.code, int) else USAGE
    from moe_trace.errors import TraceError

    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(str(error), USAGE)
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
        return _fail(named or str(error) or type(error).__name__, FAILED)
    except (TraceError, ValueError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, FAILED)


def _discard_output() -> None:
    """What is still buffered must not raise again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _summary(args: argparse.Namespace) -> int:
    """Which experts each layer chose, how evenly, and what was lost. Reads block statistics, no rows."""
    from moe_trace import show, summary

    trace = _open(args)
    of, _ = summary.summarize(trace, _select(trace, args), _asked(args))
    if args.json:
        _print_json(of)
    else:
        show.summary(show.console(), of)
    return _verdict(trace)


def _info(args: argparse.Namespace) -> int:
    """What a trace consists of: model, runs, ranks, segments, sizes, bytes per row, fields, times, versions."""
    from moe_trace import info, show

    trace = _open(args)
    of = info.describe(trace)
    if args.json:
        _print_json(of)
    else:
        show.info(show.console(), of)
    return _verdict(trace)


def _plot(args: argparse.Namespace) -> int:
    """Draw the histogram of expert usage: of one layer, or of all (or several) layers with a map of each."""
    from moe_trace import plots, summary

    try:
        plots.ending_of(args.output)
    except ValueError as error:
        raise UsageError(str(error)) from None
    trace = _open(args)
    _check_place(args.output)
    of, counts = summary.summarize(trace, _select(trace, args), _asked(args))
    drawn = [(layer, c) for layer, c in zip(of["layers"], counts, strict=True) if layer["assignments"]]
    if not drawn:
        return _fail(f"there is nothing to draw: no rows. See what is there: moe-native summary {args.trace}", FAILED)
    model = of["model"] or Path(of["path"]).name
    note = _note(of, args)
    if len(drawn) == 1:
        layer, c = drawn[0]
        evenness = "" if layer["normalized_entropy"] is None else f" · entropy {layer['normalized_entropy']:.4f}"
        note = f"{layer['rows']:,} rows{note}{evenness} · max/mean {layer['imbalance']:.2f}"
        figure = plots.expert_histogram(c, title=f"{model} · layer {layer['layer']}", note=note)
    else:
        layers = [layer["layer"] for layer, _ in drawn]
        rows = sorted({layer["rows"] for layer, _ in drawn})
        each = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
        figure = plots.layers_histogram(
            layers,
            [c for _, c in drawn],
            title=f"{model} · {len(layers)} layers",
            note=f"{each} rows a layer{note}",
        )
    plots.save(figure, args.output)
    print(args.output)
    return _verdict(trace)


def _note(of: dict[str, Any], args: argparse.Namespace) -> str:
    """What a picture has to say beside its rows: how they were selected, and that some are missing."""
    from moe_trace.units import count

    note = f" · {args.phase} only" if args.phase else ""
    note += f" · since {args.since}" if args.since else ""
    note += f" · run {args.run}" if args.run else ""
    note += f" · {of['stored_rows']:,} stored" if of["executed_rows"] > of["stored_rows"] else ""
    note += " · whole blocks counted at the ends" if of["warnings"] else ""
    missed = len(of["coverage"]["missed"])
    note += f" · {count(missed, 'layer')} missed" if missed else ""
    return note + (" · with losses" if of["losses"] or of["problems"] else "")


def _export(args: argparse.Namespace) -> int:
    """Write a line of JSON for each token and layer, after a first line that describes the model."""
    from moe_trace import export, show

    trace = _open(args)
    _check_place(args.output)
    if trace.executed_rows > trace.stored_rows:
        if not trace.stored_rows:
            return _fail(f"{args.trace} has counts only, and no row to export. See moe-native summary", FAILED)
        _say(f"{trace.stored_rows:,} of {trace.executed_rows:,} rows are stored, and exported; the others are counted")
    selection = _select(trace, args)
    if args.request:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            selection = selection.request(*args.request)
        for warning in said:
            _say(f"{warning.message}; --run takes one")
    problems: list[str] = []
    total = sum(batch.rows for batch in selection.batches([])) if sys.stderr.isatty() else None
    with _output(args.output) as out, show.progress("exporting", total) as advance:
        for lines, rows in export.jsonl(trace, selection, problems):
            out.write(lines)
            advance(rows)
    for problem in problems:
        _say(problem)
    return LOSSY if problems else _said_verdict(trace)


def _recover(args: argparse.Namespace) -> int:
    """Fold what crashed processes left in memory into their segments, and close those. It may be repeated, and rings
    of living processes are left alone. Reading needs no recovery, every command sees such rings: it frees their memory.
    """
    import moe_trace

    report = moe_trace.recover(args.trace)
    print(report)
    try:
        return _said_verdict(_open(args)) or (LOSSY if report.problems else WHOLE)
    except moe_trace.NotATrace:
        return WHOLE  # an empty directory: a trace that nobody has begun


def _ctl(args: argparse.Namespace) -> int:
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
            _say(f"{name}: {answer.reply.get('error')}")
    return WHOLE if all(answer.ok for answer in answers) else FAILED


def _doctor(args: argparse.Namespace) -> int:
    """Say why nothing would be, or was, recorded: this environment, vLLM's plugins, the settings, the room there is,
    and, of a trace, what is missing from it. Exit code 1 if there is a problem, 3 if only the trace is lossy."""
    from moe_trace import doctor, show

    out = show.console()
    found = set()
    for finding in doctor.examine(args.trace):
        show.finding(out, finding.status, finding.what, finding.todo)
        found.add(finding.status)
    return FAILED if "problem" in found else LOSSY if "lossy" in found else WHOLE


def _open(args: argparse.Namespace) -> Trace:
    import moe_trace

    return moe_trace.open(args.trace)


def _verdict(trace: Trace) -> int:
    return WHOLE if trace.complete else LOSSY


def _said_verdict(trace: Trace) -> int:
    """The verdict of a command that prints nothing of the losses: why it is 3 goes to stderr."""
    if trace.complete:
        return WHOLE
    why = [*trace.problems, *(f"rows were lost ({cause})" for cause in trace.losses)]
    why += [f"layer {entry.layer} was missed" for entry in trace.coverage if entry.status == "missed"]
    more = f", and {len(why) - 1:,} more" if len(why) > 1 else ""
    _say(f"the trace is not whole: {why[0]}{more}. See moe-native summary {trace.path}")
    return LOSSY


def _check_place(output: str) -> None:
    """Before the work: is there a directory to write the file into?"""
    directory = Path(output).parent
    if output != "-" and not directory.is_dir():
        raise FileNotFoundError(f"cannot write {output}: there is no directory {directory}")


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    return {"layers": args.layer, "phase": args.phase, "since": args.since, "run": args.run}


def _select(trace: Trace, args: argparse.Namespace) -> Selection:
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


def _print_json(of: dict[str, Any]) -> None:
    print(json.dumps(of, indent=2, allow_nan=False))


@contextmanager
def _output(name: str) -> Iterator[IO[str]]:
    """A text file that has its name only once it is whole; `-` is stdout; a device or a pipe is written as it is."""
    if name == "-":
        yield sys.stdout
        return
    path = Path(name)
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("x", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # "-5m" looks like an option, and the message would not say so.
        super().error(
            message.replace("--since: expected one argument", "--since: write --since 5m for the last 5 minutes")
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moe-native",
        description="Read Mixture-of-Experts routing that moe_native recorded.",
        epilog="Exit codes: 0 whole, 1 failed, 2 usage, 3 lossy (the trace has losses, damage or missed layers).",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        # `recover` and `doctor` do more than their one line says; their functions' docstrings are the rest of the help.
        added = commands.add_parser(name, help=what, description=(run.__doc__ or "").strip())
        added.set_defaults(command=run)
        return added

    summary = command("summary", _summary, "which experts each layer chose, how evenly, and what was lost")
    info = command("info", _info, "what a trace consists of: model, runs, segments, sizes, fields, versions")
    plot = command("plot", _plot, "draw the histogram of expert usage")
    export = command("export", _export, "write rows in another format")
    recover = command("recover", _recover, "fold what crashed processes left in memory into their segments")
    ctl = command("ctl", _ctl, "pause, resume, flush or change what records into a trace now")
    doctor = command("doctor", _doctor, "why nothing would be, or was, recorded")

    for of in (summary, info, plot, export, recover, ctl):
        of.add_argument("trace", metavar="TRACE", help="a trace directory, a run or rank in it, or one segment file")
    ctl.add_argument(
        "ctl",
        metavar="COMMAND",
        choices=("pause", "resume", "flush", "status", "set"),
        help="pause, resume, flush, status or set",
    )
    ctl.add_argument("settings", metavar="SETTING", nargs="*", help="of set: fields=…, layers=…, sample=…")
    ctl.add_argument("--timeout", type=_seconds, default=10.0, metavar="SECONDS", help="how long to wait (10)")
    doctor.add_argument("trace", metavar="TRACE", nargs="?", help="a trace to look into as well")
    for of in (summary, plot, export):
        of.add_argument("--layer", type=_layers, action=_AddLayers, metavar="N", help="only these layers: 12, or 0,4-7")
        of.add_argument("--phase", choices=("prefill", "decode", "unknown"), help="only rows of this phase")
        of.add_argument(
            "--since",
            metavar="WHEN",
            help="only what is newer: 30s, 10m, 2h, 1d, or an ISO time such as 2026-11-21T10:15 "
            "(local time, unless it names a zone as 2026-11-21T10:15Z does)",
        )
        of.add_argument("--run", metavar="RUN", help="only this run: its name, or 0 for the oldest, -1 for the newest")
    for of in (summary, info):
        of.add_argument("--json", action="store_true", help="print one JSON object")
    plot.add_argument(
        "-o", "--output", default="expert_hist.png", metavar="FILE", help="PNG, SVG or PDF (expert_hist.png)"
    )
    export.add_argument("--format", choices=("jsonl",), default="jsonl", help="the format to write (jsonl)")
    export.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write; - for stdout")
    export.add_argument(
        "--request", action="append", metavar="ID", help="only rows of this request; may be given several times"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


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


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from moe_trace import __version__

        print(f"moe-native {__version__}")
        parser.exit()


def _say(message: str) -> None:
    print(f"moe-native: {' '.join(message.split())}", file=sys.stderr)


def _fail(message: str, code: int) -> int:
    _say(message)
    return code
