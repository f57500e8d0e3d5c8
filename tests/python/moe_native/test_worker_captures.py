"""One worker that can be captured: armed from the start or late, and what it says when it cannot."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_llm import SamplingParams
from fake_vllm import Router, Runner, Worker, model, scheduled
from test_worker import started, without_vllm  # noqa: F401

import moe_trace
from moe_native.captures.regions import Memory
from moe_native.recorder import Recorder
from moe_native.vllm import metadata, worker

TOKEN = 7


@pytest.fixture(autouse=True)
def armed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", "1")
    monkeypatch.delenv("MOE_NATIVE_TRACE", raising=False)


class Seen(Worker):
    """Its model is called, as vLLM calls it, and its logits are remembered."""

    def __init__(self, **additional_config: Any) -> None:
        super().__init__(**additional_config)
        self.logits: list[torch.Tensor] = []

    def execute_model(self, scheduler_output: Any) -> int:
        rows, first = scheduler_output.total_num_scheduled_tokens, scheduler_output.first
        self.model_runner.positions[:rows] = torch.arange(first, first + rows)
        logits = torch.randn(rows, 8)
        self.model.forward = lambda: [
            runner.router.select_experts(torch.randn(rows, 4), logits) for runner in list(self.model)[1:]
        ]
        self.model()
        self.logits.append(logits)
        return rows


def ready(made: Worker | None = None) -> Any:
    made = Seen() if made is None else made
    worker.follow(made)
    made.load_model()
    made.compile_or_warm_up_model()
    return made


def open_capture(made: Any) -> Memory:
    answer = made.moe_native_capture("open", token=TOKEN, fields=["logits"], layers=None)
    assert [layer[0] for layer in answer["layers"]] == [1, 2] and answer["missed"] == []
    return Memory(answer["process"], answer["handle"], answer["identity"])


def marked(first: int, count: int, prompt: int) -> Any:
    output = scheduled(first, count, prompt)
    output.scheduled_new_reqs[0].sampling_params = SamplingParams(9, extra_args={"moe_native": [TOKEN, 0, 1]})
    return output


def finish(made: Any) -> None:
    """The scheduler says that the request has ended."""
    output = scheduled(0, 0)
    output.finished_req_ids = {"r-01234567"}
    made.execute_model(output)


def captures(made: Any) -> bool:
    """Whether a request is captured, each row."""
    memory = open_capture(made)
    made.execute_model(marked(0, 5, prompt=5))
    made.execute_model(scheduled(5, 1))
    answer = made.moe_native_capture("close", token=TOKEN)
    assert answer["requests"] == [{"sample": 0, "child": 0, "prompt": 5, "media": []}]
    columns = memory.read(answer["index_at"], answer["bytes"])[0, 0]
    logits = torch.cat(made.logits[-2:])
    finish(made)
    assert set(columns) == {(field, layer) for field in ("ids", "logits") for layer in (1, 2)}
    for layer in (1, 2):
        assert torch.equal(columns["logits", layer].rows(0, 6), logits)
        chosen = logits.softmax(-1).topk(2, dim=-1, sorted=False).indices
        assert torch.equal(columns["ids", layer].rows(0, 6), chosen.to(torch.uint8))
    return True


def said(made: Any) -> str:
    answer = made.moe_native_capture("open", token=TOKEN, fields=["ids"], layers=None)
    assert set(answer) == {"error"}
    return str(answer["error"])


def test_a_life_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "moe_native")
    made = Seen()
    worker.follow(made)
    assert said(made) == "the model has not been loaded yet"
    made.load_model()
    made.compile_or_warm_up_model()
    assert "recording 2 of 2 MoE layers when they are captured" in caplog.text
    made.execute_model(scheduled(0, 3, prompt=5))
    assert made.moe_native.recorder.counters()["paused"] is None  # no step was even begun
    finish(made)
    assert captures(made)
    made.shutdown()
    assert said(made) == "the engine is shut down"
    assert list(tmp_path.iterdir()) == [] and made.moe_native.errors == {}
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_with_a_trace_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_NATIVE_TRACE", str(tmp_path / "t"))
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", "0")  # a worker that has a trace can be captured all the same
    made = ready()
    assert captures(made)
    made.shutdown()
    trace = moe_trace.open(tmp_path / "t")
    assert trace.complete and trace.request("r").positions.tolist() == list(range(6))


def test_rows_are_announced_once_something_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[int] = []
    announce = Recorder.announce
    monkeypatch.setattr(Recorder, "announce", lambda self, runs: announced.append(len(runs)) or announce(self, runs))
    made = ready()
    assert len(made.model._forward_pre_hooks) == 0
    assert captures(made) and captures(made)
    assert len(made.model._forward_pre_hooks) == 1
    assert announced == [16] * 4  # a run each
    made.shutdown()


def test_a_failure_to_announce_costs_no_row(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise LookupError("a fault of ours")

    monkeypatch.setattr(Recorder, "announce", fail)
    made = ready()
    assert captures(made) and made.moe_native.errors == {"announcing rows": 2}
    made.shutdown()


# Late.


def served() -> Seen:
    """A worker that was made before anything was armed."""
    made = Seen()
    made.load_model()
    made.compile_or_warm_up_model()
    made.execute_model(scheduled(0, 5, prompt=5))
    return made


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_worker_that_runs_eagerly_is_bound_late(wrapped: bool) -> None:
    made = served()
    given = SimpleNamespace(worker=made) if wrapped else made
    assert worker.follow_loaded(given) is None
    recorder = made.moe_native.recorder  # type: ignore[attr-defined]
    assert captures(made)
    assert worker.follow_loaded(given) is None and made.moe_native.recorder is recorder  # type: ignore[attr-defined]
    assert captures(made)
    made.shutdown()


def test_a_compiled_one_is_not() -> None:
    made = served()
    made.model_config.enforce_eager = False
    attributes = set(vars(made))
    assert worker.follow_loaded(made) == {"error": "its model is compiled, without what records"}
    assert set(vars(made)) == attributes


def test_one_of_a_shape_that_is_not_known_says_so_each_time() -> None:
    made = served()
    del made.model_runner.positions
    answer = worker.follow_loaded(made)
    assert answer is not None and "UnknownVLLM" in answer["error"] and "positions" in answer["error"]
    assert said(made) == f"it could not be bound: {answer['error']}"
    assert made.execute_model is not None and made.moe_native.recorder is None  # type: ignore[attr-defined]


# What cannot be captured.


class Other(Worker):
    """One whose MoE layers are `runners`."""

    runners: tuple[Any, ...] = ()

    def load_model(self) -> None:
        super().load_model()
        self.model = model(*self.runners)

    def compile_or_warm_up_model(self) -> str:
        return "warm"


def test_a_model_without_experts() -> None:
    assert said(ready(Other())) == "fake has no MoE layer that is known here"


def test_layers_that_cannot_be_seen() -> None:
    monolithic = Runner("model.layers.4.mlp.experts", Router(), monolithic=True)
    made = Other()
    made.runners = (monolithic,)
    assert said(ready(made)).startswith("none of its MoE layers can be seen, such as layer 4: ")
    made = Other()
    made.runners = (Runner("model.layers.3.mlp.experts", Router()), monolithic)
    answer = ready(made).moe_native_capture("open", token=TOKEN, fields=["ids"], layers=None)
    assert answer["layers"] == [[3, 8, 2, "model.layers.3.mlp.experts"]]
    assert [layer for layer, _ in answer["missed"]] == [4] and answer["missed"][0][1]
    made.shutdown()


@pytest.mark.parametrize(("traced", "lost"), [(True, "neither recorded nor captured"), (False, "not captured")])
def test_the_log_says_what_is_lost_of_a_layer_that_cannot_be_seen(
    traced: bool, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if traced:
        monkeypatch.setenv("MOE_NATIVE_TRACE", str(tmp_path / "t"))
    made = Other()
    made.runners = (
        Runner("model.layers.3.mlp.experts", Router()),
        Runner("model.layers.4.mlp.experts", Router(), monolithic=True),
    )
    ready(made).shutdown()
    assert f"1 MoE layers are {lost}, such as layer 4: " in caplog.text


@pytest.mark.parametrize("traced", [True, False])
def test_the_traces_layers_are_not_those_of_captures(
    traced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOE_NATIVE_LAYERS", "7")
    if traced:
        monkeypatch.setenv("MOE_NATIVE_TRACE", str(tmp_path / "t"))
    caplog.set_level("INFO", "moe_native")
    made = ready()
    nothing = "nothing is recorded into the trace: none of the model's layers, up to 2, is asked for"
    assert (nothing if traced else "recording 2 of 2 MoE layers when they are captured") in caplog.text
    assert captures(made)
    made.shutdown()


def test_routers_that_could_not_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_native.vllm.routers.find", lambda *_: 1 / 0)
    assert said(ready()) == "its routers could not be bound: see the engine's log"


def test_a_rank_that_leaves_it_to_another_one_has_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = metadata.parallel_layout(None)
    monkeypatch.setattr(metadata, "parallel_layout", lambda _: {**layout, "tensor_parallel_rank": 1})
    made = ready()
    assert made.moe_native_capture("open", token=TOKEN, fields=["ids"], layers=None) is None
    assert made.moe_native_capture("close", token=TOKEN) is None


def test_one_that_is_not_armed_knows_of_no_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", "0")
    made = started()
    assert not hasattr(made, "moe_native_capture") and os.environ["MOE_NATIVE_CAPTURE"] == "0"
