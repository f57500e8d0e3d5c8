"""Whose rows a step of vLLM has: the runs that `Recorder.end_step` takes, from the scheduler's output and the
runner's batch.

vLLM has two model runners. Both put the requests of a step one after the other, in the order of their input batch,
and pad behind them; they differ in where the batch is found, which is probed, not concluded from a version.

A row's position is the one the model was given. Its phase is prefill iff the position is below the prompt's length;
its modality is that of the prompt position. So a request's rows are cut where the phase or modality changes; most
steps have nothing to cut.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_native.recorder import Recorder
from moe_native.runs import FLAGS, MODALITIES, RUN_DTYPE, UNKNOWN, row_class

PREFILL, DECODE = row_class("prefill", "text", True), row_class("decode", "text", True)
_PHASE_BITS = 3

# InputProcessor.assign_request_id: the id the user knows, a dash, and 8 hexadecimal digits.
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

Ints = npt.NDArray[np.int64]
# Prompt positions that are not text: (first, one past the last, modality's name).
MediaSpan = tuple[int, int, str]


def external_id(internal: str) -> str:
    """The request id that the user gave or was given, from the one vLLM's workers see."""
    if os.environ.get("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "0") not in ("", "0"):
        return internal
    return _SUFFIX.sub("", internal)


class Steps:
    """Opens, attributes and closes the recorder's steps for one model runner.

    Requests live in slots of a few arrays, so that a step is a handful of numpy calls, however many requests it has.
    """

    def __init__(self, recorder: Recorder, runner: Any) -> None:
        self._recorder = recorder
        self._runner = runner
        self._slots: dict[str, int] = {}  # by vLLM's internal id
        self._names: dict[str, str] = {}  # internal id -> the name it is recorded under
        self._internal: dict[str, str] = {}  # and back, for the names in use
        self._free: list[int] = []
        self._index: Ints = np.zeros(0, np.int64)  # by slot: the recorder's request index,
        self._prompt: Ints = np.zeros(0, np.int64)  # the prompt's length,
        self._lowest: Ints = np.zeros(0, np.int64)  # the first of its positions that was executed (others were cached),
        self._executed: Ints = np.zeros(0, np.int64)  # one past the last that was executed,
        self._media: dict[int, list[MediaSpan]] = {}  # and what is not text in its prompt
        # Draft tokens of a request's last step: (step, their first row, its position, how many).
        self._drafts: dict[str, tuple[int, int, int, int]] = {}
        # The batch of the step before: while it stays the same, looking its requests up can be left out.
        self._batch: list[str] = []
        self._batch_slots: Ints = np.zeros(0, np.int64)

    def begin(self, scheduler_output: Any) -> bool:
        """Learn of new and ended requests, and open a step when there is something to execute. Whether a step is
        open."""
        for request in scheduler_output.finished_req_ids:
            self._forget(request)
        for data in scheduler_output.scheduled_new_reqs:
            self._learn(data)
        rows = scheduler_output.total_num_scheduled_tokens
        opened = rows > 0 and self._recorder.begin_step(rows)
        if rows > 0 and not opened:
            self._drafts.clear()  # what this step accepts of them will not be seen
        return opened

    def end(self, scheduler_output: Any) -> bool:
        """Commit the step. True; a step that the recorder could not keep is counted there."""
        requests, positions, tokens = self._view(scheduler_output)
        counts = self._counts(requests, scheduler_output.num_scheduled_tokens)
        ends = counts.cumsum()
        rows = scheduler_output.total_num_scheduled_tokens
        if not requests or ends[-1] != rows:  # rows that we cannot tell apart are nobody's, rather than somebody else's
            runs = np.array([(UNKNOWN, UNKNOWN, rows, 0, 0)], RUN_DTYPE)
        else:
            first = positions[ends - counts]
            runs = self._runs(self._find(requests), first, counts)
            drafts = getattr(scheduler_output, "scheduled_spec_decode_tokens", None)
            if drafts or self._drafts:
                self._judge_drafts(requests, first.tolist(), ends.tolist(), counts.tolist(), drafts or {})
        if not self._recorder.end_step(runs, tokens=tokens):
            self._drafts.clear()
        return True

    def abort(self) -> None:
        """The forward pass, or `end`, raised."""
        self._drafts.clear()
        self._recorder.abort_step()

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

    def _runs(self, slots: Ints, first: npt.NDArray[Any], counts: Ints) -> npt.NDArray[np.void]:
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
        if special.any():
            runs = self._cut(runs, slots, special)
        self._executed[slots] = np.maximum(executed, ends)
        self._lowest[slots] = np.minimum(self._lowest[slots], first)
        return runs

    def _cut(self, runs: npt.NDArray[np.void], slots: Ints, special: npt.NDArray[np.bool_]) -> npt.NDArray[np.void]:
        out: list[tuple[int, int, int, int, int]] = []
        for run, slot, cut in zip(runs.tolist(), slots.tolist(), special.tolist(), strict=True):
            if not cut:
                out.append(run)
                continue
            request, first, count = run[:3]
            prompt, media = int(self._prompt[slot]), self._media.get(slot, [])
            lowest, executed = int(self._lowest[slot]), int(self._executed[slot])
            edges = {prompt, lowest, executed, *(edge for span in media for edge in span[:2])}
            points = [first, *sorted(edge for edge in edges if first < edge < first + count), first + count]
            for start, stop in itertools.pairwise(points):
                modality = next((name for low, high, name in media if low <= start < high), "text")
                phase = "unknown" if prompt < 0 else "prefill" if start < prompt else "decode"
                flags = FLAGS["recomputed"] if lowest <= start < executed else 0
                out.append((request, start, stop - start, row_class(phase, modality, True), flags))
        return np.array(out, RUN_DTYPE)

    def _judge_drafts(
        self,
        requests: list[str],
        first: list[int],
        ends: list[int],
        counts: list[int],
        drafts: dict[str, list[int]],
    ) -> None:
        """Draft tokens that a step before executed and that were not accepted: a request goes on at the first position
        that was not. Its last step's are never known, and neither are those before a preemption."""
        step = self._recorder.step_number
        for request, start, end, count in zip(requests, first, ends, counts, strict=True):
            earlier = self._drafts.pop(request, None)
            if earlier is not None:
                of_step, row, position, number = earlier
                accepted = start - position
                if 0 <= accepted < number:
                    self._recorder.amend(of_step, row + accepted, number - accepted, ["rejected"])
            number = len(drafts.get(request, ()))
            if number:
                self._drafts[request] = (step, end - number, start + count - number, number)

    # Requests.

    def _learn(self, data: Any) -> None:
        """A request that is scheduled for the first time, or again after it was preempted."""
        prompt = data.prompt_len if hasattr(data, "prompt_len") else len(data.prompt_token_ids or ())
        slot = self._slots.get(data.req_id)
        if slot is None:
            slot = self._add(data.req_id, prompt)
        elif self._prompt[slot] != prompt:  # a session's prompt that has grown
            self._prompt[slot] = prompt
            self._recorder.request(self._names[data.req_id], internal=data.req_id, prompt_len=prompt)
        media = list(_media(getattr(data, "mm_features", None) or ()))
        if media:
            self._media[slot] = media

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
        self._drafts.pop(internal, None)
        self._free.append(slot)
        self._batch = []


def _array(source: Any) -> npt.NDArray[Any]:
    """A runner's host buffer or tensor as an array, without a copy."""
    tensor = getattr(source, "cpu", source)
    if not hasattr(tensor, "numpy"):  # a tensor's own `cpu` is a method
        tensor = source
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def _media(features: Iterable[Any]) -> Iterable[MediaSpan]:
    """What is not text in a prompt, from its multi-modal features. Modalities that the format does not know are
    `unknown`."""
    for feature in features:
        place = feature.mm_position
        modality = feature.modality if feature.modality in MODALITIES else "unknown"
        yield int(place.offset), int(place.offset + place.length), modality
