"""How the command line talks to a person: tables and lines with rich, from the objects that `--json` gives to programs.

On a terminal there is colour and the width is respected. In a pipe or a file there is neither colour nor a width, so
that nothing is cut off. Text from a trace (names, paths, details) is never read as rich's markup, and its control
characters are made visible: a trace may be a stranger's file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import IO, Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_trace.units import count, format_bytes

UNLIMITED = 100_000  # columns of a pipe: more than any table is wide
NOTHING = "-"
LAG = "rows of the last flush interval (10 s unless set otherwise) may not show yet"  # of a live trace


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the program with 1; the command line has a code of its own for it


class Advance(Protocol):
    """Tells a progress bar that so many more units are done."""

    def __call__(self, units: int) -> None: ...


def console(stream: IO[str] | None = None) -> Console:
    """A rich console for `stream` (stdout unless given), as wide as the data where nobody watches."""
    stream = stream or sys.stdout
    watched = stream.isatty()
    return _Console(
        file=stream,
        width=None if watched else UNLIMITED,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not watched,
    )


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """A progress bar on stderr while a person watches it, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda units: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda units: bar.advance(task, units)


def summary(out: Console, of: dict[str, Any]) -> None:
    """Print the object of `moe_trace.summary`."""
    _heading(out, of)
    asked = {key: value for key, value in of["selection"].items() if value is not None}
    if len(asked.get("layers", ())) == 1:
        asked = {"layer": asked.pop("layers"), **asked}
    if asked:
        text = ", ".join(f"{key} {_plain(value)}" for key, value in asked.items())
        hang(out, line(f"selected: {text}"), 10)
    out.print()
    if not any(layer["rows"] for layer in of["layers"]):
        hang(out, line(_no_rows(of), "yellow"), 2)
    else:
        out.print(_layers(of))
        for said in _over_all(of["all"], len(of["layers"])):
            hang(out, said, 23)
    out.print()
    for warning in of["warnings"]:
        hang(out, line(f"note      {warning}", "yellow"), 10)
    for said in losses_and_coverage(of):
        hang(out, said, 10)


def info(out: Console, of: dict[str, Any]) -> None:
    """Print the object of `moe_trace.info`."""
    _heading(out, of)
    out.print()
    facts = [
        ("recorded", ", ".join(f"{name} ({dtype})" for name, dtype in of["recorded"].items()) or "no rows"),
        ("rows", f"{_rows(of)} in {count(of['steps'], 'step')}; {of['layer_rows']:,} rows of layers"),
        (
            "requests",
            f"{of['requests']:,}" + (f"; {of['cached']:,} of their tokens were cached" if of["cached"] else ""),
        ),
    ]
    each = of["bytes_per_layer_row"]
    facts.append(
        ("size", format_bytes(of["bytes"]) + ("" if each is None else f", {each:.2f} bytes for each row of a layer"))
    )
    for key, value in of["metadata"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {_flat(item)}" for name, item in value.items())
        facts.append((key, _flat(value)))
    width = max(len(_clean(name)) for name, _ in facts)
    for name, value in facts:
        hang(out, line(f"{_clean(name):<{width}}  {value}"), width + 2)
    out.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("run", "rank", "segment"):
        table.add_column(name, overflow="fold")
    for name in ("size", "blocks", "steps", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state")
    for rank in of["rank_list"]:
        cells = [_clean(rank["run"]), _clean(rank["rank"])]
        for segment in rank["segments"]:
            numbers = [f"{segment[key]:,}" for key in ("blocks", "steps", "rows")]
            state = "closed" if segment["closed"] else {"live": "being written"}.get(rank["state"], "not closed")
            table.add_row(*cells, segment["file"], format_bytes(segment["bytes"]), *numbers, state)
        if rank["ring_steps"]:
            numbers = [f"{rank['ring_steps']:,}", f"{rank['ring_rows']:,}"]
            table.add_row(*cells, "in its ring", NOTHING, NOTHING, *numbers, "to be recovered")
        elif not rank["segments"]:
            table.add_row(*cells, *[NOTHING] * 5, rank["state"])
    out.print(table)
    out.print()
    for text in losses_and_coverage(of):
        hang(out, text, 10)


def finding(out: Console, status: str, what: str, todo: str) -> None:
    """Print one line of the doctor's report, and below it what to do."""
    colour = {"ok": "green", "warning": "yellow", "lossy": "red", "problem": "red"}[status]
    text = Text(f"{status:<8}", style=colour).append(f" {_clean(what)}", style="default")
    hang(out, text, 9)
    if todo:
        hang(out, line(f"         → {todo}", "dim"), 11)


def _heading(out: Console, of: dict[str, Any]) -> None:
    state = {"closed": "closed", "live": "live: being recorded", "crashed": "crashed: the recording process died"}
    colour = "green" if of["complete"] else "yellow"
    head = Text(_clean(of["path"]), style="bold")
    whole = "whole" if of["complete"] else "not whole"
    if of["complete"] and of["deleted_segments"]:
        whole += f" since {_moment(of['whole_since'])} UTC" if of["whole_since"] else " but for what was deleted"
    head.append(f"   {state.get(of['state'], of['state'])}, {whole}", style=colour)
    hang(out, head, 2)
    parts = [_clean(of["model"])] if of["model"] else []
    if of.get("layers"):
        shapes = {(layer["experts"], layer["top_k"] or 0) for layer in of["layers"]}
        parts.append(count(len(of["layers"]), "layer"))
        parts += [f"{experts} experts" + (f", top-{k}" if k else "") for experts, k in sorted(shapes)[:3]]
    parts.append(f"{count(of['runs'], 'run')}, {count(of['ranks'], 'rank')}{_pipeline(of)}")
    if of["first_time"]:
        parts.append(f"{_moment(of['first_time'])} to {_moment(of['last_time'])} UTC")
    hang(out, line(" · ".join(parts)), 2)


def _pipeline(of: dict[str, Any]) -> str:
    """What several ranks make up, where they are not each for itself."""
    parts = [("pipeline stage", of["stages"]), ("sequence-parallel shard", of["shards"])]
    said = " x ".join(count(number, what) for what, number in parts if number > 1)
    return f" ({said} each)" if said else ""


def _no_rows(of: dict[str, Any]) -> str:
    """Why there is no table."""
    if of["first_time"]:
        return (
            "no rows in this selection; the trace has rows from "
            f"{_moment(of['first_time'])} to {_moment(of['last_time'])} UTC"
        )
    nothing = "no row can be read" if of["problems"] else "nothing was recorded"
    text = "nothing recorded yet" if of["state"] == "live" else nothing
    bound = sum(len(of["coverage"][status]) for status in ("exact", "derived"))
    return text + (f" ({count(bound, 'MoE layer')} {'is' if bound == 1 else 'are'} bound)" if bound else "")


def _layers(of: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("layer", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    tops = max(len(layer["top"]) for layer in of["layers"])
    for rank in range(1, tops + 1):
        table.add_column(f"top {rank}", justify="right", no_wrap=True)
    for name in ("entropy", "max/mean", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    odd = [key for key in ("status", "invalid") if any(_odd(layer, key) for layer in of["layers"])]
    for name in odd:
        table.add_column(name, justify="right", no_wrap=True)
    ids = len(str(max((entry["expert"] for layer in of["layers"] for entry in layer["top"]), default=0)))
    for layer in of["layers"]:
        cells = [str(layer["layer"]), f"{layer['rows']:,}"]
        tops_of_layer = [f"{entry['expert']:>{ids}}  {_share_of(entry)}" for entry in layer["top"]]
        cells += tops_of_layer + [NOTHING] * (tops - len(layer["top"]))
        cells += [_ratio(layer["normalized_entropy"], 4), _ratio(layer["imbalance"], 2)]
        cells.append(f"{layer['dead_experts']}/{layer['experts']}" if layer["rows"] else NOTHING)
        table.add_row(*cells, *(f"{layer[key]:,}" if key == "invalid" else layer[key] for key in odd))
    return table


def _share_of(entry: Mapping[str, Any]) -> str:
    """A share, with its interval where that was asked for."""
    share = _percent(entry["share"])
    return share if entry.get("low") is None else f"{share} [{100 * entry['low']:.2f}, {100 * entry['high']:.2f}]"


def _odd(layer: dict[str, Any], key: str) -> bool:
    return bool(layer["invalid"]) if key == "invalid" else layer["status"] != "exact"


def _over_all(whole: dict[str, Any], layers: int) -> Iterator[Text]:
    if layers < 2:
        return
    entropy, imbalance = whole["normalized_entropy"], whole["imbalance"]
    yield line("")
    yield line(f"over all layers: {whole['rows']:,} rows, {whole['assignments']:,} assignments", "bold")
    if entropy["mean"] is not None:
        lowest = f"lowest {entropy['min']:.4f} (layer {entropy['min_layer']})"
        yield line(f"  normalised entropy   mean {entropy['mean']:.4f}, {lowest}")
    if imbalance["mean"] is not None:
        highest = f"highest {imbalance['max']:.2f} (layer {imbalance['max_layer']})"
        yield line(f"  max/mean             mean {imbalance['mean']:.2f}, {highest}")
    yield line(f"  dead experts         {whole['dead_experts']:,} of {whole['experts']:,}")
    if whole["invalid"]:
        yield line(f"  invalid ids          {whole['invalid']:,}", "yellow")
    top = ", ".join(f"{entry['expert']} ({_percent(entry['share'])})" for entry in whole["top"])
    if top:
        yield line(f"  top by expert id     {top}; added up over the layers")


def _rows(of: Mapping[str, Any]) -> str:
    """How many rows there are, where not all are stored."""
    if of["executed_rows"] <= of["stored_rows"]:
        return f"{of['stored_rows']:,}"
    why = "counts only" if of["fields"] == ["counts"] else f"sample {_share(of['sample'])}"
    return f"{of['executed_rows']:,} executed, {of['stored_rows']:,} stored ({why})"


def _share(sample: Any) -> str:
    return f"{100 * sample:g} %" if isinstance(sample, (int, float)) else "unknown"


def _kinds(of: Mapping[str, Any]) -> str:
    """The executed tokens by phase and modality, and how many of them were executed for another reason than to be the
    next."""
    totals: dict[tuple[str, str], int] = {}
    for kind in of["kinds"]:
        key = kind["phase"], kind["modality"]
        totals[key] = totals.get(key, 0) + kind["rows"]
    only_text = {modality for _, modality in totals} <= {"text", "unknown"}
    names = {key: key[0] if only_text else " ".join(key) for key in totals}
    parts = [f"{names[key]} {rows:,}" for key, rows in totals.items()]
    for what, name in (("recomputed", "recomputed after a preemption or a rejected draft"), ("draft", "draft tokens")):
        rows = sum(kind["rows"] for kind in of["kinds"] if kind[what])
        parts += [f"of them {rows:,} {name}"] if rows else []
    return ", ".join(parts)


def losses_and_coverage(of: Mapping[str, Any]) -> Iterator[Text]:
    """How whole a trace is, from the object of `moe_trace.summary`: lines of a label in ten letters and a text."""
    if of["kinds"]:
        yield line(f"tokens    {_kinds(of)}")
    if of["executed_rows"] > of["stored_rows"]:
        yield line(f"rows      {_rows(of)}")
    if of["paused"]["steps"]:
        what = ", ".join(count(of["paused"][key], key[:-1]) for key in ("steps", "rows"))
        yield line(f"paused    {what} not recorded, on request", "yellow")
    lost = [loss for loss in of["losses"] if loss["steps"] or loss["layers"] or loss["rows"]]
    if not lost:
        yield line("losses    none", "green")
    for loss in lost:
        what = ", ".join(count(loss[key], key[:-1]) for key in ("steps", "layers", "rows") if loss[key])
        yield line(f"lost      {what}: {loss['cause']}", "red")
    if of["deleted_segments"]:
        oldest = "segment" if of["deleted_segments"] == 1 else f"{of['deleted_segments']:,} segments"
        yield line(f"deleted   the oldest {oldest} (kept within max_bytes)", "yellow")
    coverage = of["coverage"]
    recorded = len(coverage["exact"]) + len(coverage["derived"])
    expected = recorded + len(coverage["missed"]) + len(coverage["skipped"])
    colour = "red" if coverage["missed"] or not recorded else "green"
    if of["first_time"]:
        yield line(f"coverage  {recorded} of {count(expected, 'MoE layer')} recorded", colour)
    elif expected:
        yield line(f"coverage  {recorded} of {count(expected, 'MoE layer')} bound, no rows", colour)
    else:  # a recorder writes its ledger with the first step
        yield line("coverage  not known" + (" yet" if of["state"] == "live" else ""), "yellow")
    for status, colour in (("missed", "red"), ("derived", "yellow"), ("skipped", "")):
        entries = sorted(coverage[status], key=lambda entry: entry["detail"] or "")
        for detail, group in groupby(entries, key=lambda entry: entry["detail"] or ""):
            layers = ranges(entry["layer"] for entry in group)
            yield line(f"{status:<8}  layer {layers}" + (f": {detail}" if detail else ""), colour)
    for text in of["left_out"]:
        yield line(f"left out  {text}")
    if not of["problems"]:
        yield line("problems  none", "green")
    for problem in of["problems"]:
        yield line(f"problem   {problem}", "red")
    if of["state"] == "live":
        yield line(f"live      {LAG}")


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as a person writes them: 0, 4-7, 9."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def hang(out: Console, text: Text, indent: int) -> None:
    """Print a line. Where it does not fit a terminal, it goes on below its own text, not below the label before it."""
    if text.cell_len <= out.width or indent >= out.width // 2:
        out.print(text)
        return
    label = text[:indent]
    for line in text[indent:].wrap(out, out.width - indent):
        out.print(label + line)
        label = Text(" " * indent)


def line(text: str, style: str = "") -> Text:
    return Text(_clean(text), style=style)


def _clean(text: Any) -> str:
    """Control characters made visible, so that a name in a trace cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _plain(value: Any) -> str:
    return ranges(value) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _flat(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else NOTHING if value is None else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _ratio(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _moment(iso: str) -> str:
    return iso[:19].replace("T", " ")
