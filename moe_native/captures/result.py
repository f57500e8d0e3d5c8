"""`Capture`: what was captured of some prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_native.captures.engine import Exchange, Found
from moe_native.captures.errors import CaptureError
from moe_native.captures.prompts import is_of_embeddings
from moe_native.captures.regions import Column, Key, disputed, gap
from moe_native.captures.sample import ByLayer, Sample
from moe_trace.units import count

if TYPE_CHECKING:
    from moe_trace import Trace


class Capture(Sequence[Sample]):
    """The routing of some prompts, a `Sample` each; with `n` > 1 one for each sampling, those of a prompt next to each
    other.

    Attributes:
        outputs: what vLLM returned, in the order of the prompts.
        fields, layers: what was captured.
        geometry: for each of the layers its number of experts, how many of them a row has, and its name.
        missed: MoE layers of the model whose routing is not seen, with the reason.
        model: name of the model.
    """

    def __init__(
        self, outputs: Sequence[Any], prompts: Sequence[Any], exchange: Exchange, found: Sequence[Found], model: str
    ) -> None:
        self.outputs = list(outputs)
        self.fields = exchange.fields
        self.geometry = exchange.layers
        self.layers = [layer.layer for layer in self.geometry]
        self.missed = exchange.missed
        self.model = model
        self._samples = [
            _sample(output, is_of_embeddings(prompt), (number, place), self.layers, self.fields, found)
            for number, (output, prompt) in enumerate(zip(self.outputs, prompts, strict=True))
            for place in range(len(output.outputs))
        ]
        if problems := _problems(found):  # of rows that no gap has shown
            raise CaptureError(f"the engine's workers could not keep all that was captured: {problems}")

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def __getitem__(self, index: Any) -> Any:
        return self._samples[index]

    @property
    def ids(self) -> ByLayer:
        """Expert ids by layer, `[rows, k]`, of all samples one after the other. Each access by a layer, as in
        `capture.ids[12]`, makes a copy, also of what follows."""
        return self._joined("ids")

    @property
    def weights(self) -> ByLayer:
        """Their weights by layer, `[rows, k]`."""
        return self._joined("weights")

    @property
    def logits(self) -> ByLayer:
        """Router logits by layer, `[rows, experts]`."""
        return self._joined("logits")

    @property
    def hidden(self) -> ByLayer:
        """The routers' inputs by layer, `[rows, width]`."""
        return self._joined("hidden")

    def _joined(self, field: str) -> ByLayer:
        if field not in self.fields:
            raise KeyError(f"{field} were not captured: name them in fields=")
        return _Joined(field, self._samples)

    def save(self, path: str | Path, *, tokens: bool = False) -> Path:
        """Keep it as a trace, which `moe_trace.open` and the command `moe-native` read: a run of its own in the
        directory `path`, with weights as exact as they were captured. A request's name is vLLM's. Token ids are stored
        only when asked for; those of a prompt that was given as embeddings are unknown (-1) in the trace.

        Returns:
            `path`.

        Raises:
            OSError: it cannot be written.
        """
        from moe_native.captures.saved import save

        return save(self, Path(path), tokens=tokens)

    @property
    def trace(self) -> Trace:
        """It as a trace in memory, for everything that `moe_trace` offers, token ids included. It is written at the
        first use, to a temporary directory that goes away with this object."""
        if not hasattr(self, "_trace"):
            from moe_native.captures.saved import as_trace

            self._trace = as_trace(self)
        return self._trace

    def __repr__(self) -> str:
        rows = sum(len(sample) for sample in self._samples)
        return (
            f"<moe_native.Capture of {count(len(self), 'sample')}, {count(rows, 'row')}: {', '.join(self.fields)} of "
            f"{count(len(self.layers), 'layer')}>"
        )


class _Joined(ByLayer):
    """Tensors of all samples by layer: those of a layer are joined when it is asked for."""

    def __init__(self, field: str, samples: Sequence[Sample]) -> None:
        super().__init__(field, samples[0])
        self._samples = samples

    def __getitem__(self, layer: int) -> torch.Tensor:
        return torch.cat([sample._column(self._field, layer) for sample in self._samples])

    def _shape(self, layer: int) -> tuple[int, ...]:
        return sum(len(sample) for sample in self._samples), self._sample._column(self._field, layer).shape[1]


def _sample(
    output: Any, of_embeddings: bool, key: Key, layers: Sequence[int], fields: Sequence[str], found: Sequence[Found]
) -> Sample:
    number, place = key
    known = next((part.requests[key] for part in found if key in part.requests), None)
    if known is None:
        raise CaptureError(
            f"the engine's workers did not see prompt {number}: was it sent to another data-parallel rank, or ended "
            "before its first step?"
        )
    generated = list(output.outputs[place].token_ids)
    prompt = output.prompt_token_ids  # of embeddings none, or as many zeros
    tokens = None if prompt is None or of_embeddings else [*prompt, *generated]
    prompt_len = int(known["prompt"]) if prompt is None else len(prompt)
    if prompt_len < 0:
        raise CaptureError(f"this vLLM does not say how long prompt {number} is, which was given as embeddings")
    rows = prompt_len + max(len(generated) - 1, 0)
    columns: dict[tuple[str, int], list[Column]] = {}
    for part in found:
        for name, column in part.columns.get(key, {}).items():
            columns.setdefault(name, []).append(column)
    _check(columns, number, rows, layers, fields, _problems(found))
    return Sample(
        columns,
        prompt_index=number,
        completion_index=place,
        prompt_len=prompt_len,
        rows=rows,
        token_ids=None if tokens is None else torch.tensor(tokens[:rows], dtype=torch.int64),
        media=[(int(first), int(end), str(kind)) for first, end, kind in known["media"]],
        request_output=output,
    )


def _problems(found: Sequence[Found]) -> str:
    """What the workers have to say, each thing once."""
    return "; ".join(dict.fromkeys(part.problem for part in found if part.problem))


def _check(
    columns: dict[tuple[str, int], list[Column]],
    number: int,
    rows: int,
    layers: Sequence[int],
    fields: Sequence[str],
    problems: str,
) -> None:
    """Raises CaptureError where a row is missing: better no tensor than a wrong one."""
    why = f": {problems}" if problems else ". The engine's log may say why"
    checked: set[tuple[int, ...]] = set()  # the workers that have a column
    for layer in layers:
        for field in fields:
            parts = columns.get((field, layer))
            if parts is None:
                raise CaptureError(f"prompt {number} has no {field} of layer {layer}{why}")
            workers = tuple(id(part.spans) for part in parts)
            if workers in checked:
                continue
            checked.add(workers)
            missing, several = gap(parts, rows), disputed(parts, rows)
            if missing is not None:
                raise CaptureError(
                    f"prompt {number} lacks rows from position {missing} on, of {rows}, in {field} of layer {layer} or "
                    f"another{why}"
                )
            if several is not None:
                raise CaptureError(
                    f"position {several} of prompt {number} was executed by several workers, and it is not known by "
                    "which one last: capture without speculative decoding, and with fewer requests at a time"
                )
