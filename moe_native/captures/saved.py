"""A capture as a trace, which `moe_trace` and the command `moe-native` read."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import moe_trace
from moe_native import _C
from moe_native.metadata import Metadata
from moe_native.rank_directory import RankFile, make_rank_directory
from moe_native.runs import join_rows, row_class
from moe_native.tier import Tier
from moe_trace import format as fmt
from moe_trace.writer import SegmentWriter

if TYPE_CHECKING:
    from moe_native.captures.result import Capture
    from moe_native.captures.sample import Sample

_FIELDS = {"ids": fmt.IDS, "weights": fmt.WEIGHTS, "logits": fmt.LOGITS, "hidden": fmt.HIDDEN}
_BLOCK_BYTES = 16 << 20
_MEMORY = Path("/dev/shm")


def save(capture: Capture, path: Path, *, tokens: bool) -> Path:
    """`Capture.save`."""
    directory = make_rank_directory(path, "rank-0")
    file = RankFile(directory, _C.owner())
    try:
        metadata = _metadata(capture, tokens)
        writer = SegmentWriter(directory, metadata=metadata, run_id=file.run_id.hex())
        blocks = _Blocks(writer, capture, tokens)
        for parts in _blocks(capture):
            blocks.add(parts)
        writer.close()
        file.update(closed=True, metadata=metadata, losses={})
    finally:
        file.release()
    return path


def as_trace(capture: Capture) -> moe_trace.Trace:
    """It as a trace in a temporary directory, in memory where there is room, which goes away with the trace."""
    place = _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * _bytes(capture) else None
    directory = Path(tempfile.mkdtemp(prefix="moe-native-capture-", dir=place))
    try:
        trace = moe_trace.open(save(capture, directory, tokens=True))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(trace, shutil.rmtree, directory, ignore_errors=True)
    return trace


def name_of(sample: Sample) -> str:
    """A sample's name in the trace: that of a recorder."""
    name = str(sample.request_output.request_id)
    return f"{sample.completion_index}_{name}" if len(sample.request_output.outputs) > 1 else name


def _metadata(capture: Capture, tokens: bool) -> dict[str, Any]:
    fields = (*capture.fields, *(("tokens",) if tokens else ()))
    metadata = Metadata(Tier(fields), "exact", {"model": capture.model, "captured": True})
    for layer in capture.geometry:
        metadata.add_layer(layer.layer, layer.name, layer.experts, layer.top_k, "exact", "")
    for number, why in capture.missed.items():
        metadata.add_layer(number, "", 0, 0, "missed", why)
    return metadata.items


def _bytes(capture: Capture) -> int:
    return sum(len(sample) * _row_bytes(capture, sample) for sample in capture)


def _row_bytes(capture: Capture, sample: Sample) -> int:
    first = sample.tokens(0, 1)
    return sum(getattr(first, field)[layer].nbytes for field in capture.fields for layer in capture.layers)


Part = tuple[int, "Sample"]  # number of a sample, and some of its positions


def _blocks(capture: Capture) -> Iterator[list[Part]]:
    """Samples, or parts of large ones, that make up a block each."""
    parts: list[Part] = []
    room = _BLOCK_BYTES
    for number, sample in enumerate(capture):
        row = max(_row_bytes(capture, sample), 1)
        first = 0
        while first < len(sample):
            count = min(len(sample) - first, max(room // row, 0 if parts else 1))
            if count:
                parts.append((number, sample.tokens(first, first + count)))
                first, room = first + count, room - count * row
            if room < row:
                yield parts
                parts, room = [], _BLOCK_BYTES
    if parts:
        yield parts


class _Blocks:
    """Writes parts of samples as blocks; each part is a step."""

    def __init__(self, writer: SegmentWriter, capture: Capture, tokens: bool) -> None:
        self._writer = writer
        self._capture = capture
        self._tokens = tokens
        self._steps = 0
        self._told: set[int] = set()  # samples of which the trace says what they are

    def add(self, parts: list[Part]) -> None:
        columns: dict[tuple[int, int], npt.NDArray[Any]] = {}
        stored_as: dict[tuple[int, int], int] = {}
        for field in self._capture.fields:
            for layer in self._capture.layers:
                key = _FIELDS[field], layer
                column = torch.cat([getattr(part, field)[layer] for _, part in parts])
                if column.dtype == torch.bfloat16:  # NumPy has none
                    stored_as[key] = fmt.BFLOAT16
                    column = column.float()
                elif column.dtype == torch.int16:
                    column = column.view(torch.uint16)
                columns[key] = column.numpy()
        if self._tokens:
            columns[fmt.TOKENS, fmt.NO_LAYER] = np.concatenate([_token_ids(part) for _, part in parts])[:, None]
        runs = [_runs(number, part) for number, part in parts]
        steps = np.zeros(len(parts), fmt.TABLES[fmt.STEPS])
        steps["step"] = self._steps + np.arange(len(parts))
        steps["time_ns"] = time.time_ns()
        steps["rows"] = [len(part) for _, part in parts]
        steps["runs"] = [len(each) for each in runs]
        self._steps += len(parts)
        notes = [_note(number, part) for number, part in parts if number not in self._told]
        self._told |= {number for number, _ in parts}
        self._writer.add(columns, steps, np.concatenate(runs), notes=notes, stored_as=stored_as)


def _token_ids(part: Sample) -> npt.NDArray[np.uint32]:
    """`[rows]`: the token at each position; unknown where embeddings stood for the prompt."""
    if not part.is_of_embeddings:
        return part.token_ids.numpy().astype(np.uint32)
    generated = np.array(part.completion.token_ids, np.uint32)
    found = np.full(len(part), fmt.NOBODY, np.uint32)
    decode = part.decode
    found[len(part) - len(decode) :] = generated[decode.positions.numpy() - part.prompt_len]
    return found


def _runs(number: int, part: Sample) -> npt.NDArray[np.void]:
    positions = part.positions.numpy().astype(np.uint32)
    phases = np.where(positions < part.prompt_len, "prefill", "decode")
    kinds = list(zip(phases.tolist(), part.modality.tolist(), strict=True))
    codes = {kind: row_class(*kind, attributed=True) for kind in set(kinds)}
    classes = np.array([codes[kind] for kind in kinds], np.uint16)
    return join_rows(np.full(len(positions), number, np.uint32), positions, classes)


def _note(number: int, part: Sample) -> dict[str, Any]:
    media = [[first, end - first, kind] for first, end, kind in part.media]
    note = {"type": "request", "index": number, "id": name_of(part), "prompt_len": part.prompt_len}
    return {**note, "media": media} if media else note
