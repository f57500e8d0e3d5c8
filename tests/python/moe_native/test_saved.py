"""A capture that is kept as a trace: what the reader makes of it is what the tensors are."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_llm import LLM, SamplingParams, Worker, shut_down

import moe_native
import moe_trace
from moe_native.captures import saved
from moe_trace import format as fmt

STORED = {torch.float16: 4, torch.bfloat16: fmt.BFLOAT16, torch.float32: 6}  # csrc/FORMAT.md
ALL = ("ids", "weights", "logits", "hidden")


@pytest.fixture(autouse=True)
def workers_end() -> Iterator[None]:
    yield
    shut_down()


def picture(first: int, length: int) -> Any:
    return SimpleNamespace(modality="image", mm_position=SimpleNamespace(offset=first, length=length))


PROMPTS: list[Any] = [
    [7, 8, 9, 10, 11, 12],
    {"prompt_token_ids": [1, 2, 3, 4, 5], "features": [picture(1, 2), picture(4, 1)]},
]


def captured(prompts: Any = PROMPTS, *, n: int = 2, fields: Any = ALL, **worker: Any) -> moe_native.Capture:
    return moe_native.capture(LLM(Worker((3, 4), **worker)), prompts, SamplingParams(4, n=n), fields=fields)


def as_numpy(column: torch.Tensor) -> np.ndarray:
    if column.dtype == torch.bfloat16:
        return column.float().numpy()
    return (column.view(torch.uint16) if column.dtype == torch.int16 else column).numpy()


def same(trace: moe_trace.Trace, capture: moe_native.Capture) -> bool:
    """Whether the trace has all that the capture has, and says of whom each row is."""
    assert trace.complete and trace.losses == {} and trace.rows == sum(len(sample) for sample in capture)
    names = []
    for sample in capture:
        name = saved.name_of(sample)
        names.append(name)
        rows = trace.request(name)
        assert rows.positions.tolist() == sample.positions.tolist()
        assert rows.prefill().positions.tolist() == sample.prefill.positions.tolist()
        assert rows.decode().positions.tolist() == sample.decode.positions.tolist()
        for kind in ("text", "image"):
            of_kind = [int(p) for p, m in zip(sample.positions, sample.modality, strict=True) if m == kind]
            assert rows.modality(kind).positions.tolist() == of_kind
        info = trace.requests[name]
        assert info.prompt_len == sample.prompt_len
        assert info.info.get("media", []) == [[first, end - first, kind] for first, end, kind in sample.media]
        for layer in capture.layers:
            for field in capture.fields:
                expected = as_numpy(getattr(sample, field)[layer])
                found = getattr(rows.layer(layer), field)
                assert found.dtype == expected.dtype and np.array_equal(found, expected), (name, layer, field)
    assert list(trace.requests) == names
    for layer in capture.geometry:
        ids = as_numpy(capture.ids[layer.layer]).astype(int)
        counts = np.bincount(ids.ravel(), minlength=layer.experts)
        assert np.array_equal(trace.layer(layer.layer).counts(), counts)
    return True


@pytest.mark.parametrize(
    "worker",
    [
        {"logits": torch.bfloat16, "weights": torch.float32},
        {"experts": 300, "k": 8, "weights": torch.bfloat16, "hidden": torch.bfloat16, "logits": torch.float32},
        {"experts": 256, "k": 1, "weights": torch.float16},
    ],
)
def test_what_is_saved_is_what_was_captured(tmp_path: Path, worker: dict[str, Any]) -> None:
    capture = captured(**worker)
    assert len(capture) == 4
    assert capture.save(tmp_path / "t") == tmp_path / "t"
    trace = moe_trace.open(tmp_path / "t")
    assert same(trace, capture)
    assert [rank.state for rank in trace.ranks] == ["closed"]
    stored = next(iter(trace.ranks[0].blocks())).columns  # nothing is wider than it was
    for field, code in ((fmt.WEIGHTS, "weights"), (fmt.LOGITS, "logits"), (fmt.HIDDEN, "hidden")):
        assert STORED[getattr(capture[0], code)[3].dtype] == stored[field, 3][0]
    assert json.loads((trace.runs[0].directory / "rank-0" / "rank.json").read_text())["closed"] is True
    assert list(trace.requests) == ["0_0", "1_0", "0_1", "1_1"]
    metadata = trace.metadata
    assert (metadata["model"], metadata["captured"], metadata["weights_dtype"]) == ("fake/model", True, "exact")
    assert metadata["fields"] == list(ALL)
    experts, k = worker.get("experts", 16), worker.get("k", 2)
    assert [(e.layer, e.name, e.experts, e.top_k, e.status) for e in trace.coverage] == [
        (layer, f"layers.{layer}", experts, k, "exact") for layer in (3, 4)
    ]
    with pytest.raises(moe_trace.TraceError, match="tokens"):
        _ = trace.tokens


def test_tokens_are_stored_when_they_are_asked_for(tmp_path: Path) -> None:
    capture = captured(fields="ids")
    trace = moe_trace.open(capture.save(tmp_path, tokens=True))
    assert same(trace, capture)
    for sample in capture:
        assert trace.request(saved.name_of(sample)).tokens.tolist() == sample.token_ids.tolist()
    assert trace.metadata["fields"] == ["ids", "tokens"]
    with pytest.raises(moe_trace.TraceError, match="weights were not recorded"):
        _ = trace.layer(3).weights


def test_tokens_of_embeddings_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = captured([{"prompt_embeds": torch.zeros(3, 2)}, [5]], n=1)
    for block_bytes in (saved._BLOCK_BYTES, 1):  # whole, and each row for itself
        monkeypatch.setattr(saved, "_BLOCK_BYTES", block_bytes)
        trace = moe_trace.open(capture.save(tmp_path / str(block_bytes), tokens=True))
        assert same(trace, capture) and list(trace.requests) == ["0", "1"]
        assert trace.request("0").tokens.tolist() == [-1, -1, -1, 0, 1, 2]
        assert trace.request("1").tokens.tolist() == [5, 100, 101, 102]
    assert capture.trace.request("0").tokens.tolist() == [-1, -1, -1, 0, 1, 2]


def test_large_samples_are_cut_into_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = captured([[1] * 60, [2, 3], [4] * 33, [5]], n=1, fields="ids,logits")
    row = 2 * (2 + 2 * 16)  # bytes of two layers
    monkeypatch.setattr(saved, "_BLOCK_BYTES", 20 * row + 1)
    trace = moe_trace.open(capture.save(tmp_path, tokens=True))
    assert same(trace, capture)
    blocks = [block for rank in trace.ranks for block in rank.blocks()]
    assert [block.rows for block in blocks] == [20] * 5 + [8]  # of 63 + 5 + 36 + 4 rows
    assert np.concatenate([block.steps["step"] for block in blocks]).tolist() == list(range(9))
    assert [len(block.notes) for block in blocks] == [1, 0, 0, 2, 0, 1]
    monkeypatch.setattr(saved, "_BLOCK_BYTES", 1)  # less than a row
    trace = moe_trace.open(captured([[1, 2, 3]], n=1).save(tmp_path / "small"))
    assert trace.rows == 6 and trace.request("0").positions.tolist() == list(range(6))


def test_layers_that_were_missed_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 MoE layers of this model are not captured, such as layer 9: monolithic"):
        capture = captured(n=1, missed={9: "monolithic"})
    trace = moe_trace.open(capture.save(tmp_path))
    assert not trace.complete and trace.layer(4).request("1").rows == 8
    assert [(entry.layer, entry.status, entry.detail) for entry in trace.coverage][-1] == (9, "missed", "monolithic")


def test_saved_twice_it_is_two_runs(tmp_path: Path) -> None:
    first, second = captured(n=1), captured([[1, 2]], n=1, fields="ids")
    first.save(tmp_path)
    second.save(str(tmp_path))
    trace = moe_trace.open(tmp_path)
    assert len(trace.runs) == 2
    assert same(moe_trace.open(trace.runs[0].directory), first)
    assert same(moe_trace.open(trace.runs[1].directory), second)
    assert trace.rows == 9 + 8 + 5


def test_the_command_line_reads_it(tmp_path: Path) -> None:
    capture = captured()
    capture.save(tmp_path)
    command = [sys.executable, "-m", "moe_trace", "summary", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["complete"] is True and summary["model"] == "fake/model"
    assert [(layer["layer"], layer["rows"]) for layer in summary["layers"]] == [(3, 34), (4, 34)]


def test_a_capture_as_a_trace() -> None:
    capture = captured()
    trace = capture.trace
    assert capture.trace is trace and same(trace, capture)
    assert trace.request("0_1").tokens.tolist() == capture[2].token_ids.tolist()
    place = trace.path
    assert place.is_dir() and place.name.startswith("moe-native-capture-") and place.parent == saved._MEMORY
    rows = trace.layer(4).request("1_0")
    del trace, capture
    gc.collect()
    assert rows.rows == 9  # a selection holds its trace
    del rows
    gc.collect()
    assert not place.exists()


def test_where_memory_has_no_room_it_lies_with_the_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(saved.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    capture = captured()
    assert capture.trace.path.parent == tmp_path and same(capture.trace, capture)


def test_a_trace_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("no space")

    monkeypatch.setattr(saved, "_MEMORY", tmp_path)
    monkeypatch.setattr(saved, "SegmentWriter", fail)
    capture = captured()
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            _ = capture.trace
    assert list(tmp_path.iterdir()) == []
