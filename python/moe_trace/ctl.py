"""`moe-native ctl`: steers recorders that run, through files in their directories. No connection to the server is made.

Each live rank gets a file `command.json`, which its recorder takes away within a second, and answers with `reply.json`
(the table of commands is in `moe_native.control`). Who may write into the rank's directory may do this: the user that
records, and root.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_trace.errors import TraceError
from moe_trace.files import read_plain
from moe_trace.trace import open as open_trace

COMMANDS = ("pause", "resume", "flush", "status", "set")
SETTINGS = ("fields", "layers", "sample")
_COMMAND, _REPLY = "command.json", "reply.json"
_LOOK_SECONDS = 0.02
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What a recorder said: its rank's directory, and its reply (`ok`, and `error` or how it stands)."""

    directory: Path
    reply: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        return self.reply.get("ok") is True


def send(path: str | Path, command: str, arguments: Mapping[str, Any], seconds: float = 10.0) -> list[Answer]:
    """Give a command to all recorders that write into a trace (or into one run or rank of it), and wait for their
    answers.

    Returns:
        One answer a live rank; of one that did not answer in `seconds`, an error that says so.

    Raises:
        TraceError: there is no trace, or nobody records into it.
        OSError: a command cannot be written.
    """
    ranks = [rank.directory for rank in open_trace(path).ranks if rank.live]
    if not ranks:
        raise TraceError(f"nobody records into {path} now: there is nothing to steer")
    waiting = {rank: _ask(rank, command, arguments) for rank in ranks}
    replies: dict[Path, Mapping[str, Any]] = {}
    end = time.monotonic() + seconds
    while waiting and time.monotonic() < end:
        for rank, id in list(waiting.items()):
            reply = _reply(rank, id)
            if reply is not None:
                replies[rank] = reply
                del waiting[rank]
        time.sleep(_LOOK_SECONDS if waiting else 0)
    for rank in waiting:
        with contextlib.suppress(OSError):  # it must not be done when nobody expects it any more
            (rank / _COMMAND).unlink()
        replies[rank] = {"ok": False, "error": f"no answer within {seconds:g} s: is its process stopped, or too busy?"}
    return [Answer(rank, replies[rank]) for rank in ranks]


def settings(words: list[str]) -> dict[str, str]:
    """The settings of `set`, from words such as `sample=0.1`. Raises ValueError."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in SETTINGS or not equals or not value:
            raise ValueError(f"{word!r} is no setting that can be changed: write {'=…, '.join(SETTINGS)}=…")
        found[name] = value
    if not found:
        raise ValueError(f"set what? Write {'=…, '.join(SETTINGS)}=…")
    return found


def line(reply: Mapping[str, Any]) -> str:
    """How a recorder stands, for a person."""
    layers = reply.get("layers")
    of = "all layers" if layers is None else f"layers {','.join(map(str, layers))}"
    fields = ",".join(map(str, reply.get("fields") or ()))
    rows, stored = (int(reply.get(key) or 0) for key in ("rows", "rows_stored"))
    written = f"{rows:,} rows written" + (f", {stored:,} of them stored" if stored < rows else "")
    lost = ", ".join(map(str, reply.get("lost") or ())) or "nothing"
    what = f"{reply.get('state')}: {fields} of {of}, sample {reply.get('sample'):g}"
    return f"{what}; {int(reply.get('steps') or 0):,} steps, {written}; lost {lost}"


def _ask(directory: Path, command: str, arguments: Mapping[str, Any]) -> str:
    id = secrets.token_hex(8)
    handle, temporary = tempfile.mkstemp(prefix=".command-", suffix=".json", dir=directory)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"id": id, "command": command, "arguments": dict(arguments)}, file)
            if os.geteuid() == 0:  # the recorder obeys its own user only
                os.fchown(file.fileno(), directory.stat().st_uid, -1)
        os.replace(temporary, directory / _COMMAND)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return id


def _reply(directory: Path, id: str) -> Mapping[str, Any] | None:
    """The answer to command `id`, which is then taken away; None while there is none."""
    path = directory / _REPLY
    try:
        reply = json.loads(read_plain(path, _MOST_BYTES))
    except (OSError, ValueError):
        return None
    if not isinstance(reply, dict) or reply.get("id") != id:
        return None
    path.unlink(missing_ok=True)
    return reply
