"""Where a recorder writes: the run's and the rank's directory, and `rank.json` in it (csrc/FORMAT.md, section 1)."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
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


class RankFile:
    """`rank.json`: who records what, and where the ring lies. Replaced as a whole, so that a reader never sees half of
    it."""

    def __init__(self, directory: Path, owner: dict[str, Any]) -> None:
        self.path = directory / "rank.json"
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
