"""A recorder that is killed where a test says: python kill_program.py, with the core library of the C++ tests' build
in LD_PRELOAD, which has the points.

It reads a JSON object a line and answers with one. Each is done in a child of its own, so that torch is imported once:
- `{"do": "record", "trace", "ring_dir", "steps", "point", "pass", …}`: records `kill_workload`; killed at the n-th pass
  of the point, or `after` so many seconds, or not at all. Further keys are arguments of `moe_native.Recorder`.
- `{"do": "recover", "trace", "line"}`: recovers a trace; killed before the n-th line of the reader's code that does it.
The answer: `signal` that ended the child (0: none), its exit `code`, and how many steps had `ended`, as the child wrote
down in shared memory after each.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import sys
import threading
import time
from types import FrameType
from typing import Any

import kill_workload
import torch

import moe_native
import moe_trace

_ENDED = mmap.mmap(-1, 4096)  # shared with the children
_OF_RECOVERY = ("/moe_trace/recover.py", "/moe_trace/writer.py", "/moe_trace/files.py", "/moe_trace/owner.py")


def record(arguments: dict[str, Any]) -> None:
    steps, wide = arguments.pop("steps"), arguments.pop("wide", 0)
    point, number, after = arguments.pop("point", ""), arguments.pop("pass", 0), arguments.pop("after", None)
    core = ctypes.CDLL(None)
    core.moe_native_kill_at(point.encode(), number)
    if after is not None:
        threading.Thread(target=_die, args=(after,), daemon=True).start()
    recorder = moe_native.Recorder(arguments.pop("trace"), overflow="block", flush_seconds=0.002, **arguments)
    layers = {layer: recorder.bind(layer, experts=kill_workload.EXPERTS, top_k=kill_workload.K)
              for layer in kill_workload.LAYERS}  # fmt: skip
    for n in range(steps):
        step = kill_workload.step(n, wide)
        with recorder.step(step.names, step.positions, prompt_lens=step.prompts):
            for layer, binding in layers.items():
                recorder.record(binding, torch.from_numpy(step.ids[layer]), torch.from_numpy(step.weights[layer]))
        _ENDED[:8] = struct.pack("q", n + 1)
    recorder.close()


def _die(after: float) -> None:
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)


def recover(arguments: dict[str, Any]) -> None:
    left = arguments["line"]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(_OF_RECOVERY):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    moe_trace.recover(arguments["trace"])


def main() -> None:
    for line in sys.stdin:
        arguments = json.loads(line)
        do = {"record": record, "recover": recover}[arguments.pop("do")]
        _ENDED[:8] = bytes(8)
        child = os.fork()
        if child == 0:
            try:
                do(arguments)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        _, status = os.waitpid(child, 0)
        (ended,) = struct.unpack("q", _ENDED[:8])
        answer = {"signal": status & 127, "code": status >> 8, "ended": ended}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
