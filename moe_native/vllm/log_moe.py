"""`VLLM_LOG_MOE=FILE.jsonl`: the routing of a program's engines as one file of JSON lines, there when the program ends.

For scripts that were written for a vLLM with a logger in its MoE layers. Their names work as they stand:

- `VLLM_LOG_MOE`: the file; recording is on when it is set (and not 0);
- `VLLM_LOG_MOE_LAYERS`, `VLLM_LOG_MOE_LAYER`, `VLLM_LOG_LAYER`: the layers, as in 0,4-7 or all; the first of them that
  is set counts, then `MOE_NATIVE_LAYERS`, then layer 0, as those loggers have it;
- `VLLM_NUM_MOE_LAYERS`: not needed, and not read.

Such loggers write a line for each token in the forward pass. Here the workers record a trace, in a hidden directory
beside the file, and the process that started the engines makes the file of it when it ends (`moe_trace.exchange.jsonl`
says what is in it). It does not hang on the engine's processes: what one that was killed had recorded is in the file.
That is the first process, from the program down to the worker, whose plugin sees the variable. It leaves a mark in its
environment, by which the processes below it know the trace, and that the file is not theirs to write. (Where vLLM
loaded its plugins before the variable was set, that process is the engine core.)

The trace goes once the file has everything that was to be recorded. Else it stays, and a line in the log says where it
is. So it does when the program itself was killed: then the next one that writes to the same file says so. A file that
is there already is not written over, but moved to FILE.1, FILE.2 and so on.

With `MOE_NATIVE_TRACE` the trace is the one that it names and stays there; the file has what this program recorded.
Other `MOE_NATIVE_*` settings hold as ever. Unless they say otherwise weights are exact, so that the four decimals of
the file are.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import logging
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING

from moe_native.config import Config, ConfigError
from moe_native.rank_directory import DirectoryLock

if TYPE_CHECKING:
    from moe_trace import Trace

log = logging.getLogger("moe_native")

FILE = "VLLM_LOG_MOE"
LAYERS = ("VLLM_LOG_MOE_LAYERS", "VLLM_LOG_MOE_LAYER", "VLLM_LOG_LAYER", "MOE_NATIVE_LAYERS")
MARK = "_MOE_NATIVE_LOG_MOE"
LABEL = "log_moe"  # in a rank's metadata: whose file it is for
PATIENCE = 15.0  # seconds that the engines' processes have to close their traces, once this process ends


@dataclass(frozen=True)
class Log:
    """One file to be written. `trace` is empty where it cannot be; `owner` is the name of who writes it."""

    value: str  # of VLLM_LOG_MOE
    file: str
    layers: str
    trace: str
    owner: str

    @property
    def hidden(self) -> bool:
        """Whether the trace is ours to remove, with the directory that it is in."""
        return Path(self.trace).parent.name.startswith(_hidden(Path(self.file)))

    @property
    def command(self) -> str:
        """What makes the file by hand."""
        layers = [] if self.hidden or self.layers == "all" else ["--layer", self.layers]
        return shlex.join(["moe-native", "export", self.trace, *layers, "--format", "jsonl", "-o", self.file])


def claim() -> Log | None:
    """The file that this process's engines record for, None where nobody asks for one. If no process above has claimed
    it, this one will write it when it ends."""
    value = os.environ.get(FILE, "")
    if value in ("", "0"):
        return None
    marked = json.loads(os.environ.get(MARK, "{}"))
    if marked.get("value") == value:
        return Log(**marked)
    try:
        claimed = _begin(value)
    except (ConfigError, OSError) as error:
        log.error("moe_native: %s=%s: nothing is recorded for it: %s", FILE, value, error)
        claimed = Log(value, value, "", "", "")  # for the processes below too
    os.environ[MARK] = json.dumps(asdict(claimed))
    return claimed


def environment() -> Mapping[str, str]:
    """The environment, with the settings that `VLLM_LOG_MOE` stands for where nothing else is set."""
    claimed = claim()
    if claimed is None or not claimed.hidden:
        return os.environ
    settings = {
        "MOE_NATIVE_TRACE": claimed.trace,
        "MOE_NATIVE_LAYERS": claimed.layers,
        "MOE_NATIVE_WEIGHTS_DTYPE": "exact",
    }
    return settings | {name: value for name, value in os.environ.items() if value}


def label() -> dict[str, str]:
    """For the metadata of a rank that is recorded now."""
    claimed = claim()
    return {LABEL: claimed.owner} if claimed is not None and claimed.trace else {}


def _begin(value: str) -> Log:
    file = Path(value).expanduser().resolve()
    if file.exists() and not file.is_file():
        raise ConfigError("it must name a file, to be written when the program ends")
    name = next((name for name in LAYERS if os.environ.get(name)), LAYERS[0])
    layers = os.environ.get(name) or "0"
    try:
        Config.of_arguments(layers=layers)
    except ConfigError as error:
        raise ConfigError(str(error).replace("layers", name, 1)) from None
    file.parent.mkdir(parents=True, exist_ok=True)
    _say_what_is_left(file)
    given = os.environ.get("MOE_NATIVE_TRACE")
    if given:
        trace, lock = Path(given).expanduser().resolve(), None
    else:
        directory = Path(tempfile.mkdtemp(prefix=_hidden(file), dir=file.parent))
        lock = DirectoryLock(directory)  # while it is held, nobody takes the directory for leavings
        trace = directory / "trace"  # not the directory itself, which the workers lock when they make their run
    begun = Log(value, str(file), layers, str(trace), secrets.token_hex(8))
    # Not atexit, which a child that multiprocessing forked does not run. This waits for the children first.
    Finalize(None, _finish, (begun, lock), exitpriority=-1)
    return begun


def _hidden(file: Path) -> str:
    return f".{file.name}.trace-"


def _say_what_is_left(file: Path) -> None:
    """Traces beside the file whose process was killed before it could write it, or that it kept because they are not
    whole."""
    from moe_trace.owner import held

    for left in sorted(file.parent.glob(glob.escape(_hidden(file)) + "*")):
        if not left.is_dir() or held(left):
            continue
        with contextlib.suppress(OSError):
            left.rmdir()  # nothing was recorded into it
            continue
        export = shlex.join(["moe-native", "export", str(left / "trace"), "--format", "jsonl", "-o", f"{file}.left"])
        log.warning("moe_native: %s is what an earlier run left: get its lines by '%s', or delete it", left, export)


def _finish(claimed: Log, lock: DirectoryLock | None) -> None:
    """When this process ends. Never raises."""
    from moe_native.vllm.worker import log_where_vllm_logs

    try:
        log_where_vllm_logs()  # not before: vLLM sets its log up after it has loaded its plugins
        kept = _write(claimed)
        if claimed.hidden and not kept:
            shutil.rmtree(
                Path(claimed.trace).parent, ignore_errors=True
            )  # what is left of it is said at the next start
    except BaseException as error:
        what = str(error) or type(error).__name__
        log.error("moe_native: %s was not written: %s. Make it with: %s", claimed.file, what, claimed.command)
    finally:
        if lock is not None:
            lock.release()


def _write(claimed: Log) -> bool:
    """Make the file, and say how whole it is. Returns whether its trace has to be kept."""
    import moe_trace

    trace = _recorded(claimed)
    deadline = time.monotonic() + PATIENCE
    while trace is not None and trace.state == "live" and time.monotonic() < deadline:
        time.sleep(0.1)
        trace = _recorded(claimed)
    if trace is None:
        said = "nothing was recorded. If an engine ran, its log says why, and 'moe-native doctor'"
        log.warning("moe_native: %s was not written: %s", claimed.file, said)
        return False
    if trace.state == "live":
        raise RuntimeError("a process still records for it")
    for run in trace.runs:
        moe_trace.recover(run.directory)
    trace = _recorded(claimed)
    assert trace is not None

    layers = Config.of_arguments(layers=claimed.layers).layers
    unseen = _unseen(trace, layers)
    if unseen and len(unseen) == len(layers or ()):
        log.error("moe_native: %s was not written: %s", claimed.file, "; ".join(unseen))
        return False
    lines, flaws = _convert(trace, layers, Path(claimed.file))
    named = "all layers" if layers is None else f"layers {claimed.layers}" if len(layers) > 1 else f"layer {layers[0]}"
    log.info("moe_native: %s has %s lines of %s", claimed.file, f"{lines:,}", named)
    flaws = unseen + flaws + _flaws(trace)
    if flaws:
        where = f"the trace stays: moe-native summary {shlex.quote(claimed.trace)}"
        log.warning("moe_native: %s is not whole: %s; %s", claimed.file, "; ".join(flaws), where)
    return bool(flaws)


def _recorded(claimed: Log) -> Trace | None:
    """What was recorded for this file, of the trace's runs; None for nothing."""
    import moe_trace
    from moe_trace.errors import NotATrace, TraceNotFound

    try:
        found = moe_trace.open(claimed.trace)
    except (NotATrace, TraceNotFound):
        return None
    runs = [run for run in found.runs if any(rank.metadata.get(LABEL) == claimed.owner for rank in run.ranks)]
    return moe_trace.Trace(found.path, runs) if runs else None


def _unseen(trace: Trace, layers: tuple[int, ...] | None) -> list[str]:
    """Why asked layers were not recorded, a sentence each."""
    ledger = {entry.layer: entry for entry in trace.coverage}
    said = []
    for layer in layers or ():
        entry = ledger.get(layer)
        if entry is None:
            which = f"those are {', '.join(map(str, ledger))}: name some in {LAYERS[0]}" if ledger else "it has none"
            said.append(f"layer {layer} is no MoE layer of this model ({which})")
        elif not entry.recorded:
            said.append(f"layer {layer} was {entry.status}: {entry.detail or 'no reason is given'}")
    return said


def _flaws(trace: Trace) -> list[str]:
    """What keeps the file from having every row, a sentence each."""
    said = [f"rows were lost ({cause})" for cause in trace.losses] + trace.problems
    if trace.executed_rows > trace.stored_rows:
        said.append(f"{trace.stored_rows:,} of {trace.executed_rows:,} rows are stored")
    if trace.deleted_segments:
        said.append("the oldest rows were deleted, as MOE_NATIVE_MAX_BYTES asks")
    if trace.paused.steps:
        said.append(f"recording was paused for {trace.paused.steps:,} steps")
    return said


def _convert(trace: Trace, layers: tuple[int, ...] | None, file: Path) -> tuple[int, list[str]]:
    """Put the trace's rows into the file, under its name only when it is whole. Returns how many lines of rows it has,
    and what could not be read."""
    from moe_trace.exchange import jsonl

    asked = {entry.layer: entry.top_k for entry in trace.coverage if layers is None or entry.layer in layers}
    there = [layer for layer in trace.layers if layer in asked]
    problems: list[str] = []
    pieces: Iterable[tuple[str, int]] = jsonl.jsonl(trace, trace.layer(there), problems)
    if not there:  # no token was executed
        pieces = [(jsonl.meta_line(trace.metadata, asked) + "\n", 0)]
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    lines = -1  # the first one describes the model
    try:
        with part.open("x", encoding="utf-8") as out:
            for text, _ in pieces:
                out.write(text)
                lines += text.count("\n")
            out.flush()
            os.fsync(out.fileno())  # the trace is going to be removed
        _put_in_place(part, file)
    finally:
        part.unlink(missing_ok=True)
    return lines, problems


def _put_in_place(part: Path, file: Path) -> None:
    """Give the file its name; what has that name already gets another one, also when several programs end at once."""
    while True:
        try:
            os.link(part, file)  # fails, unlike a rename, where there is one
            return
        except FileExistsError:
            _move_aside(file)
        except OSError:  # a file system without links: only there another program could come in between
            if file.exists():
                _move_aside(file)
            part.replace(file)
            return


def _move_aside(file: Path) -> None:
    for number in itertools.count(1):
        aside = Path(f"{file}.{number}")
        try:
            aside.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            file.replace(aside)
            log.warning("moe_native: %s was there already: it is %s now", file, aside)
        except FileNotFoundError:  # another program was quicker
            aside.unlink()
        return
