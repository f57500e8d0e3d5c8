"""Recorder: arguments that cannot be used, programs that misuse it, and disks that fail it."""

from __future__ import annotations

import os
import resource

import numpy as np
import pytest
import torch
from routed_program import EXPERTS, LAYERS, K, Program

import moe_native
import moe_trace
from moe_native.runs import RUN_DTYPE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fields": ["idz"]}, "'idz' is not a field.*ids, weights"),
        ({"overflow": "wait"}, "use drop or block"),
        ({"weights_dtype": "int8"}, "use float16 or exact"),
        ({"max_bytes": 1000}, "1 MiB"),
        ({"max_bytes": 1 << 20, "segment_bytes": 1 << 20}, "half of max_bytes"),
        ({"flush_seconds": 0}, "above 0"),
        ({"ring_bytes": 10}, "64 KiB"),
        ({"ring_dir": "/not/there"}, "no such directory"),
        ({"max_bytes": "much"}, "not a size"),
        ({"lanes": 0}, "lanes must be between"),
        ({"rank": "../x"}, "not a name"),
    ],
)
def test_unusable_arguments_are_told(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        moe_native.Recorder(tmp_path / "t", **arguments)
    assert not list(tmp_path.glob("t/*")), "nothing is left behind"


def test_arguments_may_be_written_as_settings_are(tmp_path):
    with moe_native.Recorder(
        str(tmp_path / "t"), fields="ids,logits", layers="0,2-3", max_bytes="4MiB", ring_bytes="1MiB"
    ) as recorder:
        assert recorder.fields == ("ids", "logits") and recorder.layers == {0, 2, 3}


def test_a_ring_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "rings").mkdir()
    (tmp_path / "rings").chmod(0o500)
    if os.access(tmp_path / "rings", os.W_OK):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)  # root may write everywhere
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(OSError, match=r"rings"):
            moe_native.Recorder(tmp_path / "t", ring_dir=tmp_path / "rings", ring_bytes=4 << 20)
    finally:
        if os.access(tmp_path / "rings", os.W_OK):
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.glob("t/*"))


@pytest.mark.parametrize("what", ["well again when it closes", "takes no segment at all"])
def test_a_dead_disk_is_a_loss_that_the_trace_tells(tmp_path, what):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = moe_native.Recorder(tmp_path, ring_bytes=64 << 10, flush_seconds=0.01)
    program = Program(recorder)
    if what == "takes no segment at all":
        (recorder.directory / "000000.moe.open").mkdir()
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        for step in range(100):
            with recorder.step(requests=["a"], positions=[range(8 * step, 8 * step + 8)]):
                program.forward(8)
        with pytest.raises(TimeoutError):
            recorder.flush(1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    recorder.close()
    trace = moe_trace.open(tmp_path)
    lost = trace.losses["io_error"]
    # Steps that the drain thread had not seen when the disk failed wait in the ring, and are kept if it is well again.
    kept = trace.rows // 8 if what == "well again when it closes" else 0
    assert 0 < lost.steps == 100 - kept and lost.rows == 8 * lost.steps
    assert not trace.complete


def test_misuse_of_record_is_told(tmp_path, caplog):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        program.forward(3)
        with pytest.raises(ValueError, match="binding 99 is none"):
            recorder.record(99, torch.zeros(3, K, dtype=torch.int64), torch.zeros(3, K))
    assert "no step was ever opened" in caplog.text


def test_misuse_is_told(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        with pytest.raises(ValueError, match="65534"):
            recorder.bind(70_000, experts=4, top_k=2)
        with pytest.raises(ValueError, match="logits=-1 is no width"):
            recorder.bind(1, experts=8, top_k=2, logits=-1)
        with pytest.raises(ValueError, match="how many rows"), recorder.step():
            pass
        with pytest.raises(ValueError, match="2 requests, but positions for 1"), recorder.step(["a", "b"], [range(3)]):
            pass
        with pytest.raises(ValueError, match="one name a row"), recorder.step(["a"], [1, 2]):
            pass
        assert recorder.begin_step(3)
        with pytest.raises(RuntimeError, match="open already"):
            recorder.begin_step(1)
        runs = np.zeros(1, RUN_DTYPE)
        runs["count"] = 2
        with pytest.raises(ValueError, match="the runs have 2 rows, the step has 3"):
            recorder.end_step(runs)
        recorder.abort_step()
    with pytest.raises(RuntimeError, match="closed"):
        recorder.bind(0, experts=4, top_k=2)
    recorder.close()


def test_a_bound_layer_that_is_never_called_is_a_loss(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)
        recorder.bind(LAYERS, experts=EXPERTS, top_k=K, name="silent")
        recorder.bind(LAYERS + 1, experts=EXPERTS, top_k=K, name="now and then", every_step=False)
        with recorder.step(rows=4):
            program.forward(4)
        assert recorder.counters()["lost"] == {"incomplete": {"steps": 0, "layers": 1, "rows": 4}}
    trace = moe_trace.open(tmp_path / "t")
    assert not trace.complete and trace.rows == 4
    ledger = {line["layer"]: line.get("every_step", True) for line in trace.metadata["layers"]}
    assert ledger == {0: True, 1: True, 2: True, 3: True, 4: False}


def test_a_disk_error_does_not_reach_the_model(tmp_path, monkeypatch, caplog):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        program = Program(recorder)

        def full(**items):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(recorder._file, "update", full)
            with recorder.step(rows=4):
                program.forward(4)
        assert "No space left" in caplog.text
    assert len(moe_trace.open(tmp_path / "t").metadata["layers"]) == LAYERS


def test_numbers_of_numpy_are_numbers(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        recorder.bind(np.int64(3), experts=np.int32(EXPERTS), top_k=np.int64(K))
        recorder.miss(np.int64(4), name="fused", detail="it routes by itself")
        with pytest.raises(TypeError):
            recorder.bind(1.5, experts=EXPERTS, top_k=K)
    assert [line["layer"] for line in moe_trace.open(tmp_path / "t").metadata["layers"]] == [3, 4]


@pytest.mark.parametrize("item", [object(), float("nan")])
def test_metadata_that_is_no_json_changes_nothing(tmp_path, item):
    with moe_native.Recorder(tmp_path / "t", metadata={"model": "m"}) as recorder:
        with pytest.raises((TypeError, ValueError)):
            recorder.update_metadata(x=item)
        recorder.update_metadata(seed=3)
    metadata = moe_trace.open(tmp_path / "t").metadata
    assert metadata["model"] == "m" and metadata["seed"] == 3 and "x" not in metadata


def test_logits_that_are_not_rows_are_told(tmp_path):
    with moe_native.Recorder(tmp_path / "t", fields=["ids", "weights", "logits"]) as recorder:
        binding = recorder.bind(0, experts=EXPERTS, top_k=K)
        logits = torch.randn(1, 4, EXPERTS)
        weights, ids = logits[0].softmax(-1).topk(K)
        with recorder.step(rows=4):
            recorder.record(binding, ids, weights, logits)
        assert recorder.counters()["lost"] == {"bad_input": {"steps": 0, "layers": 1, "rows": 4}}
