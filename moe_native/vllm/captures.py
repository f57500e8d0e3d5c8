"""The worker's side of captures: opens and closes them for callers, and knows which requests are theirs.

A caller marks its requests in `SamplingParams.extra_args` as `{"moe_native": [token, sample, n]}`: `token` is the
number that it has chosen for its capture, `sample` the number of the prompt, `n` how often it is sampled. It also asks
that they do not read the prefix cache, so that each of their positions is executed. With `n` > 1 vLLM makes a request
of each sampling, whose name says which one it is.

Answers to callers have plain types only: the rows go another way (`moe_native.capturing`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_native.capturing import identity_of, wanted
from moe_native.recorder import Recorder
from moe_native.vllm import KEY
from moe_native.vllm.media import MediaSpan

log = logging.getLogger("moe_native")

# ParentRequest.get_child_info: the number of the sampling, an underscore, and the name of the request.
_CHILD = re.compile(r"^(\d+)_")


class Captures:
    """The captures of one worker.

    Args:
        max_positions: how many positions a request can have at most (vLLM's `max_model_len`).
        layers: the MoE layers whose routing is seen: layer, experts, ids a row, name.
        missed: why that of each of the others is not.
    """

    def __init__(
        self,
        recorder: Recorder,
        max_positions: int,
        *,
        layers: Sequence[tuple[int, int, int, str]],
        missed: Mapping[int, str],
    ) -> None:
        self._recorder = recorder
        self._max_positions = max_positions
        self._layers, self._missed = list(layers), dict(missed)
        self._numbers: dict[int, int] = {}  # of the recorder's captures, by the caller's token
        self._taken: dict[int, list[dict[str, Any]]] = {}  # what is known of their requests, by token
        self._requests: set[str] = set()  # under way, by vLLM's internal id

    def obey(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Do what a caller asks for: `open` or `close`. Never raises."""
        try:
            if command == "open":
                return self._open(**arguments)
            if command == "close":
                return self._close(**arguments)
            raise ValueError(f"{command!r} is neither open nor close")
        except Exception as error:  # whoever asked is told; what serves goes on
            return {"error": str(error) or type(error).__name__}

    def _open(self, token: int, fields: list[str], layers: list[int] | None) -> dict[str, Any]:
        number, handle = self._recorder.captures.open(wanted(fields, layers))
        for other in [each for each, known in self._numbers.items() if not self._recorder.captures.is_open(known)]:
            del self._numbers[other], self._taken[other]  # its caller has died
        self._numbers[token] = number
        self._taken[token] = []
        return {
            "process": os.getpid(),
            "handle": handle,
            "identity": identity_of(handle),
            "layers": [list(layer) for layer in self._layers],
            # With keys that any serialisation knows.
            "missed": [[layer, why] for layer, why in self._missed.items()],
        }

    def _close(self, token: int) -> dict[str, Any]:
        if token not in self._numbers:
            raise LookupError(f"there is no capture {token}")
        number, taken = self._numbers.pop(token), self._taken.pop(token)
        return {**self._recorder.captures.close(number)._asdict(), "requests": taken}

    @property
    def idle(self) -> bool:
        """Whether nothing is captured, and no request is under way that was."""
        return not self._numbers and not self._requests

    def learn(self, data: Any, index: int, prompt: int, media: list[MediaSpan]) -> None:
        """A request has been scheduled for the first time, or again, under this index of the recorder."""
        marks = getattr(getattr(data, "sampling_params", None), "extra_args", None)
        mark = marks.get(KEY) if isinstance(marks, Mapping) else None
        if mark is None or data.req_id in self._requests:
            return
        try:
            token, sample, samplings = (int(part) for part in mark)
        except (TypeError, ValueError, OverflowError):  # a server's clients can say anything there
            return
        number = self._numbers.get(token)
        if number is None:  # its caller has given up
            return
        child = _CHILD.match(data.req_id) if samplings > 1 else None
        where = {"sample": sample, "child": 0 if child is None else int(child[1])}
        more = data.sampling_params.max_tokens
        capacity = self._max_positions if more is None or prompt < 0 else min(prompt + more, self._max_positions)
        if self._recorder.captures.add(number, index, capacity=capacity, **where):
            self._taken[token].append({**where, "prompt": prompt, "media": [list(span) for span in media]})
            self._requests.add(data.req_id)

    def forget(self, request: str) -> None:
        """A request has ended."""
        self._requests.discard(request)

    def before_step(self) -> None:
        """The next step is known."""
        self._recorder.captures.follow(bool(self._requests))
