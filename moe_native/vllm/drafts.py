"""What became of draft tokens. Speculative decoding executes them before it is known whether they are accepted, so a
row's fate is a late fact about an earlier step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_native.recorder import Recorder
from moe_native.vllm.layout import Span, cut_span


@dataclass(frozen=True)
class Drafts:
    """A request's draft tokens in its last step."""

    step: int
    row: int  # the first of them in that step
    position: int  # and its position in the request
    count: int
    recorded: Sequence[Span]  # the rows of that step that this rank records, as (first, count)


class DraftFates:
    """Drafts whose fate is not known yet, by request.

    The sampler's output says it right after the step, or when it has come from the device. Where the request's next
    step is faster, that does: it goes on at the first position that was not accepted. What nobody says, as of a last
    step that another pipeline stage samples, is marked `undecided`.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._waiting: dict[str, Drafts] = {}
        # Outputs that have come since, and what waited for each. Another thread may have put them here.
        self._late: deque[tuple[Any, dict[str, Drafts]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def executed(self, request: str, drafts: Drafts) -> None:
        """A step that was recorded has executed these."""
        self._waiting[request] = drafts

    def sampled(self, output: Any) -> None:
        """What the sampler returned for the last step: for each request a list of tokens, the accepted drafts and one
        more; or an object that will give it."""
        original = getattr(output, "get_output", None)
        if original is None:
            return self._read(output, self._waiting)
        late, waiting = self._late, dict(self._waiting)

        def get_output(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            late.append((result, waiting))
            return result

        output.get_output = get_output

    def take_late(self) -> None:
        """Read the outputs that have come since the last step."""
        while self._late:
            self._read(*self._late.popleft())

    def _read(self, output: Any, asked: dict[str, Drafts]) -> None:
        tokens = getattr(output, "sampled_token_ids", None)
        if not isinstance(tokens, list):
            return
        for request, sampled in zip(output.req_ids, tokens, strict=True):
            drafts = self._waiting.get(request)
            if drafts is not None and drafts is asked.get(request) and len(sampled) > 0:
                self._judge(request, accepted=len(sampled) - 1)

    def continued(self, request: str, position: int) -> None:
        """The request's next step begins at `position`."""
        drafts = self._waiting.get(request)
        if drafts is not None:
            self._judge(request, accepted=position - drafts.position)

    def _judge(self, request: str, accepted: int) -> None:
        if accepted < 0:  # it starts over, as after a preemption
            return self.ended(request)
        drafts = self._waiting.pop(request)
        if accepted < drafts.count:
            self._amend(drafts, accepted, "rejected")

    def ended(self, request: str) -> None:
        """Nothing more will be heard of this request."""
        drafts = self._waiting.pop(request, None)
        if drafts is not None:
            self._amend(drafts, 0, "undecided")

    def _amend(self, drafts: Drafts, accepted: int, flag: str) -> None:
        for first, count in cut_span(drafts.row + accepted, drafts.count - accepted, drafts.recorded):
            self._recorder.amend(drafts.step, first, count, [flag])

    def missed(self) -> None:
        """A step was executed and not recorded: what it said of the drafts before it was not seen."""
        for request in list(self._waiting):
            self.ended(request)
