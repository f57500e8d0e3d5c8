"""Steering a recorder while it records: the commands, and the file through which they come from another process.

A command is a JSON object `{"id", "command", "arguments"}` in the file `command.json` of the rank's directory, written
beside and renamed in, readable and writable by its owner only. The recorder looks twice a second, deletes it, does what
it says and answers with `reply.json`: `{"id", "ok", …}`. `moe-native ctl` is the other side.

| command | arguments | does |
|---|---|---|
| `pause`, `resume` | | no step is recorded from the next one on, or steps are again |
| `flush` | `seconds` | makes what was recorded visible to readers |
| `status` | | nothing |
| `set` | `fields`, `layers`, `sample` | as the settings of these names; from the next step on |

Each answers with `Recorder.status()`, or with `"ok": false` and an `error`.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_native.recorder import Recorder

log = logging.getLogger("moe_native")

COMMAND, REPLY = "command.json", "reply.json"
COMMANDS = ("pause", "resume", "flush", "status", "set")
_LOOK_SECONDS = 0.5
_FLUSH_SECONDS = 30.0
_MOST_BYTES = 1 << 16


def obey(recorder: Recorder, command: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Do what a command of the table above says. Never raises; the answer has plain types only."""
    try:
        arguments = dict(arguments or {})
        known = {"flush": {"seconds"}, "set": {"fields", "layers", "sample"}}.get(command, set())
        if command not in COMMANDS:
            raise ValueError(f"{command!r} is no command: use {', '.join(COMMANDS)}")
        if strange := sorted(set(arguments) - known):
            names = ", ".join(sorted(known)) or "nothing"
            raise ValueError(f"{command} takes {names}, not {', '.join(map(str, strange))}")
        if command == "pause":
            recorder.pause()
        elif command == "resume":
            recorder.resume()
        elif command == "flush":
            recorder.flush(float(arguments.get("seconds", _FLUSH_SECONDS)))
        elif command == "set":
            if not arguments:
                raise ValueError("set what? fields=…, layers=… or sample=…")
            recorder.set(**arguments)
        return {"ok": True, **recorder.status()}
    except Exception as error:  # whoever asked is told; what records goes on
        return {"ok": False, "error": str(error) or type(error).__name__}


class CommandFile:
    """Looks for commands in a rank's directory, in a thread of its own, until `close()` or the recorder's end."""

    def __init__(self, recorder: Recorder, directory: Path) -> None:
        self._recorder = weakref.ref(recorder)
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe-native-ctl", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no room for a thread: record without it
            log.warning("moe_native: moe-native ctl will not reach %s: %s", directory, error)

    def close(self) -> None:
        """End the thread. What was asked for too late is not done."""
        self._stop.set()
        # It may be the last that knows the recorder, and so call this itself.
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        complained = False
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                self._look()
            except Exception as error:
                if not complained:
                    log.warning("moe_native: a command in %s cannot be followed: %s", self._directory, error)
                complained = True

    def _look(self) -> None:
        path = self._directory / COMMAND
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        except OSError as error:
            path.unlink()
            raise ValueError(f"{COMMAND} is no plain file ({error.strerror})") from None
        try:
            path.unlink()
            _check(os.fstat(handle))
            asked = json.loads(os.read(handle, _MOST_BYTES))
        finally:
            os.close(handle)
        if not isinstance(asked, dict) or not isinstance(asked.get("arguments", {}), dict):
            raise ValueError(f"{COMMAND} is no command")
        recorder = self._recorder()
        if recorder is not None:
            answer = obey(recorder, str(asked.get("command")), asked.get("arguments"))
            self._reply({"id": asked.get("id"), **answer})

    def _reply(self, answer: dict[str, Any]) -> None:
        handle, temporary = tempfile.mkstemp(prefix=".reply-", suffix=".json", dir=self._directory)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(answer, file)
            os.replace(temporary, self._directory / REPLY)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _check(found: os.stat_result) -> None:
    """Raises ValueError for a command that its owner, which is who records, did not give."""
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{COMMAND} is no plain file")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ValueError(f"{COMMAND} belongs to user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}: refused")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"{COMMAND} is larger than a command can be")
