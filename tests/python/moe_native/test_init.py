"""`import moe_native` costs nothing until something of it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moe_native
import moe_trace


def test_names():
    assert moe_native.Recorder.__module__ == "moe_native.recorder"
    assert callable(moe_native.hf.attach)
    assert moe_native.__version__ == moe_trace.__version__
    with pytest.raises(AttributeError, match="no attribute 'Recordr'"):
        moe_native.Recordr  # noqa: B018


def test_finding_the_plugin_loads_neither_the_recorder_nor_the_reader():
    """vLLM does so in each of its processes, whether they record or not."""
    code = (
        "import sys, moe_native.vllm.plugin; "
        "print([m for m in ('moe_native._C', 'moe_native.ops', 'moe_trace', 'torch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
