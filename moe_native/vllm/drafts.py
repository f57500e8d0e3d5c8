"""What became of draft tokens. Speculative decoding executes them before it is known whether they are accepted, so a
row's fate is a late fact about an earlier step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_native.recorder import Recorder


@dataclass(frozen=True)
class Drafts:
    """A request's draft tokens in its last step."""

    step: int
    row: int  # the first of them in that step
    position: int  # and its position in the request
    count: int


class DraftFates:
    """Drafts whose fate is not known yet, by request.

    The sampler's output says it right after the step. Where that is not seen (it is still on its way from the device,
    or another pipeline stage samples), the request's next step does: it goes on at the first position that was not
    accepted. What nobody says, as of the last step of a request then, is marked `undecided`.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._waiting: dict[str, Drafts] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def executed(self, request: str, drafts: Drafts) -> None:
        """A step that was recorded has executed these."""
        self._waiting[request] = drafts

    def sampled(self, output: Any) -> None:
        """What the sampler returned for the last step, if it is there already: a list of tokens a request, the
        accepted drafts and one more."""
        tokens = getattr(output, "sampled_token_ids", None)
        if not isinstance(tokens, list):
            return
        for request, sampled in zip(output.req_ids, tokens, strict=True):
            drafts = self._waiting.get(request)
            if drafts is not None and len(sampled) > 0:
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
            self._recorder.amend(drafts.step, drafts.row + accepted, drafts.count - accepted, ["rejected"])

    def ended(self, request: str) -> None:
        """Nothing more will be heard of this request."""
        drafts = self._waiting.pop(request, None)
        if drafts is not None:
            self._recorder.amend(drafts.step, drafts.row, drafts.count, ["undecided"])

    def missed(self) -> None:
        """A step was executed and not recorded: what it said of the drafts before it was not seen."""
        for request in list(self._waiting):
            self.ended(request)
