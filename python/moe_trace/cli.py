"""The command `moe-native`: summaries, pictures and exports of traces, and what is wrong with a set-up.

Exit codes, of every command: 0 whole, 1 failed (one line on stderr says why), 2 usage, 3 lossy: the command did its work, but the trace has losses,
damage or layers that were missed (for `doctor`: 0 nothing is wrong, 1 there is a problem).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_trace import Selection, Trace

WHOLE, FAILED, USAGE, LOSSY = 0, 1, 2, 3
INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell says of a program that SIGINT or SIGPIPE ended


class UsageError(Exception):
    """The arguments do not fit the trace; the message says what would."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` are the arguments without the program's name; sys.argv's unless given."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as done:  # argparse has printed what there is to say
        return done.code if isinstance(done.code, int) else USAGE
    from moe_trace.errors import TraceError

    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(str(error), USAGE)
    except BrokenPipeError:
        # Whoever reads has had enough. What is still buffered must not raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except (TraceError, OSError, ValueError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, FAILED)
