"""Records a plain transformers Mixture-of-Experts model: `attach(model, recorder)`.

    with moe_native.Recorder("trace") as recorder, moe_native.hf.attach(model, recorder):
        model.generate(**inputs, max_new_tokens=50)

Every forward pass of `model` becomes a step, and a sequence of the batch is a request. The cache says which: a pass on
an empty cache, or on one not seen before (a copy of a prefix's), starts new sequences; a pass on the cache that an
earlier one filled goes on with the same ones. Without a cache (`use_cache=False`) every pass starts new sequences. With
beams, a request is a place in the batch, whichever hypothesis has it. A sequence that has ended before the others of
its batch goes on: `generate` feeds it padding tokens.

The phase of a row is what the passes show. The first pass is the prompt, up to the first logit that it was asked for
where it is given a cache (`logits_to_keep`; behind it stand drafts). Passes of one token are decoding. A prompt whose
second piece has several tokens (`prefill_chunk_size`) has no `prompt_len`, and where rows may be prompt or not, their
phase is unknown. A second piece of one token cannot be told from decoding.

Rows that are cut off a cache in the middle of its last pass were drafts (assisted decoding, prompt lookup): they get
the flag "rejected" when the next pass shows it, so drafts of a generation's last pass never do. A cache that is cut
further back starts new sequences. Rows whose place in a sequence cannot be known (several sequences packed into one,
a mask that is not a tensor) are recorded as nobody's.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_native.hf.routers import Router, find
from moe_native.hf.sequences import Sequences, layout, past_length, placed_rows, spans
from moe_native.recorder import Recorder
from moe_native.runs import RUN_DTYPE, UNKNOWN, join_rows, row_class

__all__ = ["Attachment", "attach"]

log = logging.getLogger("moe_native")


def attach(model: torch.nn.Module, recorder: Recorder, *, requests: Iterable[str] | None = None) -> Attachment:
    """Record every forward pass of a transformers model, until `detach()`.

    Args:
        model: a decoder-only Mixture-of-Experts model on the CPU, with routers or gates in the usual places: a module
            with the children `experts` and `gate` or `router`. Call the model itself: passes of its parts are not seen.
        recorder: where to; bind nothing else to it.
        requests: names for the sequences, in the order in which they start; None for "0", "1", … When it runs out,
            numbers follow.

    Returns:
        A handle, also a context manager, that detaches.

    Raises:
        ValueError: the model has no Mixture-of-Experts layer that is known here, or is an encoder-decoder; or
            `requests` is one string.

    A router whose experts are one module is recorded exactly: it returns its choice, or the experts are given it. Where
    the experts are a list, the choice may show in a gate's logits only. It is computed from them then (top-k of the
    softmax), and such layers are marked "derived" in the trace.
    """
    if isinstance(requests, str):
        raise ValueError(f"requests is a sequence of names: write [{requests!r}]")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError("encoder-decoder models are not supported: their two halves route different rows in one pass")
    blocks = list(find(model))
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no Mixture-of-Experts layer that is known here (a module with children "
            "'experts' and 'gate' or 'router'); use moe_native.Recorder.record in its router instead"
        )
    return Attachment(model, recorder, blocks, requests)


class Attachment:
    """What `attach` returns. Detaching removes every hook and leaves the recorder open."""

    def __init__(
        self, model: torch.nn.Module, recorder: Recorder, blocks: list[Router], requests: Iterable[str] | None
    ) -> None:
        self._model, self._recorder = model, recorder
        self._signature = inspect.signature(model.forward)
        self._names = itertools.chain(requests or (), (str(n) for n in itertools.count()))
        self._batches: list[Sequences] = []  # whose caches are alive
        self._current: Sequences | None = None  # of the pass that is under way
        self._step: int | None = None  # the number of the open step, if it is ours
        self._runs: npt.NDArray[np.void] = np.zeros(0, RUN_DTYPE)  # of that step
        self._tokens: npt.NDArray[np.uint32] | None = None
        self._complained = False
        config = getattr(model, "config", None)
        self._modality = "unknown" if hasattr(config, "vision_config") or hasattr(config, "audio_config") else "text"
        self._handles = [handle for block in blocks for handle in block.bind(recorder)]
        # Steps are opened and closed in Python, also around a model that is compiled.
        outside: Callable[[Any], Any] = torch.compiler.disable
        before, after = outside(self._before), outside(self._after)
        self._handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(model.register_forward_hook(after, always_call=True))
        recorder.update_metadata(**_describe(model))

    def detach(self) -> None:
        """Remove the hooks. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._abort()
        self._end(self._batches)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # Around a forward pass. Nothing that goes wrong here may reach the model.

    def _before(self, _: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._current = None
        try:
            self._abort()  # torch calls no hook when Ctrl-C ends a pass
            self._begin(self._signature.bind_partial(*inputs, **named).arguments)
        except Exception as error:
            self._lose(error)

    def _after(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        sequences, self._current = self._current, None
        try:
            if output is None:  # the pass raised
                self._abort()
                return
            if sequences is not None:
                sequences.keep(output)
            if self._step is not None:
                self._recorder.end_step(self._runs, tokens=self._tokens)
                self._step = None
        except Exception as error:
            self._lose(error)

    def _abort(self) -> None:
        """Give up the step that we have opened, if any. One that the caller has opened since is the caller's."""
        step, self._step = self._step, None
        if step is not None and step == self._recorder.step_number:
            self._recorder.abort_step()

    def _lose(self, error: Exception) -> None:
        """Count a pass that cannot be recorded, and say so once."""
        with contextlib.suppress(Exception):
            if self._step is None and self._recorder.begin_step(0):
                self._step = self._recorder.step_number
            self._abort()
        if not self._complained:
            self._complained = True
            log.error("moe_native: a pass of %s is not recorded: %s (said once)", type(self._model).__name__, error)

    def _begin(self, arguments: dict[str, Any]) -> None:
        # **kwargs of the model's forward come as one entry.
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        ids, cache = arguments.get("input_ids"), arguments.get("past_key_values")
        shaped = ids if ids is not None else arguments["inputs_embeds"]
        batch, length = int(shaped.shape[0]), int(shaped.shape[1])
        past = past_length(cache)
        real, positions = layout(batch, length, past, arguments)
        self._end([old for old in self._batches if old.lives_in(None)])
        try:
            begun = self._recorder.begin_step(int(real.sum()), None if real.all() else spans(real.ravel()))
        except RuntimeError:
            # The caller has opened a step around this pass, and knows better whose rows they are.
            self._end([old for old in self._batches if old.lives_in(cache)])
            return
        self._step = self._recorder.step_number if begun else None
        sequences = self._current = self._sequences(cache, past, batch)
        kept = arguments.get("logits_to_keep")
        if cache is None or type(kept) is not int or not 0 < kept <= length:
            kept = None
        starts = sequences.new
        phases = sequences.phases(past, length, kept)
        sequences.execute(self._step, np.nonzero(real)[1] + past)

        placed = placed_rows(real, positions)
        if starts:
            prompts = np.where(real & placed[:, None], positions, -1)[:, : phases.count("prefill")]
            self._introduce(sequences, prompts.max(1, initial=-1) + 1)
        elif sequences.may_be_prompt:
            for name in sequences.names:
                self._recorder.request(name, prompt_len=None)
        if self._step is not None:
            known = np.array([row_class(phase, self._modality, True) for phase in phases], np.uint16)
            nobodys = row_class("unknown", self._modality, False)
            self._runs = join_rows(
                np.where(placed[:, None], sequences.indices[:, None], np.uint32(UNKNOWN)).repeat(length, axis=1)[real],
                np.where(placed[:, None], positions, UNKNOWN)[real].astype(np.uint32),
                np.where(placed[:, None], known, np.uint16(nobodys))[real],
            )
            self._tokens = None if ids is None else ids.detach().cpu().numpy()[real].astype(np.uint32)

    def _sequences(self, cache: Any, past: int, batch: int) -> Sequences:
        """Those that the pass goes on with, or new ones."""
        own = next((old for old in self._batches if cache is not None and old.lives_in(cache)), None)
        if own is not None and own.go_on_at(past, batch):
            own.reject(past, self._recorder)
            return own
        if own is not None:
            self._end([own])
        self._batches.append(Sequences(list(itertools.islice(self._names, batch))))
        return self._batches[-1]

    def _introduce(self, sequences: Sequences, prompts: npt.NDArray[np.int64]) -> None:
        """Tell the recorder of new sequences; `prompts` are their lengths, 0 where not known."""
        known = [{"prompt_len": length} if length else {} for length in prompts.tolist()]
        indices = [self._recorder.request(name, **info) for name, info in zip(sequences.names, known, strict=True)]
        sequences.indices = np.array(indices, np.uint32)

    def _end(self, ended: list[Sequences]) -> None:
        for sequences in list(ended):
            self._batches.remove(sequences)
            for name in sequences.names:
                self._recorder.finish(name)


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    import transformers

    config = getattr(model, "config", None)
    parameter = next(model.parameters())
    return {
        "model": str(getattr(config, "name_or_path", "") or type(model).__name__),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {"transformers": transformers.__version__},
    }
