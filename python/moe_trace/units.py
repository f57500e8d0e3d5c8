"""Numbers of bytes and things, and moments, as users write and read them."""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str) -> int:
    """A size as users write it, in bytes: `67108864`, `64MiB`, `2 GiB`, `500MB`, `1.5G`.

    K, M, G and T are powers of 1000, with an `i` powers of 1024. Raises ValueError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write it as 67108864, 64MiB or 2GB")
    number, unit, binary = match.groups()
    power = "kmgt".index(unit.lower()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def format_bytes(count: float) -> str:
    """A number of bytes for a person to read, in powers of 1024 and three digits: `23.5 GiB`."""
    unit = 0
    while unit < len(UNITS) - 1 and count >= (1023.5 if unit else 1024):
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.3g} {UNITS[unit]}"


def count(number: int, noun: str) -> str:
    """A number of things: `1 step`, `1,200 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def unix_ns(when: datetime | str | float) -> int:
    """A moment in Unix nanoseconds: a datetime or an ISO time (local where they name no zone), or Unix seconds. Raises
    ValueError for what is no moment, TypeError for what is none of these.
    """
    try:
        moment = datetime.fromisoformat(when) if isinstance(when, str) else when
        if not isinstance(moment, datetime):
            seconds = math.floor(moment)
            return seconds * 10**9 + round((moment - seconds) * 1e9)
        delta = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{when!r} is no time: give Unix seconds, or an ISO time such as 2026-11-21T10:15") from None
    return (delta.days * 86400 + delta.seconds) * 10**9 + delta.microseconds * 1000


def since(when: str) -> int:
    """The moment that is `30s`, `10m`, `2h`, `1d` ago, or that an ISO time names, in Unix nanoseconds. Raises
    ValueError for anything else.
    """
    age = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", when)
    try:
        return unix_ns(time.time() - float(age[1]) * SECONDS[age[2]] if age else when)
    except ValueError:
        raise ValueError(
            f"{when!r} is no time: write 30s, 10m, 2h, 1d or an ISO time such as 2026-11-21T10:15"
        ) from None
