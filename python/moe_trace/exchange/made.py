"""What an export or an import made, and the places where it puts it: nothing half made has the name of a whole."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_trace.errors import TraceError
from moe_trace.units import count

Advance = Callable[[int], object]  # called with how many rows are done since the last call


def ignore(rows: int) -> None:
    """No progress is shown."""


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        path: of the file or the directory; None for a stream.
        rows: tokens, or, of counts, steps.
        problems: what is missing from it, a sentence each.
        notes: what to know about it, a sentence each.
    """

    path: Path | None
    rows: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Loaded:
    """What an import made.

    Attributes:
        path: of the trace.
        runs: names of the runs that it added.
        rows: tokens that are stored or, of counts, that are counted.
        requests: how many have a name.
        layers: the layers that have rows.
        lines: lines read of JSONL; of SGLang's counts, steps.
        skipped: malformed lines that were skipped.
        problems: what is missing from the trace, a sentence each. The trace repeats them.
        notes: what the log did not say, a sentence each. The trace's metadata repeat them.
    """

    path: Path
    runs: list[str] = field(default_factory=list)
    rows: int = 0
    requests: int = 0
    layers: tuple[int, ...] = ()
    lines: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [count(self.rows, "row"), count(len(self.layers), "layer"), count(self.requests, "request")]
        return f"{self.path}: {', '.join(parts)}, in {', '.join(self.runs)}"


def package(name: str, what: str) -> Any:
    """A package that only `what` needs. Raises TraceError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        root = name.partition(".")[0]
        why = "which is not installed" if error.name == root else f"which cannot be imported ({error})"
        raise TraceError(f"{what} needs {root}, {why}: pip install {root}") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`; the file has its own name once it is whole. A device or a pipe is written as
    it is.
    """
    if path.is_dir():
        raise TraceError(f"{path} is a directory: name a file to write")
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb"):
            pass
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new private directory beside `path`; what the caller has not moved away is removed at the end."""
    here = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent))
    try:
        yield here
    finally:
        shutil.rmtree(here, ignore_errors=True)
