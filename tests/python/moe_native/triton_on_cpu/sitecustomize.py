"""Lets vLLM's newer model runner start where there is no GPU: with this directory on PYTHONPATH, Triton interprets its
kernels, and vLLM finds a Triton backend for the CPU. For tests only."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import Backend, backends


class _Inactive:
    @staticmethod
    def is_active() -> bool:
        return False


backends["cpu"] = Backend(compiler=None, driver=_Inactive)  # type: ignore[arg-type]
