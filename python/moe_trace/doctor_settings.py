"""What the doctor says of environment variables: settings, captures, and `VLLM_LOG_MOE`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moe_trace import settings
from moe_trace.finding import Finding

TRACE, CAPTURE = "MOE_NATIVE_TRACE", "MOE_NATIVE_CAPTURE"
ON, OFF = ("1", "true"), ("0", "false")

# As moe_native.vllm.log_moe reads them: of the layers the first one that is set counts, then MOE_NATIVE_LAYERS.
LOG = "VLLM_LOG_MOE"
LOG_LAYERS = ("VLLM_LOG_MOE_LAYERS", "VLLM_LOG_MOE_LAYER", "VLLM_LOG_LAYER")
LOG_NUMBER = "VLLM_NUM_MOE_LAYERS"
RECORDED_LAYERS = "MOE_NATIVE_LAYERS"
_RANGE = re.compile(r"(\d+)\s*(?:-\s*(\d+))?")


def check_settings(env: Mapping[str, str], refused: str = "") -> Iterator[Finding]:
    """Which settings are there, and which variables look like ours and are not? refused: what was said already of
    settings that the recorder cannot use.
    """
    strange = settings.unknown(env)
    for name, near in strange.items():
        todo = f"did you mean {near}?" if near else "the settings are listed in the README; remove it"
        yield Finding("warning", f"{name} is set, but is no setting of moe_native: it has no effect", todo)
    ours = sorted(
        setting.name for setting in settings.SETTINGS if env.get(setting.name) and setting.name not in refused
    )
    if ours and not strange:
        yield Finding("ok", f"settings: {', '.join(f'{name}={env[name]}' for name in ours)}")


def check_captures(env: Mapping[str, str], refused: str = "") -> Iterator[Finding]:
    """Can prompts be captured from the engines that are built here?"""
    value = env.get(CAPTURE, "")
    if not value or CAPTURE in refused:
        return
    if value.lower() in ON:
        yield Finding("ok", f"{CAPTURE}={value}: engines that are built here can be captured")
    elif value.lower() not in OFF:
        yield Finding("problem", f"{CAPTURE} is {value!r}: nothing is recorded, nor captured", "set it to 1 or 0")
    elif not env.get(TRACE):
        yield Finding(
            "warning",
            f"{CAPTURE}={value} forbids captures, also to programs that call moe_native.arm()",
            f"unset it, or set it to 1, to capture; an engine with {TRACE} can be captured all the same",
        )


def log_wanted(env: Mapping[str, str]) -> bool:
    """Whether engines record for a file of JSON lines."""
    return env.get(LOG, "") not in ("", "0")


def check_log(env: Mapping[str, str]) -> Iterator[Finding]:
    """Can the file of JSON lines be written that `VLLM_LOG_MOE` asks for, and of which layers?"""
    named = [name for name in LOG_LAYERS if env.get(name)]
    if not log_wanted(env):
        if idle := [name for name in (*named, LOG_NUMBER) if env.get(name)]:
            todo = f"set {LOG}=FILE.jsonl for a log of the routing, or unset what is not needed"
            yield Finding("warning", f"{LOG} is not set, so that of {', '.join(idle)} nothing comes", todo)
        return
    file = Path(env[LOG]).expanduser()
    standing = next(parent for parent in file.absolute().parents if parent.exists())
    chosen = next((name for name in (*named, RECORDED_LAYERS) if env.get(name)), "")
    layers = env.get(chosen) or "0"
    asked, recorded = parse_layers(layers), parse_layers(env.get(RECORDED_LAYERS) or "all")
    usable = True
    if file.exists() and not file.is_file():
        usable = False
        yield Finding("problem", f"{LOG}={file} is no file: nothing is recorded for it", "name a file; it is made")
    elif not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        usable = False
        yield Finding("problem", f"{LOG}={file}: {standing} cannot be written to", "choose another file")
    if asked is None:
        usable = False
        todo = "write layers as in 0,4-7, or all"
        yield Finding("problem", f"{chosen} is {layers!r}: nothing is recorded for {LOG}", todo)
    elif recorded and not (asked and asked <= recorded):
        which = ", ".join(map(str, sorted(asked - recorded))) or "all others"
        what = f"{RECORDED_LAYERS}={env[RECORDED_LAYERS]} leaves out layers that {LOG} is to have: {which}"
        yield Finding("warning", what, f"unset {RECORDED_LAYERS}, or name the layers there as well")
    for name in named[1:]:
        if env[name] != layers:
            yield Finding("warning", f"{name}={env[name]} has no effect: {chosen}={layers} counts", f"unset {name}")
    if usable:
        there = "; what is there now will be moved aside" if file.exists() else ""
        unread = f"; {LOG_NUMBER} is not needed, and not read" if env.get(LOG_NUMBER) else ""
        of = "all layers" if not asked else f"layer {layers}" + (f" ({chosen})" if chosen else ", as none is named,")
        yield Finding("ok", f"{LOG}={file} will have {of} when the program ends{there}{unread}")


def parse_layers(text: str) -> set[int] | None:
    """The layers that are named as in 0,4-7, as the recorder reads them; empty for all of them, None where it is no
    such list.
    """
    if text == "all":
        return set()
    layers: set[int] = set()
    for part in filter(None, map(str.strip, text.split(","))):
        found = _RANGE.fullmatch(part)
        if found is None or not int(found[1]) <= int(found[2] or found[1]) < 0xFFFF:
            return None
        layers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return layers or None
