"""Which sequence, and which place in it, the rows of a pass belong to."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_native.recorder import Recorder


class Sequences:
    """The sequences of a batch, whose states one cache holds. Columns are places in that cache, padding included."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.indices: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)  # the recorder's, once they are introduced
        self.new = True
        self.may_be_prompt = False  # the next column, as far as the passes show
        self._cache: weakref.ref[Any] | None = None  # None until the first pass is through
        self._end = 0  # one past the last column that was executed
        self._firm = 0  # the last pass's columns from here on may be drafts
        self._step: int | None = None  # of the last pass, where it is recorded
        self._columns: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # `[rows]` of that step

    def keep(self, output: Any) -> None:
        """The first pass has made a cache, or filled the one that it was given; older models make one each pass."""
        values = [getattr(output, "past_key_values", None), *(output if isinstance(output, tuple) else ())]
        cache = next((value for value in values if hasattr(value, "get_seq_length")), values[0])
        if cache is not None:
            # One that cannot be referred to is never known again, and then starts new sequences.
            with contextlib.suppress(TypeError, LookupError):
                self._cache = weakref.ref(_identity(cache))

    def lives_in(self, cache: Any) -> bool:
        """Whether `cache` is theirs; None: whether they have none any more."""
        own = None if self._cache is None else self._cache()
        return own is (None if cache is None else _identity(cache))

    def go_on_at(self, past: int, batch: int) -> bool:
        """Whether a pass of `batch` sequences on their cache, with `past` columns in it, goes on with them."""
        return past > 0 and len(self.names) == batch and self._firm <= past <= self._end

    def reject(self, past: int, recorder: Recorder) -> None:
        """The last pass's columns from `past` on are not in the cache any more: its drafts were rejected."""
        if self._step is not None:
            for row, count in spans(self._columns >= past):
                recorder.amend(self._step, row, count, ["rejected"])

    def execute(self, step: int | None, columns: npt.NDArray[np.int64]) -> None:
        """A pass begins; `columns` are those of its step's rows."""
        self._step, self._columns = step, columns

    def phases(self, past: int, length: int, kept: int | None) -> list[str]:
        """The phases of a pass's columns, of which the model keeps the last `kept` logits; None: not said.

        Where no logit is kept, the next token is given: the columns up to the first kept one are prompt, and those
        behind it drafts. Only if the pass begins with the first kept one, that may be a token that was sampled.
        Where it is not said, several columns on a filled cache may be anything.
        """
        given = length - kept + 1 if kept is not None else length if past == 0 else 1
        prompt = doubt = 0
        if past == 0 or given > 1:
            prompt = given
        elif kept is None and length > 1:
            doubt = length
        else:
            doubt = int(self.new or self.may_be_prompt)
        self.may_be_prompt = doubt > 1 or (prompt > 0 and not self.new)
        self._firm, self._end, self.new = past + given, past + length, False
        return ["prefill"] * prompt + ["unknown"] * doubt + ["decode"] * (length - prompt - doubt)


def past_length(cache: Any) -> int:
    """Columns of the batch that are in the cache already."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else int(cache[0][0].shape[-2])


def layout(
    batch: int, length: int, past: int, arguments: dict[str, Any]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which places of the input hold real tokens, and their positions, -1 where not known; both `[batch, length]`."""
    shape = (batch, length)
    mask, positions = _mask(arguments.get("attention_mask")), arguments.get("position_ids")
    given: npt.NDArray[np.int64] | None = None
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        given = np.broadcast_to(positions.detach().cpu().numpy(), shape)
    real, unknown = np.ones(shape, bool), np.full(shape, -1)
    if mask is None:
        return real, np.broadcast_to(np.arange(past, past + length), shape) if given is None else given
    if isinstance(mask, torch.Tensor) and mask.shape[-1] >= past + length:
        if mask.dim() == 2:
            whole = np.broadcast_to((mask != 0).cpu().numpy(), (batch, mask.shape[1]))
            # Counted over the cache as well; padding on the left takes no position.
            return whole[:, -length:], (np.cumsum(whole, axis=1) - 1)[:, -length:]
        if mask.dim() == 4 and mask.shape[-2] == length:
            # A real token attends to itself. Masks of numbers are added to the scores.
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            real = np.broadcast_to(seen[:, 0].diagonal(past, 1, 2).cpu().numpy(), shape)
            counted = np.cumsum(real, axis=1) - 1 if past == 0 else unknown
            return real, counted if given is None else given
    # Nothing shows padding but the positions: it repeats one.
    return real, given if given is not None and (np.diff(given) == 1).all() else unknown


def _mask(mask: Any) -> Any:
    """The mask that shows most: `generate` gives a static cache one for each kind of layer."""
    if not isinstance(mask, dict):
        return mask
    masks = [value for value in mask.values() if isinstance(value, torch.Tensor)]
    return max(masks, key=lambda value: (value.dim() == 2, value.shape[-1]), default=None)


def placed_rows(real: npt.NDArray[np.bool_], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The sequences whose positions are known and grow; else they hold several, or something else. `[batch]`."""
    highest = np.maximum.accumulate(np.where(real, positions, -1), axis=1)
    before = np.concatenate([np.full((len(real), 1), -1), highest[:, :-1]], axis=1)
    placed: npt.NDArray[np.bool_] = ~(real & (positions <= before)).any(axis=1)
    return placed


def spans(real: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], real, [False])).astype(np.int8)))
    return [(int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _identity(cache: Any) -> Any:
    """What tells one cache from another: itself, or the first tensor of older models' tuples."""
    return cache if hasattr(cache, "get_seq_length") else cache[0][0]
