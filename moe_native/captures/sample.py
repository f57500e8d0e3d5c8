"""What was captured of one sample: its rows by position, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_native.captures.regions import Column, joined

MediaSpan = tuple[int, int, str]  # positions that are not text: the first, one past the last, the modality


class ByLayer(Mapping[int, torch.Tensor]):
    """Tensors by layer, ascending: `sample.logits[12]`. Each is a view of the mapped memory, made when it is asked
    for."""

    def __init__(self, field: str, sample: Sample) -> None:
        self._field = field
        self._sample = sample

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self._sample._column(self._field, layer)

    def __contains__(self, layer: object) -> bool:
        return layer in self._sample._layers_with(self._field)  # without a tensor

    def __iter__(self) -> Iterator[int]:
        return iter(self._sample._layers_with(self._field))

    def __len__(self) -> int:
        return len(self._sample._layers_with(self._field))

    def __reduce__(self) -> tuple[type, tuple[dict[int, torch.Tensor]]]:
        return dict, (dict(self),)  # pickled, it is the tensors

    def _shape(self, layer: int) -> tuple[int, ...]:
        return tuple(self[layer].shape)

    def __repr__(self) -> str:
        layers = list(self)
        if not layers:
            return f"<{self._field}: not captured>"
        shape = self._shape(layers[0])
        return f"<{self._field} of {len(layers)} layers ({layers[0]} to {layers[-1]}), {shape} in layer {layers[0]}>"


class Sample:
    """The rows of one sample, or of some of its positions. Row `i` of each tensor is the position `positions[i]`.

    Tensors are views of memory that is mapped copy-on-write: writing to one changes it for this process alone.

    Attributes:
        prompt_index: which of the prompts it is; `completion_index`: which of its samplings (`n`).
        prompt_len: length of the prompt in tokens.
        media: the positions of the prompt that are not text, as (first, one past the last, modality), ascending.
        request_output, completion: vLLM's own, with the text.
    """

    def __init__(
        self,
        columns: Mapping[tuple[str, int], list[Column]],
        *,
        prompt_index: int,
        completion_index: int,
        prompt_len: int,
        rows: int,
        token_ids: torch.Tensor | None,
        media: Sequence[MediaSpan],
        request_output: Any,
        span: tuple[int, int] | None = None,
    ) -> None:
        self._columns = columns
        self._rows = rows
        self._token_ids = token_ids
        self.media = media
        self._first, self._end = (0, rows) if span is None else span
        self.prompt_index = prompt_index
        self.completion_index = completion_index
        self.prompt_len = prompt_len
        self.request_output = request_output
        self.completion = request_output.outputs[completion_index]

    @property
    def ids(self) -> ByLayer:
        """Expert ids by layer, `[rows, k]`, uint8, or int16 where there are 256 experts or more. They are in the order
        that the router gave them, which need not be by weight. An invalid id is 255, or -1."""
        return ByLayer("ids", self)

    @property
    def weights(self) -> ByLayer:
        """Their weights by layer, `[rows, k]`, in the router's own dtype."""
        return ByLayer("weights", self)

    @property
    def logits(self) -> ByLayer:
        """Router logits by layer, `[rows, experts]`: raw, before softmax, in the router's own dtype."""
        return ByLayer("logits", self)

    @property
    def hidden(self) -> ByLayer:
        """The routers' inputs by layer, `[rows, width]`."""
        return ByLayer("hidden", self)

    @property
    def layers(self) -> list[int]:
        """The layers that were captured, ascending."""
        return self._layers_with("ids")

    @property
    def positions(self) -> torch.Tensor:
        """`[rows]` int64: absolute positions in the sequence."""
        return torch.arange(self._first, self._end)

    @property
    def token_ids(self) -> torch.Tensor:
        """`[rows]` int64: the token at each position.

        Raises:
            LookupError: the prompt was given as embeddings, which have none. `completion.token_ids` has the generated.
        """
        if self._token_ids is None:
            raise LookupError(
                "the prompt was given as embeddings, which have no token ids; completion.token_ids has the generated"
            )
        return self._token_ids[self._first : self._end]

    @property
    def is_of_embeddings(self) -> bool:
        """Whether the prompt was given as embeddings, and so has no token ids."""
        return self._token_ids is None

    @property
    def modality(self) -> npt.NDArray[np.str_]:
        """`[rows]` of `text`, `image`, `video`, `audio`: what is at each position. `sample.logits[3][sample.modality ==
        "image"]` are the rows of images."""
        of_all = np.full(self._rows, "text", "<U7")
        for first, end, modality in self.media:
            of_all[first:end] = modality
        return of_all[self._first : self._end]

    @property
    def prefill(self) -> Sample:
        """The rows of the prompt."""
        return self.tokens(0, self.prompt_len)

    @property
    def decode(self) -> Sample:
        """The rows of generated tokens. The last one generated was not executed, so it has none."""
        return self.tokens(self.prompt_len)

    def tokens(self, first: int = 0, end: int | None = None) -> Sample:
        """The rows at the positions from `first` to before `end` (None: to the end), as far as they are here. Negative
        ones count from the end of the sample."""
        end = self._rows if end is None else end
        first, end = (self._rows + each if each < 0 else each for each in (first, end))
        first = min(max(first, self._first), self._end)
        return Sample(
            self._columns,
            prompt_index=self.prompt_index,
            completion_index=self.completion_index,
            prompt_len=self.prompt_len,
            rows=self._rows,
            token_ids=self._token_ids,
            media=self.media,
            request_output=self.request_output,
            span=(first, max(first, min(end, self._end))),
        )

    def __len__(self) -> int:
        """Number of rows."""
        return self._end - self._first

    def __repr__(self) -> str:
        prompt = max(0, min(self._end, self.prompt_len) - self._first)
        which = f"prompt {self.prompt_index}"
        if self.completion_index or len(self.request_output.outputs) > 1:
            which += f", completion {self.completion_index}"
        fields = list(dict.fromkeys(field for field, _ in self._columns))
        return (
            f"<moe_native.Sample of {which}: {prompt} prompt + {len(self) - prompt} generated tokens, "
            f"{len(self.layers)} layers, {', '.join(fields)}>"
        )

    def _layers_with(self, field: str) -> list[int]:
        return sorted(layer for name, layer in self._columns if name == field)

    def _column(self, field: str, layer: int) -> torch.Tensor:
        columns = self._columns.get((field, layer))
        if columns is None:
            there = self._layers_with(field)
            if not there:
                raise KeyError(f"{field} were not captured: name them in fields=")
            raise KeyError(f"layer {layer} was not captured; these were: {', '.join(map(str, there))}")
        return joined(columns, self._rows)[self._first : self._end]
