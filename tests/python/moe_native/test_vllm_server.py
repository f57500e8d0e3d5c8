"""Recording under vLLM's OpenAI-compatible server, with several clients that stream at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from recorded import LAYERS, PROMPTS, Recorded, Transformers, check_routing, check_rows

import moe_trace

pytestmark = pytest.mark.vllm
openai = pytest.importorskip("openai", reason="the OpenAI client, which vLLM brings along, is not installed here")

START_SECONDS = 400


class Server:
    """`vllm serve` as a process group of its own, recording into `trace`."""

    def __init__(self, checkpoint: Path, trace: Path, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = directory / "server.log"
        arguments = [
            *("--model", str(checkpoint), "--served-model-name", "tiny", "--dtype", "float32", "--seed", "1234"),
            *("--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager", "--port", str(port)),
            *("--host", "127.0.0.1"),
        ]
        env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_NATIVE_")}
        env |= {
            "MOE_NATIVE_TRACE": str(trace),
            "MOE_NATIVE_FIELDS": "ids,tokens",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": str(directory / "cache"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                # What the command `vllm serve` runs; that one does not start in the CPU wheel, which has another name.
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                cwd=directory,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log.read_text()[-8000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-8000:]}")

    def stop(self) -> None:
        """As an operator does. The engine's process may end a moment after the server's."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(120)
        deadline = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.2)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)


def ask(url: str, prompt: str, max_tokens: int, name: str) -> dict[str, Any]:
    """One client's streaming completion, as the tests look at requests."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    stream = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        extra_headers={"X-Request-Id": name},
    )
    asked: list[int] = []
    generated: list[int] = []
    id = ""
    for chunk in stream:
        id, choice = chunk.id, chunk.choices[0]
        asked += getattr(choice, "prompt_token_ids", None) or []
        generated += getattr(choice, "token_ids", None) or []
    return {"id": f"{id}-0", "prompt": asked, "generated": generated}


@pytest.fixture(scope="module")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    directory = tmp_path_factory.mktemp("server")
    server = Server(checkpoint, directory / "trace", directory)
    try:
        server.wait_until_ready()
        with ThreadPoolExecutor(4) as clients:
            asked = [
                clients.submit(ask, server.url, prompt, 8 + 4 * number, f"client-{number}")
                for number, prompt in enumerate(PROMPTS * 2)
            ]
            requests = [each.result() for each in asked]
        live = moe_trace.open(directory / "trace")
        assert live.state == "live"
        server.stop()
        yield Recorded(directory / "trace", {"calls": [requests]})
    finally:
        server.kill()


def test_requests_are_known_by_the_names_that_clients_see(served: Recorded) -> None:
    names = [request["id"] for request in served.requests]
    assert names == [f"cmpl-client-{number}-0" for number in range(len(PROMPTS) * 2)]
    assert set(served.trace.requests) == set(names)


def test_what_was_streamed_to_each_client_is_what_is_recorded(served: Recorded, checkpoint: Path) -> None:
    assert [len(request["generated"]) for request in served.requests] == [8 + 4 * n for n in range(len(PROMPTS) * 2)]
    check_rows(served, served.requests)
    assert check_routing(served, served.requests, Transformers(checkpoint)) > 1000


def test_the_trace_is_whole(served: Recorded) -> None:
    trace = served.trace
    # Whether vLLM lets its engine's process close or kills it is vLLM's affair: what it did is in the trace either way.
    assert trace.state in ("closed", "crashed") and trace.complete and len(trace.layers) == LAYERS
    cached = sum(request.cached_tokens for request in trace.requests.values())
    executed = sum(len(served.executed(request)) for request in served.requests) - cached
    # Asynchronous scheduling, the server's default, may run a request once more before its end is known.
    assert executed <= trace.rows <= executed + len(served.requests)
    names, steps = trace.request_ids, trace.step_numbers
    assert max(len(set(names[steps == step])) for step in set(steps.tolist())) > 1, "clients were not served at once"
