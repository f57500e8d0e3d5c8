"""The settings of a recording, from `MOE_NATIVE_*` variables and from `moe_native` in vLLM's additional config.

The additional config wins, key by key: it names one engine, the environment is everybody's. `moe_trace.settings` has
the table of names, meanings and defaults; this file gives them types.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_trace import settings
from moe_trace.units import format_bytes, parse_bytes

FIELDS = ("ids", "weights", "logits", "hidden", "tokens")
COUNTS = ("counts",)  # instead of them: statistics and no rows
_LAYER_LIMIT = 0xFFFF


class ConfigError(ValueError):
    """A setting that cannot be used. The message names it, its value, and what would be right."""


@dataclass(frozen=True)
class Config:
    """What to record and where. `trace` is None when there is to be no trace; then, with `capture`, what is captured is
    recorded all the same."""

    trace: Path | None = None
    fields: tuple[str, ...] = ("ids", "weights")
    layers: tuple[int, ...] | None = None  # the model's own indices; None: all
    max_bytes: int | None = None
    ring_bytes: int = 64 << 20
    ring_dir: Path | None = None
    overflow: str = "drop"
    weights_dtype: str = "float16"
    flush_seconds: float = 10.0
    sample: float = 1.0
    capture: bool = False

    @classmethod
    def parse(cls, environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> Config:
        """Settings from the environment's `MOE_NATIVE_*` variables, with `overrides` (keys as in `settings.SETTINGS`)
        on top.

        A value that is empty or None counts as not set. Overrides may be strings, as in the environment, or the
        natural JSON types: numbers for sizes and seconds, lists for fields and layers.

        Raises:
            ConfigError: a value is not usable, or a key of `overrides` is not a setting.
        """
        overrides = overrides or {}
        keys = [setting.key for setting in settings.SETTINGS]
        for key in overrides:
            if key not in keys:
                near = difflib.get_close_matches(str(key), keys, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(keys)}"
                raise ConfigError(f"{key!r} under moe_native in the additional config is not a setting: {hint}")
        given: list[tuple[str, str, Any]] = []
        for setting in settings.SETTINGS:
            if setting.key in overrides:
                where = f"{setting.key!r} under moe_native in the additional config"
                given.append((setting.key, where, overrides[setting.key]))
            else:
                given.append((setting.key, setting.name, environment.get(setting.name)))
        return cls._typed(given)

    @classmethod
    def of_arguments(cls, **arguments: Any) -> Config:
        """Settings by their keys, as `Recorder` is given them, in any form that `parse` knows. None: not set.

        Raises:
            ConfigError: a value is not usable.
        """
        return cls._typed([(key, key, value) for key, value in arguments.items()])

    @classmethod
    def _typed(cls, given: Iterable[tuple[str, str, Any]]) -> Config:
        values: dict[str, Any] = {}
        for key, where, value in given:
            if value is None or value is False or (isinstance(value, str) and not value):
                continue
            try:
                values[key] = _PARSERS[key](value)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{where} is {value!r}: {error}") from None
        return cls(**values)

    def recorder_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `moe_native.Recorder`, its path and `capture` left out."""
        return {
            "fields": self.fields,
            "layers": self.layers,
            "max_bytes": self.max_bytes,
            "ring_bytes": self.ring_bytes,
            "ring_dir": self.ring_dir,
            "overflow": self.overflow,
            "weights_dtype": self.weights_dtype,
            "flush_seconds": self.flush_seconds,
            "sample": self.sample,
        }


def _parts(value: Any) -> list[Any]:
    if hasattr(value, "tolist"):  # an array's or a tensor's numbers as Python's own
        value = value.tolist()
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, Iterable):
        return list(value)
    return [value]


def _path(value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("it must be a directory's name")
    return Path(value).expanduser()


def _directory(value: Any) -> Path:
    path = _path(value)
    if not path.is_dir():
        raise ValueError("there is no such directory")
    return path


def _fields(value: Any) -> tuple[str, ...]:
    names = [str(part).lower() for part in _parts(value)]
    if isinstance(value, str) and not names:
        raise ValueError("no field is named; leave it unset for the default")
    if COUNTS[0] in names:
        if set(names) != set(COUNTS):
            raise ValueError("counts stands alone: it keeps statistics and no rows, so there is no column beside it")
        return COUNTS
    for name in names:
        if name not in FIELDS:
            raise ValueError(f"{name!r} is not a field; use some of {', '.join(FIELDS)}, or counts alone")
    return tuple(name for name in FIELDS if name in names or name == "ids")


def _layers(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, str) and value == "all":
        return None
    layers: set[int] = set()
    for part in _parts(value):
        first, dash, last = str(part).partition("-")
        if isinstance(part, bool) or not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise ValueError(f"{part!r} is not a layer or a range of layers; write them as in 0,4-7")
        low, high = int(first), int(last) if dash else int(first)
        if low > high or high >= _LAYER_LIMIT:
            raise ValueError(f"{part!r} is not a range of layers between 0 and {_LAYER_LIMIT - 1}")
        layers.update(range(low, high + 1))
    if not layers:
        raise ValueError("no layer is named; leave it unset to record all")
    return tuple(sorted(layers))


def _bytes(least: int, most: int = 1 << 63) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        size = value if isinstance(value, int) and not isinstance(value, bool) else parse_bytes(str(value))
        if size < least:
            raise ValueError(f"at least {format_bytes(least)} is needed")
        if size > most:
            raise ValueError(f"at most {format_bytes(most)} is possible")
        return size

    return parse


def _choice(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        name = str(value).lower()
        if name not in choices:
            raise ValueError(f"use {' or '.join(choices)}")
        return name

    return parse


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise ValueError("it must be a number of seconds above 0, and not more than a day")
    return seconds


def _share(value: Any) -> float:
    try:
        share = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError("it must be a share of the requests from 0 to 1, such as 0.01")
    return share


def _switch(value: Any) -> bool:
    name = str(value).lower()
    if name not in ("0", "1", "true", "false"):
        raise ValueError("use 1 or 0")
    return name in ("1", "true")


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "trace": _path,
    "fields": _fields,
    "layers": _layers,
    "max_bytes": _bytes(1 << 20),
    "ring_bytes": _bytes(64 << 10, 1 << 30),
    "ring_dir": _directory,
    "overflow": _choice("drop", "block"),
    "weights_dtype": _choice("float16", "exact"),
    "flush_seconds": _seconds,
    "sample": _share,
    "capture": _switch,
}
