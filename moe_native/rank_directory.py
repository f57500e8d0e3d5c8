"""Where a recorder writes: the run's and the rank's directory, and `rank.json` in it (csrc/FORMAT.md, section 1)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any


def make_rank_directory(trace: Path, rank: str, run: str | None = None) -> Path:
    """Make `TRACE/run-<utc>-<pid>/<rank>`, all of it mode 0700, and return it. `run` names the run instead, for ranks
    that share one.

    Raises:
        OSError: a directory cannot be made.
        ValueError: `rank` or `run` is not a plain name.
    """
    for name in (rank, run or "run"):
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"{name!r} is not a name for a directory")
    trace.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = run or f"run-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
    for attempt in range(1000):
        name = base if attempt == 0 else f"{base}-{attempt + 1}"
        directory = trace / name / rank
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            directory.mkdir(mode=0o700)
            return directory.resolve()
        except FileExistsError:
            continue  # a second recorder of this process in the same second
    raise FileExistsError(f"{trace} has a thousand runs named {base}")


def shared_run(trace: Path, key: str) -> str:
    """The name of the run that all processes with this `key` share, `run-<utc>-<key>`; the first of them makes it. Once
    a rank of it is closed it takes no further ones: those are a new run, as of workers that were started again.

    Raises:
        OSError: a directory cannot be made or read.
    """
    trace.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = DirectoryLock(trace)
    try:
        name = re.compile(rf"run-\d{{8}}T\d{{6}}Z-{re.escape(key)}(-\d+)?")
        for run in sorted((run for run in trace.iterdir() if name.fullmatch(run.name)), reverse=True):
            if not any(_closed(file) for file in run.glob("*/rank.json")):
                return run.name
        base = f"run-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{key}"
        for attempt in range(1000):
            run = trace / (base if attempt == 0 else f"{base}-{attempt + 1}")
            with contextlib.suppress(FileExistsError):
                run.mkdir(mode=0o700)
                return run.name
    finally:
        lock.release()
    raise FileExistsError(f"{trace} has a thousand runs named {base}")


def _closed(file: Path) -> bool:
    try:
        return json.loads(file.read_bytes()).get("closed") is True
    except (OSError, ValueError, AttributeError):  # it is being written, or a stranger's
        return False


def sweep_emptied_ranks(trace: Path) -> None:
    """Delete the directories of closed ranks whose segments retention has deleted. What cannot be deleted stays."""
    for file in trace.glob("run-*/*/rank.json"):
        rank = file.parent
        with contextlib.suppress(OSError, ValueError, AttributeError):
            emptied = not any(other.suffix in (".moe", ".open", ".ring") for other in rank.iterdir())
            if emptied and _closed(file):
                file.unlink()
                for left in ("command.json", "reply.json"):  # of a `ctl` that did not wait
                    (rank / left).unlink(missing_ok=True)
                rank.rmdir()
                rank.parent.rmdir()  # fails, as it should, while another rank is in it


class RankFile:
    """`rank.json`: who records what, and where the ring lies. Replaced as a whole, so that a reader never sees half of
    it.

    While it lives it holds a lock on the rank's directory. That is the sign of life that other containers and hosts
    see, where the owner's process id and its ring mean nothing; nobody recovers a rank that is locked.
    """

    def __init__(self, directory: Path, owner: dict[str, Any]) -> None:
        self.path = directory / "rank.json"
        self._lock = DirectoryLock(directory)
        self.run_id = secrets.token_bytes(16)
        self._content: dict[str, Any] = {
            "format": "moe-native rank",
            "version": 1,
            "run_id": self.run_id.hex(),
            "rank": directory.name,
            "owner": owner,
            "ring": None,
            "closed": False,
            "metadata": {},
        }

    def update(self, **items: Any) -> None:
        """Set top-level keys and write the file. Raises OSError."""
        self._content.update(items)
        handle, temporary = tempfile.mkstemp(prefix=".rank-", suffix=".json", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._content, file, indent=1)
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def release(self) -> None:
        """Nothing more will be written: anybody may touch the rank now."""
        self._lock.release()

    def sync(self) -> None:
        """Wait until the disk has the last segment, as it has those before: it survives a power cut then. Raises
        OSError."""
        for segment in sorted(self.path.parent.glob("*.moe"))[-1:]:
            handle = os.open(segment, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(handle)
            finally:
                os.close(handle)


class DirectoryLock:
    """`flock` on a directory. Where the file system has none, it does nothing, and nobody recovers from there."""

    def __init__(self, directory: Path) -> None:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.release = weakref.finalize(self, os.close, handle)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        _locks.add(self)


# A forked child has the same lock; it would keep it alive beyond the owner's death.
_locks: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.release() for lock in _locks])
