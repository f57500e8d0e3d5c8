"""moe_native records Mixture-of-Experts routing in a running torch program. `moe_trace` reads what it recorded."""

from __future__ import annotations

import importlib.util

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

from moe_native import hf
from moe_native.recorder import Recorder
from moe_trace import __version__

__all__ = ["Recorder", "__version__", "hf"]
