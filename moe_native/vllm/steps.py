"""Whose rows a step of vLLM has: the runs that `Recorder.end_step` takes, from the scheduler's output and the
runner's batch.

vLLM has two model runners. Both put the requests of a step one after the other, in the order of their input batch,
and pad behind them; they differ in where the batch is found, which is probed, not concluded from a version.

A row's position is the one the model was given. Its phase is prefill iff the position is below the prompt's length;
its modality is that of the prompt position. So a request's rows are cut where the phase or modality changes, and where
repeated positions or draft tokens begin; most steps have nothing to cut.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_native.recorder import Recorder
from moe_native.runs import DRAFT, FLAGS, RECOMPUTED, RUN_DTYPE, UNKNOWN, row_class
from moe_native.vllm.drafts import DraftFates, Drafts
from moe_native.vllm.forward import Forward
from moe_native.vllm.media import MediaSpan, media_spans
from moe_native.vllm.prefix import BlockOwners, CachedSpan

log = logging.getLogger("moe_native")

PREFILL, DECODE = row_class("prefill", "text", True), row_class("decode", "text", True)

# InputProcessor.assign_request_id: the id the user knows, a dash, and 8 hexadecimal digits.
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

Ints = npt.NDArray[np.int64]


def external_id(internal: str) -> str:
    """The request id that the user gave or was given, from the one vLLM's workers see."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") not in ("", "0"):
        return internal
    return _SUFFIX.sub("", internal)


class Steps:
    """Opens, attributes and closes the recorder's steps for one model runner.

    Requests live in slots of a few arrays, so that a step is a handful of numpy calls, however many requests it has.
    """

    def __init__(self, recorder: Recorder, runner: Any, *, forward: Forward | None = None) -> None:
        self._recorder = recorder
        self._forward = forward  # where rows may lie elsewhere than at the start of the routers' tensors
        self._runner = runner
        self.owners: BlockOwners | None = None  # of the KV blocks, where the prefix cache is followed
        self._fates = DraftFates(recorder)
        self._slots: dict[str, int] = {}  # by vLLM's internal id
        self._names: dict[str, str] = {}  # internal id -> the name it is recorded under
        self._internal: dict[str, str] = {}  # and back, for the names in use
        self._free: list[int] = []
        self._index: Ints = np.zeros(0, np.int64)  # by slot: the recorder's request index,
        self._prompt: Ints = np.zeros(0, np.int64)  # the prompt's length,
        self._lowest: Ints = np.zeros(0, np.int64)  # the first of its positions that was executed (others were cached),
        self._executed: Ints = np.zeros(0, np.int64)  # one past the last that was executed,
        self._media: dict[int, list[MediaSpan]] = {}  # what is not text in its prompt,
        self._cached: dict[int, list[CachedSpan]] = {}  # and which of its positions were never executed
        # The batch of the step before: while it stays the same, looking its requests up can be left out.
        self._batch: list[str] = []
        self._batch_slots: Ints = np.zeros(0, np.int64)

    def begin(self, scheduler_output: Any) -> bool:
        """Learn of new and ended requests, and open a step when there is something to execute. Whether a step is
        open."""
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
        rows = scheduler_output.total_num_scheduled_tokens
        opened = rows > 0 and (self._recorder.begin_step if self._forward is None else self._forward.begin)(rows)
        if rows > 0 and not opened:
            self._fates.missed()
        return opened

    @property
    def number(self) -> int:
        """Of the step that was begun last."""
        return self._recorder.step_number

    def lose(self, scheduler_output: Any, number: int) -> None:
        """`begin` raised after step `number`: the step is a counted loss. It takes its number all the same, since ranks
        number their steps alike."""
        rows = scheduler_output.total_num_scheduled_tokens
        if rows > 0 and self._recorder.step_number == number:
            self._recorder.begin_step(rows)
        self.abort()

    def end(self, scheduler_output: Any) -> bool:
        """Commit the step. True; a step that the recorder could not keep is counted there.

        Raises:
            Exception: the rows cannot be told apart. The step is still open: `end_as_nobodys`.
        """
        requests, positions, tokens = self._view(scheduler_output)
        counts = self._counts(requests, scheduler_output.num_scheduled_tokens)
        ends = counts.cumsum()
        rows = scheduler_output.total_num_scheduled_tokens
        if counts.sum() != rows:
            raise ValueError(f"the batch's requests have {counts.sum()} rows, the step has {rows}")
        first = positions[ends - counts]
        drafts: dict[str, Drafts] = {}
        speculated = getattr(scheduler_output, "scheduled_spec_decode_tokens", None) or {}
        if speculated:
            drafts = self._drafts(requests, first.tolist(), ends.tolist(), counts.tolist(), speculated)
        if self._fates:
            for request, position in zip(requests, first.tolist(), strict=True):
                self._fates.continued(request, position)
        runs = self._runs(requests, first, counts, drafts)
        if self._forward is not None:
            runs, tokens = self._forward.cut(runs, tokens)
        if self._recorder.end_step(runs, tokens=tokens):
            for request, of_request in drafts.items():
                self._fates.executed(request, of_request)
        else:
            self._fates.missed()
        return True

    def end_as_nobodys(self, scheduler_output: Any) -> bool:
        """Commit the step after `end` raised: rows that we cannot tell apart are nobody's, rather than somebody
        else's. True."""
        self._fates.missed()
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

    # The runner's batch.

    def _view(self, scheduler_output: Any) -> tuple[list[str], npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Requests in the order of their rows, positions of the rows, and their token ids when they are asked for."""
        runner, rows = self._runner, scheduler_output.total_num_scheduled_tokens
        batch = getattr(getattr(runner, "execute_model_state", None), "input_batch", None)
        if batch is not None:  # the newer runner
            source = batch
        else:
            batch, source = runner.input_batch, runner
        positions = _array(source.positions)
        tokens = _array(source.input_ids)[:rows] if "tokens" in self._recorder.fields else None
        return list(batch.req_ids[: batch.num_reqs]), positions, tokens

    @staticmethod
    def _counts(requests: list[str], scheduled: dict[str, int]) -> Ints:
        return np.fromiter(map(scheduled.__getitem__, requests), np.int64, len(requests))

    def _find(self, requests: list[str]) -> Ints:
        """Slots of the requests."""
        if requests != self._batch:
            for request in requests:
                if request not in self._slots:  # it was there before recording began
                    self._add(request, prompt=-1)
            self._batch_slots = np.fromiter(map(self._slots.__getitem__, requests), np.int64, len(requests))
            self._batch = requests
        return self._batch_slots

    def _runs(
        self, requests: list[str], first: npt.NDArray[Any], counts: Ints, drafts: dict[str, Drafts]
    ) -> npt.NDArray[np.void]:
        slots = self._find(requests)
        ends = first + counts
        prompts, executed = self._prompt[slots], self._executed[slots]
        runs = np.zeros(len(slots), RUN_DTYPE)
        runs["request"] = self._index[slots]
        runs["position"] = first
        runs["count"] = counts
        decode = first >= prompts
        runs["cls"] = np.where(decode, DECODE, PREFILL)
        # To be cut: runs that cross the prompt's end, repeat positions, or may hold something else than text.
        special = (~decode & (ends > prompts)) | ((first < executed) & (ends > self._lowest[slots]))
        if self._media:
            special |= ~decode & np.fromiter((int(slot) in self._media for slot in slots), bool, len(slots))
        special |= prompts < 0
        if drafts:
            special |= np.fromiter((request in drafts for request in requests), bool, len(requests))
        if special.any():
            first_draft = [drafts[request].position if request in drafts else UNKNOWN for request in requests]
            runs = self._cut(runs, slots, special, first_draft)
        self._executed[slots] = np.maximum(executed, ends)
        self._lowest[slots] = np.minimum(self._lowest[slots], first)
        return runs

    def _cut(
        self, runs: npt.NDArray[np.void], slots: Ints, special: npt.NDArray[np.bool_], first_draft: list[int]
    ) -> npt.NDArray[np.void]:
        out: list[tuple[int, int, int, int, int]] = []
        for run, slot, cut, draft in zip(runs.tolist(), slots.tolist(), special.tolist(), first_draft, strict=True):
            if not cut:
                out.append(run)
                continue
            request, first, count = run[:3]
            end, prompt = first + count, int(self._prompt[slot])
            lowest, executed = int(self._lowest[slot]), int(self._executed[slot])
            media = [span for span in self._media.get(slot, ()) if span[0] < end and first < span[1]]
            edges = {prompt, lowest, executed, draft, *(edge for span in media for edge in span[:2])}
            points = [first, *sorted(edge for edge in edges if first < edge < end), end]
            for start, stop in itertools.pairwise(points):
                while media and media[0][1] <= start:
                    del media[0]
                modality = media[0][2] if media and media[0][0] <= start else "text"
                phase = "unknown" if prompt < 0 else "prefill" if start < prompt else "decode"
                cls, flags = row_class(phase, modality, True), 0
                if lowest <= start < executed:
                    cls, flags = cls | RECOMPUTED, FLAGS["recomputed"]
                if start >= draft:
                    cls |= DRAFT
                out.append((request, start, stop - start, cls, flags))
        return np.array(out, RUN_DTYPE)

    def _drafts(
        self, requests: list[str], first: list[int], ends: list[int], counts: list[int], speculated: dict[str, Any]
    ) -> dict[str, Drafts]:
        """The draft tokens of this step: the last ones of a request's rows."""
        step = self._recorder.step_number
        kept = ((0, ends[-1]),) if self._forward is None else self._forward.kept
        return {
            request: Drafts(step, row=end - number, position=start + count - number, count=number, recorded=kept)
            for request, start, end, count in zip(requests, first, ends, counts, strict=True)
            if (number := len(speculated.get(request, ())))
        }

    # Requests.

    def _learn(self, data: Any) -> None:
        """A request that is scheduled for the first time, or again after it was preempted."""
        if hasattr(data, "prompt_len"):
            prompt = data.prompt_len
        else:  # without it, a prompt of embeddings has no tokens
            prompt = -1 if data.prompt_token_ids is None else len(data.prompt_token_ids)
        slot = self._slots.get(data.req_id)
        if slot is None:
            slot = self._add(data.req_id, prompt)
        elif self._prompt[slot] != prompt:  # a session's prompt that has grown
            self._prompt[slot] = prompt
            self._recorder.request(self._names[data.req_id], internal=data.req_id, prompt_len=prompt)
        media = media_spans(getattr(data, "mm_features", None) or ())
        if media and media != self._media.get(slot):
            self._media[slot] = media
            noted = [[low, high - low, modality] for low, high, modality in media]
            self._recorder.request(self._names[data.req_id], media=noted)

    def _follow_blocks(self, owners: BlockOwners, scheduler_output: Any) -> None:
        """Who the KV blocks belong to that this step has allocated, and what resumed requests share of them."""
        cached = scheduler_output.scheduled_cached_reqs
        for request, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if blocks:  # a resumed request gets all of its blocks anew, another one some more
                owners.allocate(blocks, computed if request in cached.resumed_req_ids else 0, self._known(request))
        for data in scheduler_output.scheduled_new_reqs:
            owners.allocate(data.block_ids, data.num_computed_tokens, self._known(data.req_id))
        for request, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if blocks and request in cached.resumed_req_ids:
                self._note_cached(request, blocks, computed)

    def _known(self, internal: str) -> int | None:
        slot = self._slots.get(internal)
        return None if slot is None else int(self._index[slot])

    def _note_cached(self, internal: str, blocks: Any, computed: int) -> None:
        """Positions of a request that are computed, and not by itself. One that starts over after a preemption may find
        more of its prompt in the cache than it had executed."""
        slot = self._slots.get(internal)
        if slot is None:  # it was there before recording began
            return
        noted = self._cached.get(slot, [])
        known = max(int(self._executed[slot]), noted[-1][0] + noted[-1][1] if noted else 0)
        if computed <= known:
            return
        unknown: list[CachedSpan] = [(0, computed, None)]
        found = unknown if self.owners is None else self.owners.sources(blocks, computed)
        # What it shares with itself it executed in steps that are not recorded.
        new = [
            (max(first, known), first + count - max(first, known), source)
            for first, count, source in found
            if first + count > known and source != int(self._index[slot])
        ]
        if new:
            self._cached[slot] = [*noted, *new]
            self._recorder.request(self._names[internal], cached=[list(span) for span in self._cached[slot]])

    def _add(self, internal: str, prompt: int) -> int:
        if not self._free:
            grown = max(64, 2 * len(self._index))
            self._free = list(range(grown - 1, len(self._index) - 1, -1))
            self._index, self._prompt, self._lowest, self._executed = (
                np.concatenate([old, np.zeros(grown - len(old), np.int64)])
                for old in (self._index, self._prompt, self._lowest, self._executed)
            )
        slot = self._free.pop()
        # A user may have two requests of one name under way: the second is recorded under vLLM's own name for it.
        name = external_id(internal)
        if name in self._internal:
            name = internal
        known = {} if prompt < 0 else {"prompt_len": prompt}
        self._index[slot] = self._recorder.request(name, internal=internal, **known)
        self._prompt[slot], self._lowest[slot], self._executed[slot] = prompt, UNKNOWN, 0
        self._slots[internal], self._names[internal], self._internal[name] = slot, name, internal
        return slot

    def _forget(self, internal: str) -> None:
        slot = self._slots.pop(internal, None)
        if slot is None:
            return
        name = self._names.pop(internal)
        del self._internal[name]
        self._recorder.finish(name)
        self._media.pop(slot, None)
        self._cached.pop(slot, None)
        self._fates.ended(internal)
        self._free.append(slot)
        self._batch = []


def _array(source: Any) -> npt.NDArray[Any]:
    """A runner's host buffer or tensor as an array, without a copy."""
    tensor = getattr(source, "cpu", source)
    if not hasattr(tensor, "numpy"):  # a tensor's own `cpu` is a method
        tensor = source
    array: npt.NDArray[Any] = tensor.numpy()
    return array
