"""Does the process that owns a rank still live? csrc/RING.md, section 4."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A reader that looks whether the owner lives holds its directory for a moment: so it is tried again, in seconds.
_TRIES = (0.0, 0.01, 0.02, 0.03, 0.04)


def boot_id() -> str:
    """Of this machine since its last start; empty where it is not told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_lives(pid: int, start_ticks: int, boot: str) -> bool:
    """Whether the process that started at `start_ticks` of that boot still runs."""
    if boot and boot_id() and boot != boot_id():
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return start_ticks in (0, int(fields[19])) and fields[0] not in ("Z", "X")


def locked(file: int) -> bool:
    """Whether a process holds a POSIX lock on an open file: a ring's owner does while it lives."""
    probe = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(file, fcntl.F_GETLK, probe)
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def held(directory: Path) -> bool:
    """Whether a process holds a rank's directory: its owner until it has closed it, or a recovery. This sign of life
    can be seen wherever the trace can, from another container too. False where the file system does not tell.
    """
    try:
        with _flock(directory, fcntl.LOCK_SH) as free:
            return not free
    except OSError:
        return False


@contextmanager
def hold(directory: Path) -> Iterator[bool]:
    """Hold a rank's directory, as its owner does while it lives. False where another process holds it. Raises OSError
    where it cannot be told whether one does.
    """
    for pause in _TRIES:
        time.sleep(pause)
        with _flock(directory, fcntl.LOCK_EX) as mine:
            if mine:
                yield True
                return
    yield False


@contextmanager
def _flock(directory: Path, kind: int) -> Iterator[bool]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise OSError(error.errno, f"it cannot be locked ({error.strerror}), so its owner may live") from None
        try:
            yield True
        finally:
            # Closing is not enough: a child that was forked meanwhile has the same lock.
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
