"""The page: its parts from the files beside this one, with what is said and drawn in their places."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_trace.report import data as numbers
from moe_trace.report import findings, recorded
from moe_trace.summary import standing, summarize
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_trace import Selection, Trace

WORDS = {
    "share": "An expert's assignments over all assignments of its layer. A token has k assignments, one for each "
    "expert that it is sent to.",
    "even load": "1/E of the assignments of a layer with E experts.",
    "max/mean": "The load of the busiest expert over the mean load of its layer: 1 is even, E is one expert for all.",
    "normalised entropy": "-Σ p ln p / ln E over the shares p: 1 is even, 0 is one expert for all.",
    "effective experts": "exp(-Σ p ln p): how many experts of equal load are as even.",
    "Gini coefficient": "Half the mean difference of the loads of two experts over the mean load: 0 is even.",
    "CV": "The standard deviation of the loads over their mean (of all experts, ddof 0): 0 is even.",
    "dead experts": "Experts that no token chose.",
    "assignments that differ": "Half the sum of |p - q| over the experts (total variation distance): the share of the "
    "assignments that one of the two gives to other experts than the other does.",
    "together, by chance": "As many tokens as would choose both experts if each were chosen as often as it is, "
    "independently of the others but never twice by a token (quasi-independence).",
}
COLUMNS: tuple[tuple[str, str, str], ...] = (  # heading, key in a layer of the summary, format
    ("layer", "layer", "d"),
    ("tokens", "rows", ",d"),
    ("experts", "experts", "d"),
    ("top expert", "top", ""),
    ("its share", "top_share", ".2%"),
    ("max/mean", "imbalance", ".3f"),
    ("normalised entropy", "normalized_entropy", ".4f"),
    ("effective experts", "effective_experts", ".1f"),
    ("Gini", "gini", ".4f"),
    ("CV", "cv", ".4f"),
    ("dead", "dead_experts", "d"),
)


def build(
    trace: Trace,
    selection: Selection,
    asked: Mapping[str, Any] | None = None,
    *,
    jobs: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> str:
    """The report of a selection of a trace: an HTML page, to be written as UTF-8.

    asked: what the user selected by (`moe_trace.summary`), to be said in the page; jobs: as of `analysis.fill`;
    progress: called with a number of rows each time that so many more are done. All are done twice: counted over time,
    and read.

    Block statistics are all that most of it needs; rows are read, block by block, for the pairs of experts of one layer
    and for the test of prefill against decode. Raises TraceError where the trace cannot be read.
    """
    summary, counts = summarize(trace, selection, asked or {})
    data = numbers.gather(selection, summary["layers"], counts, summary["stored_rows"] > 0, jobs, progress)
    name = summary["model"] or Path(summary["path"]).name
    summary.update(standing(trace))  # again: some damage is found where rows are read
    facts = [*recorded.lines(summary, trace.metadata), *(("damage", text, "bad") for text in data.damage)]
    verdict, level = _verdict(summary, bool(data.damage))
    script = "\n" + _file("charts.js") + _file("page.js")
    style = "\n" + _file("page.css")
    parts = {
        "title": escape(f"Routing of {name}"),
        "policy": escape(_policy(script, style)),
        "style": style,
        "script": script,
        "data": _json(data.object()),
        "verdict": escape(verdict),
        "verdict_class": level,
        "about": escape(_about(summary)),
        "recorded": "\n".join(_fact(*fact) for fact in facts),
        "findings": "\n".join(f"<li>{escape(text)}</li>" for text in findings.sentences(summary, data)),
        "care": escape(findings.CARE),
        "layers": _table(data.layers),
        "phases": escape(data.why.get("phases") or findings.difference(data.test)),
        "time": escape(data.why.get("time", "")),
        "pairs": escape(data.why.get("pairs") or _of_pairs(data)),
        "words": "\n".join(f"<dt>{escape(word)}</dt><dd>{escape(what)}</dd>" for word, what in WORDS.items()),
        "made": escape(_made()),
    }
    # In one pass, so that what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    """No request to anywhere, and no script or style but these, whatever a name in the trace may contain."""
    allowed = " ".join(f"{kind}-src '{_hash(text)}';" for kind, text in (("script", script), ("style", style)))
    return f"default-src 'none'; {allowed} base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that cannot end the element it is in: no `<`, `>` or `&`, only ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _verdict(summary: Mapping[str, Any], damaged: bool) -> tuple[str, str]:
    if damaged or not summary["complete"]:
        return "This trace is not whole: what is missing is said below.", "bad"
    said = "Nothing that was to be recorded is missing"
    said += ", but for the oldest segments, which were deleted" if summary["deleted_segments"] else ""
    if summary["state"] != "closed":
        state = "is still being recorded" if summary["state"] == "live" else "was left by a process that died"
        return f"{said} so far. The trace {state}.", "note"
    return f"{said}.", "good"


def _about(summary: Mapping[str, Any]) -> str:
    parts = [str(summary["path"])]
    if summary["first_time"]:
        first, last = (summary[key][:19].replace("T", " ") for key in ("first_time", "last_time"))
        parts.append(f"{first} to {last} UTC")
    parts.append(f"{summary['executed_rows']:,} tokens" if summary["executed_rows"] != 1 else "1 token")
    if summary["executed_rows"] > summary["stored_rows"]:
        parts.append(f"{summary['stored_rows']:,} of them stored")
    return " · ".join(parts)


def _fact(label: str, text: str, level: str) -> str:
    of = f' class="{level}"' if level else ""
    return f"<tr><th>{escape(label)}</th><td{of}>{escape(text)}</td></tr>"


def _table(layers: Sequence[Mapping[str, Any]]) -> str:
    names = any(layer["name"] for layer in layers)
    head = "".join(f"<th>{escape(heading)}</th>" for heading, _, _ in COLUMNS)
    head += '<th class="word">name</th>' if names else ""
    body = []
    for layer in layers:
        top = layer["top"][0]
        values = {**layer, "top": top["expert"], "top_share": top["share"]}
        cells = [_cell(values[key], form) for _, key, form in COLUMNS]
        cells += [f'<td class="word">{escape(layer["name"])}</td>'] if names else []
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(body)}</tbody>"


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return '<td data-value="">-</td>'
    return f'<td data-value="{value!r}">{value:{form}}</td>'


def _of_pairs(data: numbers.Data) -> str:
    assert data.pairs is not None
    least = f"layer {data.pairs['layer']}"
    least += ", the least even one" if len(data.layers) > 1 else ""
    pairs = len(data.pairs["upper"])
    few = pairs - data.pairs["looked_at"]
    return (
        f"Of {least}. {few:,} of {count(pairs, 'pair')} have too few tokens to say anything. Below the map are the "
        "pairs that are chosen together most beyond chance, the most surprising first."
    )


def _made() -> str:
    from moe_trace import __version__

    return f"Made by moe-native {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. This page loads nothing."
