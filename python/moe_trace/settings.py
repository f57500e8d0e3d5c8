"""The environment settings of moe_native: names, meanings and defaults, as plain data.

This is the one table of them. `moe_native.config` parses the values, `moe-native doctor` reports unknown names, and the
README's table is checked against it. It needs nothing but the standard library, so that both packages can use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from moe_trace.units import parse_bytes as parse_bytes  # how a setting that is a size is written


class Setting(NamedTuple):
    """One environment variable. `key` is its name under `moe_native` in vLLM's `--additional-config`."""

    name: str
    key: str
    meaning: str
    default: str  # as a user would write it; empty: not set


PREFIX = "MOE_NATIVE_"

SETTINGS: tuple[Setting, ...] = (
    Setting("MOE_NATIVE_TRACE", "trace", "directory of the trace; recording is on when it is set", ""),
    Setting(
        "MOE_NATIVE_FIELDS",
        "fields",
        "columns to record: ids, weights, logits, hidden, tokens; or counts: statistics and no rows",
        "ids,weights",
    ),
    Setting("MOE_NATIVE_LAYERS", "layers", "layers to record, as in 0,4-7; all when not set", ""),
    Setting("MOE_NATIVE_MAX_BYTES", "max_bytes", "room for the whole trace; the oldest segments are deleted", ""),
    Setting(
        "MOE_NATIVE_RING_BYTES",
        "ring_bytes",
        "size of the ring in memory, up to 1 GiB, for each recording process",
        "64MiB",
    ),
    Setting("MOE_NATIVE_RING_DIR", "ring_dir", "where the ring lies", "/dev/shm"),
    Setting("MOE_NATIVE_OVERFLOW", "overflow", "when the ring is full: drop (count the loss) or block (wait)", "drop"),
    Setting("MOE_NATIVE_WEIGHTS_DTYPE", "weights_dtype", "how weights are stored: float16 or exact", "float16"),
    Setting("MOE_NATIVE_FLUSH_SECONDS", "flush_seconds", "how old a row gets before readers can see it", "10"),
    Setting(
        "MOE_NATIVE_SAMPLE", "sample", "share of requests whose rows are stored, 0 to 1; all rows are counted", "1"
    ),
    Setting("MOE_NATIVE_CAPTURE", "capture", "1: prompts can be captured, also without a trace", ""),
)

# Read by the build, not by a recorder; doctor must not take it for a typing error.
BUILD_VARIABLES: tuple[str, ...] = ("MOE_NATIVE_READER_ONLY",)


def default(name: str) -> str:
    """The default of one setting, as a user would write it. Raises KeyError for a name that is not a setting."""
    for setting in SETTINGS:
        if setting.name == name:
            return setting.default
    raise KeyError(f"{name} is not a setting of moe_native")


def markdown() -> str:
    """The table of the README."""
    rows = [f"| `{s.name}` | {s.meaning} | {f'`{s.default}`' if s.default else 'not set'} |" for s in SETTINGS]
    return "\n".join(["| variable | meaning | default |", "|---|---|---|", *rows])


def unknown(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Variables that start like ours and are none of ours, each with the setting that was probably meant (or None)."""
    known = [setting.name.removeprefix(PREFIX) for setting in SETTINGS]
    strange: dict[str, str | None] = {}
    for name in sorted(environment):
        like = next((prefix for prefix in (PREFIX, "MOENATIVE_", "MOE_TRACE_") if name.startswith(prefix)), None)
        rest = name.removeprefix(like or "")
        if like is None or (like == PREFIX and rest in known) or name in BUILD_VARIABLES:
            continue
        near = difflib.get_close_matches(rest, known, n=1)  # without the prefix, which would make any two alike
        strange[name] = PREFIX + near[0] if near else None
    return strange
