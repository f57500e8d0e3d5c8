"""How the command line tells a person what differs: tables from the object of `moe_trace.compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from moe_trace.show import NOTHING, hang, line, ranges
from moe_trace.units import count

EXPLAINED = (
    "moved: the share of assignments that go to other experts in B; by chance: the same where requests are shuffled",
    "between A and B, which gives as much with probability p; experts: how many have another share. [95 % intervals]",
)


def compared(out: Console, of: Mapping[str, Any]) -> None:
    """Print the object of `moe_trace.compare`."""
    for side in "ab":
        one = of[side]
        whole = "" if one["complete"] else ", not whole"
        rows = f"{count(one['rows'], 'row')} of {count(one['requests'], 'request')}{whole}"
        hang(out, line(f"{side.upper()}  {one['path']}   {rows}", "" if one["complete"] else "yellow"), 3)
    asked = [f"{key} {value}" for key, value in of["selection"].items() if value is not None]
    if asked:
        hang(out, line(f"selected: {', '.join(asked)}"), 10)
    out.print()
    out.print(_loads(of["layers"]))
    out.print()
    for text in EXPLAINED:
        out.print(line(text, "dim"))
    for part in _flips(of):
        out.print(part)
    out.print()
    for side, layers in (("A", of["only_a"]), ("B", of["only_b"])):
        if layers:
            hang(out, line(f"note      layer {ranges(layers)} is only in {side}", "yellow"), 10)
    for note in of["notes"]:
        hang(out, line(f"note      {note}", "yellow"), 10)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _loads(layers: Iterable[Mapping[str, Any]]) -> Table:
    table = _table(
        "layer", "moved", "by chance", "p", "entropy A", "B - A", "max/mean A", "B - A", "experts", "most changed"
    )
    for layer in layers:
        distance, entropy, imbalance = (layer[key] for key in ("distance", "normalized_entropy", "imbalance"))
        most = layer["top"][0] if layer["top"] else None
        change = NOTHING
        if most is not None:
            change = f"{most['expert']}: {_percent(most['a'])} → {_percent(most['b'])} {_range(most, _points)}"
        table.add_row(
            str(layer["layer"]),
            _percent(distance["difference"]),
            _percent(distance["chance"]),
            _digits(distance["p"], 3),
            _digits(entropy["a"], 4),
            f"{_signed(entropy['difference'], 4)} {_range(entropy, lambda end: _signed(end, 4))}",
            _digits(imbalance["a"], 2),
            f"{_signed(imbalance['difference'], 2)} {_range(imbalance, lambda end: _signed(end, 2))}",
            f"{layer['changed_experts']}/{layer['experts']}",
            change,
        )
    return table


def _flips(of: Mapping[str, Any]) -> Iterator[RenderableType]:
    aligned = of["aligned"]
    if aligned is None:
        return
    yield line("")
    places = f"{count(aligned['rows'], 'position')} of {count(aligned['requests'], 'request')}"
    yield line(f"aligned: {places} that both have", "bold")
    layers = [(layer["layer"], layer["flips"]) for layer in of["layers"] if layer["flips"] and layer["flips"]["all"]]
    ties = any(flips["all"]["near"] is not None for _, flips in layers)
    phases = [phase for phase in ("prefill", "decode") if any(flips[phase] for _, flips in layers)]
    columns = ["layer", *(f"{phase}: choices that differ" for phase in phases), "rows that differ"]
    table = _table(*columns, *(("near-ties", "others", "not known") if ties else ()))
    for layer, flips in layers:
        whole = flips["all"]
        cells = [_rate(flips[phase]) for phase in phases]
        cells.append(f"{whole['changed']:,} of {whole['rows']:,}")
        if ties:
            said = [whole[key] for key in ("near", "real", "unknown")]
            cells += [NOTHING if number is None else f"{number:,}" for number in said]
        table.add_row(str(layer), *cells)
    yield table
    tokens = aligned["tokens"]["all"]
    if tokens:
        yield line(f"tokens of which any layer differs: {tokens['changed']:,} of {tokens['rows']:,}, {_rate(tokens)}")


def _rate(of: Mapping[str, Any] | None) -> str:
    return NOTHING if of is None else f"{_percent(of['rate'])} {_range(of, _percent)}"


def _range(of: Mapping[str, Any], written: Callable[[float], str]) -> str:
    return "" if of["low"] is None or of["high"] is None else f"[{written(of['low'])}, {written(of['high'])}]"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2f}%"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _digits(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:+.{digits}f}"
