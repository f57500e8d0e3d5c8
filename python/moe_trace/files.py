"""Opening files that a stranger may have put there: plain files only, so that a pipe or a device does not hang the
reader.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_plain(path: Path) -> Iterator[int]:
    """A descriptor of a plain file, to read. Raises OSError, for what is no plain file too."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is no plain file")
        yield handle
    finally:
        os.close(handle)


def mapped(handle: int) -> memoryview:
    """All of an open file. The view stays valid when the file is deleted."""
    if os.fstat(handle).st_size == 0:
        return memoryview(b"")
    return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))


def read_plain(path: Path, most: int) -> bytes:
    """The content of a small plain file. Raises OSError, for one of more than `most` bytes too."""
    with open_plain(path) as handle:
        if os.fstat(handle).st_size > most:
            raise OSError(f"{path} is larger than it can be")
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read(most + 1)
