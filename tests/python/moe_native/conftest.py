"""What the tests of recording share: small checkpoints, and engines that run in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[3] / "python" / "examples"
sys.path.insert(0, str(EXAMPLES))

import tiny_moe  # noqa: E402

Engine = Callable[..., dict[str, Any]]


def pytest_configure(config: pytest.Config) -> None:
    """Tests import moe_native.captures, which would arm the workers that other tests make in this process. (Scripts
    import this file as well, and are to be armed.)"""
    os.environ.setdefault("MOE_NATIVE_CAPTURE", "0")
    config.addinivalue_line("filterwarnings", "ignore:MOE_NATIVE_CAPTURE=0 forbids")
    # Engines of two test processes at a time have a core each: OpenMP's threads spin while they wait.
    if process := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(int(process) % (os.cpu_count() or 1)))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's checkpoint with 4 layers."""
    directory = tmp_path_factory.mktemp("checkpoint")
    with contextlib.redirect_stderr(io.StringIO()):
        tiny_moe.make(directory, layers=4)
    return directory


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Runs `vllm_engine.py`, or another script, and returns what it wrote (a list as `given`), where (`path`), and its
    `log`. vLLM's caches are the tests' own, and shared among them."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    cache = tmp_path_factory.mktemp("vllm_cache")

    def run(job: dict[str, Any] | list[Any], script: str = "vllm_engine.py", **environment: str) -> dict[str, Any]:
        directory = tmp_path_factory.mktemp("engine")
        answer = directory / "answer.json"
        env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_NATIVE_")}
        env |= {
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for a function of ours that looks at the worker
            **environment,
        }
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), json.dumps(job), str(answer)],
            env=env,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0 and answer.is_file(), done.stdout[-8000:]
        written = json.loads(answer.read_text())
        return {
            **(written if isinstance(written, dict) else {"given": written}),
            "log": done.stdout,
            "path": str(answer),
        }

    return run
