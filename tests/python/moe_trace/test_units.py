"""Sizes and moments as users write them, and as they read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from moe_trace import units
from moe_trace.units import format_bytes, parse_bytes, since, unix_ns


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


def test_moments():
    moment = datetime(2026, 11, 21, 10, 15, 0, 250_000, tzinfo=UTC)
    ns = 1_795_256_100_250_000_000
    zone = timezone(timedelta(hours=9))
    for when in (
        moment,
        moment.astimezone(zone),
        "2026-11-21T10:15:00.25Z",
        "2026-11-21T19:15:00.25+09:00",
        1_795_256_100.25,
    ):
        assert unix_ns(when) == ns
    assert unix_ns(moment.astimezone().replace(tzinfo=None)) == ns, "local where no zone is named"


@pytest.mark.parametrize("when", ["", "yesterday", "25:00", float("nan"), float("inf"), datetime.min])
def test_no_moments(when):
    with pytest.raises(ValueError, match="is no time"):
        unix_ns(when)


def test_ages(monkeypatch):
    monkeypatch.setattr(units.time, "time", lambda: 1000.0)
    assert [since(text) for text in ("30s", " 1.5 m ", "2h", "1d")] == [
        (1000 - seconds) * 10**9 for seconds in (30, 90, 7200, 86400)
    ]
    assert since("1970-01-01T00:00:07Z") == 7 * 10**9
    for text in ("soon", "10", "-3s", "9" * 400 + "d"):
        with pytest.raises(ValueError, match="30s, 10m, 2h, 1d"):
            since(text)
