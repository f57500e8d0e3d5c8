"""Sizes as users write them, and as they read them."""

from __future__ import annotations

import pytest

from moe_trace.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("67108864", 64 << 20),
        ("64MiB", 64 << 20),
        ("2 GiB", 2 << 30),
        ("500MB", 5 * 10**8),
        ("1.5g", 15 * 10**8),
    ],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1e9", "GiB", "12 parsecs", "1Ki B"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="64MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1_048_575, "1 MiB"),
        (64 << 20, "64 MiB"),
        (1000 << 20, "1000 MiB"),
        (int(23.47 * 2**30), "23.5 GiB"),
        (5 << 40, "5 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_sizes_to_read(count, text):
    assert format_bytes(count) == text
