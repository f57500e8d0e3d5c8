"""Whose rows a step of vLLM has: the runs that `Recorder.end_step` takes, from the scheduler's output and the
runner's batch.

vLLM has two model runners. Both put the requests of a step one after the other, in the order of their input batch,
and pad behind them; they differ in where the batch is found, which is probed, not concluded from a version.

A row's position is the one the model was given. Its phase is prefill iff the position is below the prompt's length;
its modality is that of the prompt position. So a request's rows are cut where the phase or modality changes, and where
repeated positions or draft tokens begin; most steps have nothing to cut.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_native import _C
from moe_native.recorder import Recorder
from moe_native.runs import MODALITIES, RUN_DTYPE, UNKNOWN
from moe_native.vllm.captures import Captures
from moe_native.vllm.drafts import DraftFates, Drafts
from moe_native.vllm.forward import Forward
from moe_native.vllm.media import MediaSpan, media_spans
from moe_native.vllm.prefix import BlockOwners, CachedSpan

log = logging.getLogger("moe_native")

# InputProcessor.assign_request_id: the id the user knows, a dash, and 8 hexadecimal digits.
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


def external_id(internal: str) -> str:
    """The request id that the user gave or was given, from the one vLLM's workers see."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") not in ("", "0"):
        return internal
    return _SUFFIX.sub("", internal)


class Request(_C.RequestRows):
    """A request under way."""

    def __init__(self, index: int, prompt: int, name: str) -> None:
        super().__init__(index, prompt)
        self.name = name  # under which it is recorded
        self.media: list[MediaSpan] = []
        self.cached: list[CachedSpan] = []  # which of its positions were never executed


class Steps:
    """Opens, attributes and closes the recorder's steps for one model runner."""

    def __init__(
        self, recorder: Recorder, runner: Any, *, forward: Forward | None = None, captures: Captures | None = None
    ) -> None:
        self._recorder = recorder
        self._captures = captures
        self._announced: bytes | None = None  # the runs of the open step, if captures were told them early
        self._scheduled: Any = None  # what the scheduler said of the open step, where its runs may be announced
        self._forward = forward  # where rows may lie elsewhere than at the start of the routers' tensors
        self._runner = runner
        self.owners: BlockOwners | None = None  # of the KV blocks, where the prefix cache is followed
        self._fates = DraftFates(recorder)
        self._requests = _C.RunningRequests()  # by vLLM's internal id
        self._execute = self._requests.execute
        self.number = recorder.step_number  # of the step that was begun last, recorded or not
        self._internal: dict[str, str] = {}  # that id, by the name that is recorded
        self._positions = _HostArray()

    def begin(self, scheduler_output: Any) -> bool:
        """Learn of new and ended requests, and open a step when there is something to execute. Whether a step is
        open."""
        self._announced = self._scheduled = None
        if self._idle:
            for internal in list(self._internal.values()):  # followed beside what was captured
                self._forget(internal)
            return False
        self._fates.take_late()
        for request in scheduler_output.finished_req_ids:
            self._forget(request)
        for data in scheduler_output.scheduled_new_reqs:
            self._learn(data)
        if self.owners is not None:
            try:
                self._follow_blocks(self.owners, scheduler_output)
            except Exception as error:  # rows are right all the same
                log.error("moe_native: it is not followed any more whose rows cached tokens share: %r", error)
                self.owners = None
        for data in scheduler_output.scheduled_new_reqs:
            self._note_cached(data.req_id, getattr(data, "block_ids", ()), int(getattr(data, "num_computed_tokens", 0)))
        if self._captures is not None:
            self._captures.before_step()
        rows = scheduler_output.total_num_scheduled_tokens
        opened = rows > 0 and (self._recorder.begin_step if self._forward is None else self._forward.begin)(rows)
        self.number += rows > 0
        if rows > 0 and not opened:
            self._fates.missed()
        if opened and self._recorder.captures.under_way:
            self._scheduled = scheduler_output
        return opened

    @property
    def _idle(self) -> bool:
        """Whether there is neither a trace nor a capture that wants anything."""
        captures = self._captures
        return self._recorder.directory is None and (captures is None or captures.idle)

    def announce(self) -> None:
        """Tell captures early whose rows the open step has, where the batch says it before the forward pass."""
        if self._scheduled is None or self._forward is not None or not hasattr(self._runner, "input_batch"):
            return
        scheduled, self._scheduled = self._scheduled, None  # a model may call itself
        self._announced = self._attribute(scheduled)
        self._recorder.announce(self._announced)

    def lose(self, scheduler_output: Any, number: int) -> None:
        """`begin` raised after step `number`: the step is a counted loss. It takes its number all the same, since ranks
        number their steps alike."""
        rows = scheduler_output.total_num_scheduled_tokens
        if rows > 0 and self._recorder.step_number == number:
            self._recorder.begin_step(rows)
        self.number = self._recorder.step_number
        self.abort()

    def end(self, scheduler_output: Any) -> bool:
        """Commit the step, whose rows are in the order of the runner's batch. True; a step that the recorder could not
        keep is counted there.

        Raises:
            Exception: the rows cannot be told apart. The step is still open: `end_as_nobodys`.
        """
        runs = self._attribute(scheduler_output) if self._announced is None else self._announced
        batch, source = self._batch()
        speculated = _speculated(scheduler_output)
        drafts: dict[str, Drafts] = {}
        if speculated or self._fates:
            drafts = self._follow_drafts(
                batch.req_ids[: batch.num_reqs],
                self._positions.of(source.positions),
                scheduler_output.num_scheduled_tokens,
                speculated,
            )
        rows = scheduler_output.total_num_scheduled_tokens
        tokens = _array(source.input_ids)[:rows] if "tokens" in self._recorder.fields else None
        if self._forward is not None:
            of_rank, tokens = self._forward.cut(np.frombuffer(runs, RUN_DTYPE), tokens)
            runs = of_rank.tobytes()
        if self._recorder.end_step(runs, tokens):
            for request, of_request in drafts.items():
                self._fates.executed(request, of_request)
        else:
            self._fates.missed()
        return True

    def _batch(self) -> tuple[Any, Any]:
        """The runner's batch, and what has its positions and token ids."""
        batch = getattr(getattr(self._runner, "execute_model_state", None), "input_batch", None)
        if batch is not None:  # the newer runner
            return batch, batch
        return self._runner.input_batch, self._runner

    def _attribute(self, scheduler_output: Any) -> bytes:
        """The runs of a step. Once a step: it is remembered what was executed."""
        batch, source = self._batch()
        positions = self._positions.of(source.positions)
        step = (scheduler_output.num_scheduled_tokens, _speculated(scheduler_output), positions)
        requests, number, rows = batch.req_ids, batch.num_reqs, scheduler_output.total_num_scheduled_tokens
        runs = self._execute(requests, number, *step, rows)
        if runs is None:
            self._add_unknown(requests[:number])
            runs = self._execute(requests, number, *step, rows)
            assert runs is not None
        return runs

    def end_as_nobodys(self, scheduler_output: Any) -> bool:
        """Commit the step after `end` raised: rows that we cannot tell apart are nobody's, rather than somebody
        else's. Those that were announced can be told apart. True."""
        self._fates.missed()
        if self._announced is not None:
            self._recorder.end_step(self._announced)
            return True
        self._recorder.captures.lose_step()
        rows = scheduler_output.total_num_scheduled_tokens
        runs = np.array([(UNKNOWN, UNKNOWN, rows, 0, 0)], RUN_DTYPE)
        self._recorder.end_step(runs if self._forward is None else self._forward.cut(runs, None)[0])
        return True

    def sampled(self, output: Any) -> None:
        """What the sampler returned for the step that was ended last."""
        if self._fates:
            self._fates.sampled(output)

    def close(self) -> None:
        """No more steps will come."""
        self._fates.take_late()
        self._fates.missed()

    def abort(self) -> None:
        """The forward pass, or `begin` or `end`, raised."""
        self._recorder.abort_step()  # first: whatever else fails, the next step must find none open
        if self.owners is not None:
            self.owners.forget()
        self._fates.missed()

    def _follow_drafts(
        self, requests: list[str], positions: npt.NDArray[Any], scheduled: dict[str, int], speculated: dict[str, Any]
    ) -> dict[str, Drafts]:
        """The draft tokens of this step, the last ones of a request's rows. What it says of those before is told."""
        step = self._recorder.step_number
        rows = sum(scheduled.values())
        kept = ((0, rows),) if self._forward is None else self._forward.kept
        drafts: dict[str, Drafts] = {}
        row = 0
        for request in requests:
            position, count = int(positions[row]), scheduled[request]
            row += count
            self._fates.continued(request, position)
            number = len(speculated.get(request, ()))
            if number:
                drafts[request] = Drafts(step, row - number, position + count - number, number, recorded=kept)
        return drafts

    # Requests.

    def _learn(self, data: Any) -> None:
        """A request that is scheduled for the first time, or again after it was preempted."""
        if hasattr(data, "prompt_len"):
            prompt = data.prompt_len
        else:
            given = data.prompt_token_ids
            given = getattr(data, "prompt_embeds", None) if given is None else given
            prompt = -1 if given is None else len(given)
        request = self._requests.get(data.req_id)
        if request is None:
            request = self._add(data.req_id, prompt)
        elif request.prompt != prompt:  # a session's prompt that has grown
            request.prompt = prompt
            self._recorder.request(request.name, internal=data.req_id, prompt_len=prompt)
        media = media_spans(getattr(data, "mm_features", None) or ())
        if media and media != request.media:
            request.media = media
            request.set_media([(first, end, MODALITIES[modality]) for first, end, modality in media])
            self._recorder.request(request.name, media=[[first, end - first, kind] for first, end, kind in media])
        if self._captures is not None:
            self._captures.learn(data, request.index, prompt, media)

    def _follow_blocks(self, owners: BlockOwners, scheduler_output: Any) -> None:
        """Who the KV blocks belong to that this step has allocated, and what resumed requests share of them."""
        cached = scheduler_output.scheduled_cached_reqs
        given = [
            each
            for each in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
            if each[1]
        ]
        resumed = cached.resumed_req_ids
        for internal, blocks, computed in given:
            # A resumed request gets all of its blocks anew, another one some more.
            owners.allocate(blocks, computed if internal in resumed else 0, self._known(internal))
        for data in scheduler_output.scheduled_new_reqs:
            owners.allocate(data.block_ids, data.num_computed_tokens, self._known(data.req_id))
        for internal, blocks, computed in given:
            if internal in resumed:
                self._note_cached(internal, blocks, computed)

    def _known(self, internal: str) -> int | None:
        request = self._requests.get(internal)
        return None if request is None else request.index

    def _note_cached(self, internal: str, blocks: Any, computed: int) -> None:
        """Positions of a request that are computed, and not by itself. One that starts over after a preemption may find
        more of its prompt in the cache than it had executed."""
        request = self._requests.get(internal)
        if request is None:  # it was there before recording began
            return
        noted = request.cached
        known = max(request.executed, noted[-1][0] + noted[-1][1] if noted else 0)
        if computed <= known:
            return
        unknown: list[CachedSpan] = [(0, computed, None)]
        found = unknown if self.owners is None else self.owners.sources(blocks, computed)
        # What it shares with itself it executed in steps that are not recorded.
        new = [
            (max(first, known), first + count - max(first, known), source)
            for first, count, source in found
            if first + count > known and source != request.index
        ]
        if new:
            request.cached = [*noted, *new]
            self._recorder.request(request.name, cached=[list(span) for span in request.cached])

    def _add_unknown(self, requests: Iterable[str]) -> None:
        """Those that were there before recording began."""
        for internal in requests:
            if self._requests.get(internal) is None:
                self._add(internal, prompt=-1)

    def _add(self, internal: str, prompt: int) -> Request:
        # A user may have two requests of one name under way: the second is recorded under vLLM's own name for it.
        name = external_id(internal)
        if name in self._internal:
            name = internal
        known = {} if prompt < 0 else {"prompt_len": prompt}
        request = Request(self._recorder.request(name, internal=internal, **known), prompt, name)
        self._internal[name] = internal
        self._requests.add(internal, request)
        return request

    def _forget(self, internal: str) -> None:
        request = self._requests.pop(internal)
        if request is None:
            return
        del self._internal[request.name]
        self._recorder.finish(request.name)
        self._fates.ended(internal)
        if self._captures is not None:
            self._captures.forget(internal)


def _speculated(scheduler_output: Any) -> dict[str, Any]:
    return getattr(scheduler_output, "scheduled_spec_decode_tokens", None) or {}


class _HostArray:
    """A runner's buffer as an array. Most runners keep theirs for ever: then it is looked up once."""

    def __init__(self) -> None:
        self._source: Any = None
        self._array: npt.NDArray[Any] = np.zeros(0, np.int64)

    def of(self, source: Any) -> npt.NDArray[Any]:
        if source is not self._source:
            self._source, self._array = source, _array(source)
        return self._array


def _array(source: Any) -> npt.NDArray[Any]:
    """A runner's host buffer or tensor as an array, without a copy."""
    tensor = getattr(source, "cpu", source)
    if not hasattr(tensor, "numpy"):  # a tensor's own `cpu` is a method
        tensor = source
    array: npt.NDArray[Any] = tensor.numpy()
    return array
