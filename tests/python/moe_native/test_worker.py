"""One worker's life with recording: what is recorded when, and that no failure of ours reaches it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import Worker, scheduled

import moe_trace
from moe_native.vllm import metadata, worker
from moe_native.vllm.steps import Steps


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {
        f"{g}_parallel_{what}": int(what == "size") for g in ("tensor", "pipeline", "data") for what in ("size", "rank")
    }
    layout |= {"sequence_parallel": 0, "microbatches": 1, "prefill_context_parallel_size": 1}
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
        assert sum(moe_trace.open(trace).metadata["errors"].values()) == 1  # said at once: the process may be killed
    assert made.execute_model(scheduled(5, 2)) == 2
    made.shutdown()
    read = moe_trace.open(trace)
    assert read.request("r").rows == 2
    assert read.rows == (2 if what == "begin" else 17)  # the others are nobody's
    assert list(read.metadata["errors"].values()) == [3]
    assert [problem for problem in read.problems if "failed in" in problem and "3 times" in problem] == read.problems
    assert sum("a fault of ours" in record.getMessage() for record in caplog.records) == 1
    if what == "begin":
        assert read.losses["aborted"].steps == 3
    assert read.request("r").step_numbers.tolist() == [3, 3]  # other ranks have counted the steps before as well


def test_a_step_that_cannot_even_be_closed_is_given_up(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = started()
    with monkeypatch.context() as broken:
        broken.setattr(Steps, "end", failing)
        broken.setattr(Steps, "end_as_nobodys", failing)
        assert [made.execute_model(scheduled(0, 5, prompt=5)) for _ in range(3)] == [5, 5, 5]
    made.execute_model(scheduled(5, 2))
    made.shutdown()
    read = moe_trace.open(trace)
    assert read.rows == 2 and read.losses["aborted"].steps == 3


# A vLLM that is not known: nothing is recorded that is not sure, it is said once, and the engine serves on.


class WithoutWarmUp(Worker):
    compile_or_warm_up_model = property()  # type: ignore[assignment]


class OtherArguments(Worker):
    def execute_model(self, batch: Any, output: Any = None) -> int:  # type: ignore[override]
        return super().execute_model(batch)


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [(WithoutWarmUp, "compile_or_warm_up_model"), (OtherArguments, "execute_model(scheduler_output)")],
)
def test_a_worker_of_another_shape_is_not_touched(
    kind: type[Worker], lacks: str, trace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = kind()
    attributes = set(vars(made))
    worker.follow(made)
    made.load_model()
    assert [made.execute_model(scheduled(0, 5, prompt=5)) for _ in range(2)] == [5, 5]
    assert set(vars(made)) - attributes == {"model"} and not made.vllm_config.additional_config
    (said,) = [record.getMessage() for record in caplog.records]
    assert "nothing is recorded" in said and f"it has no {lacks} (" in said and said.endswith("; vLLM serves on")
    assert not trace.exists()


@pytest.mark.parametrize("lacks", [("positions",), ("get_model",), ("execute_model_state", "input_batch")])
def test_a_runner_of_another_shape_is_not_bound(
    lacks: tuple[str, ...], trace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Future(Worker):
        def load_model(self) -> None:
            super().load_model()
            for name in lacks:
                delattr(self.model_runner, name)

    made = Future()
    worker.follow(made)
    made.load_model()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "nothing is recorded" in said[0]
    assert f"it has no {lacks[0]} (" in said[0]
    assert not any("_compute_routing" in vars(layer.router) for layer in list(made.model)[1:])
    assert not trace.exists()


def test_a_scheduler_whose_output_is_not_known_ends_the_recording(
    trace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = started()
    for first in range(3):
        output = scheduled(first, 1, prompt=5)
        output.tokens_by_request = output.num_scheduled_tokens
        del output.num_scheduled_tokens
        assert made.execute_model(output) == 1
    assert made.execute_model(scheduled(3, 1)) == 1
    made.shutdown()
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1 and "nothing is recorded" in said[0] and "num_scheduled_tokens" in said[0]
    read = moe_trace.open(trace)
    assert read.rows == 0 and len(read.problems) == 1 and "scheduler's output" in read.problems[0]


def test_requests_that_come_without_a_warm_up_are_not_recorded(trace: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Worker()
    worker.follow(made)
    made.load_model()
    assert made.execute_model(scheduled(0, 5, prompt=5)) == 5  # may be somebody's, may be a warm-up of another name
    assert made.compile_or_warm_up_model() == "warm"
    assert made.execute_model(scheduled(5, 1)) == 1
    made.shutdown()
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1 and "compile_or_warm_up_model" in said[0]
    assert moe_trace.open(trace).rows == 0


def test_rows_of_a_batch_that_cannot_be_read_are_nobodys(trace: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = started()
    made.execute_model(scheduled(0, 5, prompt=5))
    # As in the newer runner, whose batch is there only after a step; of this one the positions are not known.
    batch = SimpleNamespace(req_ids=["r-01234567"], num_reqs=1)
    made.model_runner.execute_model_state = SimpleNamespace(input_batch=batch)
    assert [made.execute_model(scheduled(n, 1)) for n in (5, 6)] == [1, 1]
    made.model_runner.execute_model_state = None
    made.execute_model(scheduled(7, 1))
    made.shutdown()
    read = moe_trace.open(trace)
    assert read.rows == 8 and read.request("r").positions.tolist() == [0, 1, 2, 3, 4, 7]
    assert read.metadata["errors"] == {"telling whose rows are whose": 2}
    assert sum("telling whose rows are whose failed" in record.getMessage() for record in caplog.records) == 1


def test_a_second_warm_up_is_not_recorded(trace: Path) -> None:
    """As vLLM's elastic expert parallelism does it, in the middle of serving."""
    made = started()
    made.execute_model(scheduled(0, 5, prompt=5))
    made.compile_or_warm_up_model()
    made.execute_model(scheduled(5, 1))
    made.shutdown()
    assert moe_trace.open(trace).rows == 6


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


def test_sequence_parallel_ranks_record_their_rows(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data-parallel ranks of two: what each worker records, and that they share a run. The first layer sees the
    rows of all ranks; the second one's tensors are of no layout."""
    monkeypatch.setattr("moe_native.vllm.forward._batches", lambda _: ([[5, 3]], 0))
    layout = metadata.parallel_layout(None)
    layout |= {"tensor_parallel_size": 2, "data_parallel_size": 2, "sequence_parallel": 1}

    class Placed(Worker):
        def execute_model(self, scheduler_output: Any) -> int:
            first_row = scheduler_output.first
            self.model_runner.positions[:5] = torch.arange(first_row, first_row + 5)
            first, second = (runner.router for runner in list(self.model)[1:])
            self.model.forward = lambda: first.select_experts(torch.randn(8, 4), LOGITS)
            self.model()
            second.select_experts(torch.randn(9, 4), torch.randn(9, 8))
            return 5

    ranks = []
    for rank in range(2):
        monkeypatch.setattr(metadata, "parallel_layout", lambda _, rank=rank: {**layout, "tensor_parallel_rank": rank})
        made = Placed()
        made.rank = rank
        made.vllm_config.instance_id = "1234_dp0"
        worker.follow(made)
        made.load_model()
        made.compile_or_warm_up_model()
        made.execute_model(scheduled(0, 5, prompt=5))
        ranks.append(made)
    for made in ranks:
        made.shutdown()
    read = moe_trace.open(trace)
    assert len(read.runs) == 1 and [of.name for of in read.ranks] == ["rank-0-tp0-dp0", "rank-1-tp1-dp0"]
    assert [batch.positions.tolist() for batch in read.batches()] == [[0, 1, 2], [3, 4]]
    assert read.request("r").layer(1).positions.tolist() == [0, 1, 2, 3, 4]
    chosen = LOGITS[:5].softmax(-1).topk(2, dim=-1, sorted=False).indices
    assert read.layer(1).ids.tolist() == chosen.tolist()
    assert read.losses["bad_input"].layers == 2 and not read.complete


LOGITS = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layout",
    [{"data_parallel_size": 2}, {"sequence_parallel": 1, "tensor_parallel_size": 2}, {"microbatches": 2}, {}],
)
def test_the_model_has_a_hook_only_where_rows_may_lie_elsewhere(
    layout: dict[str, int], trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = metadata.parallel_layout(None)
    monkeypatch.setattr(metadata, "parallel_layout", lambda _: {**plain, **layout})
    made = started()
    assert len(made.model._forward_pre_hooks) == int(bool(layout))
    made.shutdown()


def test_prefill_context_parallelism_and_whole_graphs_are_named_holes(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = {**metadata.parallel_layout(None), "prefill_context_parallel_size": 2}
    monkeypatch.setattr(metadata, "parallel_layout", lambda _: layout)
    made = started()
    made.execute_model(scheduled(0, 5, prompt=5))
    made.shutdown()
    read = moe_trace.open(trace)
    assert read.rows == 0 and not read.complete
    assert ["context parallelism" in layer.detail for layer in read.coverage] == [True, True]


def test_the_first_run_of_an_engine_has_nothing_to_recover(trace: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Worker()
    made.vllm_config.instance_id = "1234"
    worker.follow(made)
    made.load_model()
    made.shutdown()
    assert not [record for record in caplog.records if "recover" in record.getMessage()]
    key = metadata.engine_key(made.vllm_config)
    assert [path.name.endswith(f"Z-{key}") for path in trace.iterdir()] == [True]


def test_engine_keys() -> None:
    """One for an engine and its data-parallel ranks, another for the next."""
    keys = [metadata.engine_key(SimpleNamespace(instance_id=name)) for name in ("a1b2c", "a1b2c_dp0", "a1b2c_dp12")]
    assert len(set(keys)) == 1 and keys[0] is not None and keys[0].isalnum()
    assert metadata.engine_key(SimpleNamespace(instance_id="a1b2d")) != keys[0]
    assert metadata.engine_key(SimpleNamespace(instance_id="")) is None
    assert metadata.engine_key(SimpleNamespace()) is None


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
