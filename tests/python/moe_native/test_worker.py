"""One worker's life with recording: what is recorded when, and that no failure of ours reaches it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import Worker, scheduled

import moe_trace
from moe_native.vllm import metadata, worker
from moe_native.vllm.steps import Steps


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {
        f"{g}_parallel_{what}": int(what == "size") for g in ("tensor", "pipeline", "data") for what in ("size", "rank")
    }
    monkeypatch.setattr(metadata, "parallel_layout", lambda _: layout)
    monkeypatch.setattr(metadata, "describe", lambda *_: {"model": "fake"})
    # Another test may have made an engine in this process, whose log goes to vLLM's handlers.
    monkeypatch.setattr(logging.getLogger("moe_native"), "propagate", True)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "trace"
    monkeypatch.setenv("MOE_NATIVE_TRACE", str(path))
    return path


def started(**additional_config: Any) -> Worker:
    """A worker that is ready for its first request."""
    made = Worker(**additional_config)
    worker.follow(made)
    made.load_model()
    assert made.compile_or_warm_up_model() == "warm"
    return made


def test_a_life(trace: Path) -> None:
    made = started()
    assert made.execute_model(scheduled(0, 5, prompt=5)) == 5
    assert made.execute_model(scheduled(5, 1)) == 1
    made.shutdown()
    made.shutdown()
    assert made.calls == [
        "load_model", "compile_or_warm_up_model", *["execute_model"] * 3, *["shutdown"] * 2
    ]  # fmt: skip
    read = moe_trace.open(trace)
    assert read.complete and read.rows == 6  # the 64 rows of the warm-up are not among them
    assert read.request("r").positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert [layer.layer for layer in read.coverage] == [1, 2]


@pytest.mark.parametrize(
    ("layers", "said"), [("1", "recording 1 of 2 MoE layers"), ("7", "none of the model's layers, up to 2, is asked")]
)
def test_the_log_says_how_many_layers_are_recorded(
    trace: Path, layers: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOE_NATIVE_LAYERS", layers)
    caplog.set_level("INFO", "moe_native")
    made = started()
    made.execute_model(scheduled(0, 5, prompt=5))
    made.shutdown()
    assert said in caplog.text


def test_nothing_is_wrapped_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_NATIVE_TRACE", raising=False)
    made = Worker(other={"key": 1})
    attributes = set(vars(made))
    worker.follow(made)
    assert set(vars(made)) == attributes
    assert made.vllm_config.additional_config == {"other": {"key": 1}}


def test_the_compile_cache_is_salted_with_a_constant_before_the_model_is_loaded(tmp_path: Path) -> None:
    salts = []
    for name in ("one", "two"):
        made = Worker(other=1, moe_native={"trace": str(tmp_path / name)})
        worker.follow(made)
        assert not made.calls
        salts.append(made.vllm_config.additional_config)
    assert salts[0] == salts[1] == {"other": 1, "moe_native": {"salt": "record-1", "first": 0}}


def test_two_workers_of_a_process_have_graphs_of_their_own(tmp_path: Path) -> None:
    first, second = (started(moe_native={"trace": str(tmp_path / name)}) for name in ("one", "two"))
    assert second.vllm_config.additional_config["moe_native"]["first"] == 2
    first.execute_model(scheduled(0, 4, prompt=4))
    second.execute_model(scheduled(0, 3, prompt=3))
    first.shutdown()
    second.shutdown()
    assert [moe_trace.open(tmp_path / name).rows for name in ("one", "two")] == [4, 3]


def test_a_forward_pass_that_raises_is_a_counted_loss_and_still_raises(trace: Path) -> None:
    made = started()
    made.forward_error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        made.execute_model(scheduled(0, 5, prompt=5))
    made.forward_error = None
    made.execute_model(scheduled(0, 5))
    made.shutdown()
    read = moe_trace.open(trace)
    assert read.rows == 5 and read.losses["aborted"].steps == 1


def failing(*_: Any, **__: Any) -> Any:
    raise LookupError("a fault of ours")


@pytest.mark.parametrize("what", ["begin", "end"])
def test_our_own_failure_in_a_step_is_counted_and_said_once(
    what: str, trace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = started()
    with monkeypatch.context() as broken:
        broken.setattr(Steps, what, failing)
        assert [made.execute_model(scheduled(0, 5, prompt=5)) for _ in range(3)] == [5, 5, 5]
    assert made.execute_model(scheduled(5, 2)) == 2
    made.shutdown()
    read = moe_trace.open(trace)
    assert read.rows == 2
    assert sum(read.metadata["errors"].values()) == 3
    assert sum("a fault of ours" in record.getMessage() for record in caplog.records) == 1
    if what == "end":
        assert read.losses["aborted"].steps == 3


def test_a_trace_that_cannot_be_made_does_not_stop_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_NATIVE_TRACE", str(tmp_path / "file"))
    made = started()
    assert made.execute_model(scheduled(0, 5, prompt=5)) == 5
    made.shutdown()
    assert sum("binding the routers failed" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("ours", ["on", 5, ["trace"], {"tracee": "/t"}, {"trace": "/t", "layers": "x"}])
def test_wrong_settings_are_said_in_one_line_and_nothing_is_recorded(
    ours: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = started(moe_native=ours)
    assert made.execute_model(scheduled(0, 5, prompt=5)) == 5
    said = [record.getMessage() for record in caplog.records if "moe_native:" in record.getMessage()]
    assert len(said) == 1 and "\n" not in said[0]
    assert "load_model" not in vars(made)


def test_a_model_without_experts_is_said(
    trace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("moe_native.vllm.routers.find", lambda *_: [])
    made = started()
    assert made.execute_model(scheduled(0, 5, prompt=5)) == 5
    made.shutdown()
    assert "has no MoE layer" in caplog.text
    assert moe_trace.open(trace).rows == 0


def test_other_ranks_of_a_tensor_parallel_group_do_not_record(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = metadata.parallel_layout(None)
    monkeypatch.setattr(metadata, "parallel_layout", lambda _: {**layout, "tensor_parallel_rank": 1})
    made = started()
    made.execute_model(scheduled(0, 5, prompt=5))
    made.shutdown()
    assert not trace.exists()


def test_rank_names() -> None:
    layout = metadata.parallel_layout(None)
    assert metadata.rank_name(0, layout) == "rank-0"
    layout = {**layout, "tensor_parallel_size": 2, "data_parallel_size": 4, "data_parallel_rank": 3}
    assert metadata.rank_name(6, layout) == "rank-6-tp0-dp3"


def test_the_recorder_is_closed_without_a_shutdown(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process that just ends: the recorder closes itself at exit."""
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda function, *_: registered.append(function) or function)
    made = started()
    made.execute_model(scheduled(0, 5, prompt=5))
    for function in registered:
        function()
    assert moe_trace.open(trace).complete
    made.shutdown()


def test_commands_to_a_worker(trace: Path) -> None:
    made = Worker()
    worker.follow(made)
    assert made.moe_native_ctl("status") is None  # type: ignore[attr-defined]  # nothing records yet
    made = started()
    control = made.moe_native_ctl  # type: ignore[attr-defined]
    assert control()["state"] == "recording"
    assert control("set", {"fields": "counts"})["fields"] == ["counts"]
    made.execute_model(scheduled(0, 5, prompt=5))
    assert control("pause")["state"] == "paused"
    made.execute_model(scheduled(5, 1))
    assert control("stop")["ok"] is False
    made.shutdown()
    read = moe_trace.open(trace)
    assert (read.rows, read.executed_rows, read.paused.rows) == (0, 5, 1) and read.complete and not read.requests
