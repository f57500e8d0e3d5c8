"""Numbers of bytes, as users write and read them."""

from __future__ import annotations

import re

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


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
