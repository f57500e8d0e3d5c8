"""Does the process that owns a ring still live? csrc/RING.md, section 4."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path


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
    """Whether a process holds a POSIX lock on an open file: the sign of life that also works across containers."""
    probe = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(file, fcntl.F_GETLK, probe)
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)
