"""The lines of routing logs, as this package and others write them (`exchange.jsonl` has the schema).

What logs differ in, and is read all the same: there may be no meta line, or further keys; `type` may be missing from a
line that has `topk_ids`; `layer` may be missing where the meta line names one layer; `req_id` may be a number; and
whatever is null may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_trace import format as fmt

MOST_BYTES = 1 << 20  # of a line
INVALID = 0xFFFF  # an id that is no expert's
_MOST_POSITION = fmt.NOBODY - 1
_JSON = json.JSONDecoder(parse_constant=lambda _: None)  # NaN and infinities, which JSON does not have, are null
_INTEGERS, _FLOATS = {int}, {float}


class Route(NamedTuple):
    """One line: the routing of one token in one layer.

    Attributes:
        run, request: names; None where unknown.
        at: `token_idx`; -1 where unknown.
        ids: of experts; 65535 for one that is none.
        weights: beside them, NaN for one that is null; None where there are none.
    """

    run: str | None
    request: str | None
    at: int
    layer: int
    ids: list[int]
    weights: list[float] | None


class Malformed(ValueError):
    """A line cannot be read; the message says why."""


def lines_of(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of a file, from 1 on; None for a line that is longer than any should be. Empty lines are left
    out.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_BYTES):
            number += 1
            if len(line) == MOST_BYTES and not line.endswith(b"\n"):
                while (more := file.readline(MOST_BYTES)) and not more.endswith(b"\n"):
                    pass
                yield number, None
            elif not line.isspace():
                yield number, line


class Reader:
    """Reads the lines of one file after the other.

    Args:
        experts: how many a layer has; None where unknown until a meta line says it.

    Attributes:
        meta: what the meta lines say, the first of several values.
        experts: of each layer, or None.
    """

    def __init__(self, experts: int | None) -> None:
        self.meta: dict[str, Any] = {}
        self.experts = experts
        self._told = experts is not None
        self._only_layer: int | None = None  # where the file's meta line names one

    def begin(self) -> None:
        """A file begins."""
        self._only_layer = None

    def read(self, line: bytes | None) -> Route | None:
        """One line; None for a meta line. Raises Malformed."""
        if line is None:
            raise Malformed(f"it is longer than {MOST_BYTES:,} bytes")
        try:
            item = _JSON.decode(line.decode("utf-8-sig").strip())
        except json.JSONDecodeError as error:
            what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            raise Malformed(f"it is no JSON ({what})") from None
        except (ValueError, RecursionError) as error:
            raise Malformed(f"it is no JSON ({error})") from None
        if not isinstance(item, dict):
            raise Malformed("it is no JSON object")
        kind = item.get("type", "route" if "topk_ids" in item else None)
        if kind == "route":
            return self._route(item)
        if kind != "meta":
            raise Malformed(f"its type is {json.dumps(kind)}, neither meta nor route")
        self._read_meta(item)
        return None

    def _read_meta(self, item: dict[str, Any]) -> None:
        layers = item.get("layers_logged")
        if isinstance(layers, list) and len(layers) == 1 and _whole(layers[0]):
            self._only_layer = layers[0]
        old, new = self.meta.get("model_id"), item.get("model_id")
        if old is not None and new is not None and old != new:
            raise Malformed(f"it is of the model {new!r}, and what came before of {old!r}: import them apart")
        said: Any = item.get("num_experts")
        if not self._told and _whole(said) and 0 < said < INVALID:
            self.experts = said
        self.meta = item | {key: value for key, value in self.meta.items() if value is not None}

    def _route(self, item: dict[str, Any]) -> Route:
        layer: Any = item.get("layer", self._only_layer)
        if not _whole(layer) or not 0 <= layer < fmt.NO_LAYER:
            raise Malformed(f"its layer is {json.dumps(layer)}, and should be a number from 0 to {fmt.NO_LAYER - 1}")
        ids = item.get("topk_ids")
        if not isinstance(ids, list) or not ids:
            raise Malformed("it has no list topk_ids")
        most = INVALID - 1 if self.experts is None else self.experts - 1
        if set(map(type, ids)) != _INTEGERS or min(ids) < 0 or max(ids) > most:
            ids = [INVALID if e is None or (e == -1 and _whole(e)) else self._expert(e, most) for e in ids]
        at: Any = item.get("token_idx")
        if at is None or (at == -1 and _whole(at)):
            at = -1
        elif not _whole(at) or not 0 <= at <= _MOST_POSITION:
            raise Malformed(f"its token_idx is {json.dumps(at)}, and should be a number from 0 on")
        weights = item.get("topk_weights")
        return Route(
            _name(item.get("run"), "run"), _name(item.get("req_id"), "req_id"), at, layer, ids,
            None if weights is None else _weights(weights, len(ids)),
        )  # fmt: skip

    def _expert(self, value: Any, most: int) -> int:
        if not _whole(value):
            raise Malformed(f"topk_ids has {json.dumps(value)}, which is no number of an expert")
        if not 0 <= value <= most:
            raise Malformed(f"topk_ids has {value}, and experts are numbered from 0 to {most}")
        return int(value)


def _weights(weights: Any, k: int) -> list[float]:
    if not isinstance(weights, list) or len(weights) != k:
        raise Malformed(f"topk_weights is no list of {k} numbers, as many as topk_ids has")
    if set(map(type, weights)) != _FLOATS:
        if any(w is not None and type(w) not in (int, float) for w in weights):
            raise Malformed("topk_weights has something that is no number")
        try:
            return [float("nan") if w is None else float(w) for w in weights]
        except OverflowError:
            raise Malformed("topk_weights has a number that is too large") from None
    return weights


def _name(value: Any, key: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed(f"its {key} is no text: half of a surrogate pair") from None
        return value
    if _whole(value):
        return str(value)
    raise Malformed(f"its {key} is {json.dumps(value)}, and should be a name")


def _whole(value: Any) -> bool:
    return type(value) is int  # a bool is none
