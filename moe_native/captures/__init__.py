"""Captures: the routing of given prompts as tensors in the caller's process.

`call` has what a user calls; `prompts` makes of what is given prompts for vLLM; `engine` is what is said to the
engine's workers (`moe_native.vllm.captures` is their side); `regions` maps the memory that they have scattered the rows
into; `result` and `sample` are what comes out; `saved` keeps it as a trace.

Importing it arms the engines that are built afterwards, as `moe_native.arm()` does.
"""

from moe_native.captures.call import acapture, capture
from moe_native.captures.errors import CaptureError
from moe_native.captures.result import Capture
from moe_native.captures.sample import Sample
from moe_native.vllm.plugin import arm

__all__ = ["Capture", "CaptureError", "Sample", "acapture", "capture"]

arm()
