"""The entry point of group `vllm.general_plugins`. vLLM calls `register()` in every process, before it makes a worker.

What it changes, and when:

- None of `MOE_NATIVE_TRACE`, `MOE_NATIVE_CAPTURE` and `VLLM_LOG_MOE` is set, and no `moe_native` is in the engine's
  additional config: nothing. No attribute of vLLM is touched.
- Else one attribute, `WorkerBase.__init__`, so that each worker made afterwards is asked whether it is to record (see
  `worker`). With `VLLM_LOG_MOE` also what this process does when it ends (see `log_moe`).

The additional config is not an argument of `register()`. But whoever calls vLLM's plugin loader for the first time in
a process is about to use it: `EngineArgs`, the engine core or the worker's wrapper. So its stack is searched for it,
read only. This finds it in every process that vLLM spawns, and for the first engine of a program that makes engines
itself. A later engine of the same program that runs inside it, or in a process forked from it, is not found when the
first one had no `moe_native`: there, set the variable.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from moe_native.vllm import KEY

log = logging.getLogger("moe_native")

_STACK_DEPTH = 40
_OFF = ("0", "false")
# The process in which vLLM looks at a model's class. It makes no worker, and importing one there takes seconds.
_INSPECTOR = "vllm.model_executor.models.registry"

_registered = False
_warned = False


def forbidden() -> str:
    """`MOE_NATIVE_CAPTURE`, where it says that nothing is to be captured; else empty."""
    value = os.environ.get("MOE_NATIVE_CAPTURE", "")
    return value if value.lower() in _OFF else ""


def arm() -> None:
    """Engines that this process builds from now on can be captured: `MOE_NATIVE_CAPTURE` is set to 1. Where it is 0
    already, somebody has forbidden captures: it stays, and a warning says so, once."""
    global _warned
    if (value := forbidden()) and not _warned:
        _warned = True
        warnings.warn(
            f"MOE_NATIVE_CAPTURE={value} forbids captures: of the engines that are built from now on, only those that "
            "record a trace can be captured. Unset it, or set it to 1",
            stacklevel=2,
        )
    if not os.environ.get("MOE_NATIVE_CAPTURE"):
        os.environ["MOE_NATIVE_CAPTURE"] = "1"
    if getattr(sys.modules.get("vllm.plugins"), "plugins_loaded", False):  # vLLM will not call it again
        register()


def register() -> None:
    """Let this process's workers record, if the environment or the additional config asks for it. Never raises."""
    global _registered
    if _registered:
        return
    try:
        if not _asked_by_environment() and not _asked_by_caller():
            return
        if getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "") == _INSPECTOR:
            return
        if os.environ.get("VLLM_LOG_MOE"):
            from moe_native.vllm import log_moe

            log_moe.claim()
        _wrap_workers()
        _registered = True
    except Exception as error:
        # vLLM does not catch what a plugin raises: recording must not keep a server from starting.
        log.error("moe_native: nothing will be recorded: %s: %s", type(error).__name__, error)


def _asked_by_environment() -> bool:
    traced = any(os.environ.get(name, "0") not in ("", "0") for name in ("MOE_NATIVE_TRACE", "VLLM_LOG_MOE"))
    return traced or (os.environ.get("MOE_NATIVE_CAPTURE", "") != "" and not forbidden())


def _asked_by_caller() -> bool:
    """Does a caller of vLLM's plugin loader hold a config that has our key?"""
    frame = sys._getframe(1)
    for _ in range(_STACK_DEPTH):
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__", "")).startswith("vllm."):
            for name in ("self", "vllm_config"):
                # Not getattr: some of vLLM's classes hand attributes on to what they do not have yet.
                additional = getattr(frame.f_locals.get(name), "__dict__", {}).get("additional_config")
                if isinstance(additional, Mapping) and KEY in additional:
                    return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _wrap_workers() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    original = WorkerBase.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from moe_native.vllm.worker import follow

        follow(self)

    WorkerBase.__init__ = __init__
