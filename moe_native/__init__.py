"""moe_native records Mixture-of-Experts routing in a running torch program. `moe_trace` reads what it recorded."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("torch") is None:
    raise ImportError(
        "moe_native records inside a torch program, and torch is not installed here. "
        "To read traces, import moe_trace instead; to record, install torch first."
    )
if importlib.util.find_spec("moe_native._C") is None:
    raise ImportError(
        "this is the reading half of moe-native, built without its recorder. To read traces, import moe_trace; to "
        "record, install torch and then moe-native with --no-build-isolation and without MOE_NATIVE_READER_ONLY."
    )

if TYPE_CHECKING:
    from moe_native import hf as hf
    from moe_native.captures import Capture as Capture
    from moe_native.captures import CaptureError as CaptureError
    from moe_native.captures import Sample as Sample
    from moe_native.captures import acapture as acapture
    from moe_native.captures import capture as capture
    from moe_native.recorder import Recorder as Recorder
    from moe_native.vllm.plugin import arm as arm

__all__ = ["Capture", "CaptureError", "Recorder", "Sample", "__version__", "acapture", "arm", "capture", "hf"]


_PLACES = {
    "Recorder": "moe_native.recorder",
    "arm": "moe_native.vllm.plugin",
    **dict.fromkeys(("Capture", "CaptureError", "Sample", "acapture", "capture"), "moe_native.captures"),
}


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: vLLM imports this package in each of its processes, to find the plugin, and most
    # of them record nothing.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name == "hf":
        return importlib.import_module("moe_native.hf")
    if name == "__version__":
        import moe_trace

        return moe_trace.__version__
    raise AttributeError(f"module 'moe_native' has no attribute {name!r}")
