"""`capture` on a stand-in for vLLM's engines: what it asks the workers, what it gives, and what it says when something
is wrong. `acapture` is in test_capture_async.py."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_llm import LLM, Idle, SamplingParams, Worker, shut_down

import moe_native
from moe_native.captures import call, engine
from moe_native.capturing import Closed
from moe_native.vllm import worker as vllm_worker

PROMPTS = ["first prompt", [5, 6, 7], "ab"]


@pytest.fixture(autouse=True)
def workers_end() -> Iterator[None]:
    yield
    shut_down()


def matches(
    capture: moe_native.Capture, llm: LLM, fields: Any = ("ids", "weights", "logits"), workers: Any = None
) -> bool:
    """Whether each row of each sample is the one that the workers' models made."""
    models = [worker.model for worker in workers or llm.workers]
    assert capture.fields == tuple(fields)
    for sample in capture:
        name = llm.names[sample.prompt_index, sample.completion_index]
        assert len(sample) == len(sample.request_output.prompt_token_ids) + len(sample.completion.token_ids) - 1
        for layer in capture.layers:
            (model, *_) = [model for model in models if layer in model.layers]
            for field in fields:
                found = getattr(sample, field)[layer]
                expected = model.rows(field, layer, name, range(len(sample))).to(found.dtype)
                assert torch.equal(found, expected), (sample, field, layer)
    return True


def test_outputs_and_samples_are_in_the_order_of_the_prompts() -> None:
    llm = LLM()
    params = [SamplingParams(3), SamplingParams(5, n=3), SamplingParams(1)]
    capture = moe_native.capture(llm, PROMPTS, params)
    assert matches(capture, llm)
    assert [len(output.prompt_token_ids) for output in capture.outputs] == [12, 3, 2]
    keys = [(sample.prompt_index, sample.completion_index) for sample in capture]
    assert keys == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [len(sample) for sample in capture] == [14, 7, 7, 7, 2]
    assert len(capture) == 5 and capture[-1] is list(capture)[4] and len(capture[1:3]) == 2
    assert repr(capture) == "<moe_native.Capture of 5 samples, 37 rows: ids, weights, logits of 3 layers>"
    assert set(capture.logits) == {0, 1, 2} and capture.logits[1].shape == (37, 16)
    assert torch.equal(capture.ids[2], torch.cat([sample.ids[2] for sample in capture]))
    with pytest.raises(KeyError, match="hidden were not captured: name them in fields="):
        _ = capture.hidden
    assert capture.model == "fake/model" and capture.missed == {}
    assert [(layer.layer, layer.experts, layer.top_k, layer.name) for layer in capture.geometry] == [
        (0, 16, 2, "layers.0"), (1, 16, 2, "layers.1"), (2, 16, 2, "layers.2")
    ]  # fmt: skip


def test_all_samples_by_layer_are_joined_when_a_layer_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()
    capture = moe_native.capture(llm, PROMPTS, SamplingParams(2, n=2), fields="logits", layers="0,2")
    cat = torch.cat
    joined: list[int] = []

    def counted(parts: list[torch.Tensor]) -> torch.Tensor:
        joined.append(len(parts))
        return cat(parts)

    monkeypatch.setattr(torch, "cat", counted)
    logits = capture.logits
    assert list(logits) == [0, 2] and len(logits) == 2 and 2 in logits and 7 not in logits
    assert repr(logits) == "<logits of 2 layers (0 to 2), (40, 16) in layer 0>"
    assert joined == []
    expected = cat([sample.logits[2] for sample in capture])
    assert torch.equal(logits[2], expected) and joined == [6]
    with pytest.raises(KeyError, match="layer 1 was not captured; these were: 0, 2"):
        logits[1]
    assert logits.get(1) is None
    assert {layer: tuple(tensor.shape) for layer, tensor in logits.items()} == {0: (40, 16), 2: (40, 16)}
    as_dict = pickle.loads(pickle.dumps(logits))
    assert type(as_dict) is dict and torch.equal(as_dict[2], expected)
    of_sample = pickle.loads(pickle.dumps(capture[0].ids))
    assert type(of_sample) is dict and torch.equal(of_sample[0], capture[0].ids[0])
    logits[2].zero_()  # a copy
    assert torch.equal(logits[2], expected) and torch.equal(capture[0].logits[2], expected[:13])


def test_fields_layers_and_options() -> None:
    llm = LLM()
    capture = moe_native.capture(llm, "abc", fields=["hidden"], layers="1-2", lora_request="l", use_tqdm=True)
    assert matches(capture, llm, ("ids", "hidden")) and capture.layers == [1, 2] == capture[0].layers
    assert llm.options == {"use_tqdm": True, "lora_request": "l"}
    assert llm.given[0].max_tokens == 2  # the model's own defaults
    assert llm.calls == ["open", "close"]
    capture = moe_native.capture(llm, "abc", fields=None, layers=np.array([0, 2]))
    assert matches(capture, llm) and capture.layers == [0, 2]


def test_one_after_the_other_and_again() -> None:
    llm = LLM()
    captures = [moe_native.capture(llm, [text, "x"], SamplingParams(3)) for text in ("one", "two")]
    assert matches(captures[1], llm)
    assert not torch.equal(captures[0][0].logits[0], captures[1][0].logits[0])


def test_the_callers_parameters_are_marked_in_a_copy() -> None:
    llm = LLM()
    mine = SamplingParams(3, n=2, extra_args={"theirs": [1]})
    moe_native.capture(llm, ["a", "b"], mine)
    moe_native.capture(llm, ["a"], mine)
    assert mine.extra_args == {"theirs": [1]} and mine.skip_reading_prefix_cache is None
    assert (mine.n, mine.max_tokens) == (2, 3)
    llm = LLM()
    moe_native.capture(llm, ["a", "b"], [mine, SamplingParams(1)])
    first, second = llm.given
    token = first.extra_args["moe_native"][0]
    assert first.extra_args == {"theirs": [1], "moe_native": [token, 0, 2]}
    assert second.extra_args == {"moe_native": [token, 1, 1]}
    assert first.skip_reading_prefix_cache is True is second.skip_reading_prefix_cache
    assert 0 <= token < 1 << 63  # as vLLM's messages can carry


def test_what_the_engine_has_under_way_already_is_not_ours() -> None:
    """vLLM returns every request that it finishes, also those of an earlier call."""
    llm = LLM()
    llm.enqueue(["left over, and longer", "b"], [SamplingParams(9), SamplingParams(1, n=2)])
    capture = moe_native.capture(llm, PROMPTS, SamplingParams(3))
    assert matches(capture, llm)
    assert [output.request_id for output in capture.outputs] == ["2", "3", "4"]
    assert [len(output.prompt_token_ids) for output in capture.outputs] == [12, 3, 2]


def test_an_engine_that_loses_a_prompt_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()
    generate = llm.generate
    monkeypatch.setattr(llm, "generate", lambda *given, **options: generate(*given, **options)[:-1])
    with pytest.raises(moe_native.CaptureError, match="vLLM returned 2 outputs for 3 prompts"):
        moe_native.capture(llm, PROMPTS)


# Workers.


def test_pipeline_stages_have_layers_each() -> None:
    llm = LLM(Worker((0, 1)), Worker((2, 3), experts=300), Idle())
    capture = moe_native.capture(llm, PROMPTS, SamplingParams(4, n=2))
    assert capture.layers == [0, 1, 2, 3] and matches(capture, llm, workers=llm.workers[:2])
    assert capture[0].ids[1].dtype == torch.uint8 and capture[0].ids[2].dtype == torch.int16
    assert [layer.experts for layer in capture.geometry] == [16, 16, 300, 300]
    one = moe_native.capture(llm, "a", layers=[3])
    assert one.layers == [3] and matches(one, llm, workers=llm.workers[:2])


def test_sequence_parallel_workers_have_rows_each() -> None:
    llm = LLM(Worker(part=(0, 3)), Worker(part=(1, 3)), Worker(part=(2, 3)), chunk=7)
    capture = moe_native.capture(llm, PROMPTS, SamplingParams(5))
    assert [len(sample._columns["ids", 0]) for sample in capture] == [2, 2, 1]
    assert matches(capture, llm)


def test_a_step_whose_routing_was_not_seen_is_told_by_prompt_and_position() -> None:
    llm = LLM()
    llm.workers[0].lost_step = 1  # of which the prompts are the rows from 5 on, 5 of the first one
    with pytest.raises(
        moe_native.CaptureError, match="prompt 0 lacks rows from position 5 on, of 15, in ids of layer 0"
    ):
        moe_native.capture(llm, "first prompt", SamplingParams(4))
    llm.workers[0].lost_step = None
    assert matches(moe_native.capture(llm, PROMPTS, SamplingParams(2)), llm)
    shards = LLM(Worker(part=(0, 2)), Worker(part=(1, 2)))
    shards.workers[1].lost_step = 0
    with pytest.raises(moe_native.CaptureError, match="prompt 0 lacks rows from position 1 on, of 3"):
        moe_native.capture(shards, [[1, 2, 3]], SamplingParams(1))


def test_a_worker_says_why_rows_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()
    captures = llm.workers[0].recorder.captures
    close = captures.close
    monkeypatch.setattr(captures, "close", lambda number: Closed(*close(number)[:2], "no memory for a capture"))
    llm.workers[0].lost_step = 0
    with pytest.raises(moe_native.CaptureError, match=r"prompt 0 has no ids of layer 0: no memory for a capture$"):
        moe_native.capture(llm, ["ab", "c"], SamplingParams(1), layers=[0])


@pytest.mark.parametrize(("problems", "said"), [(["", "lost"], "lost"), (["lost"] * 2, "lost"), (["a", "b"], "a; b")])
def test_a_problem_of_a_worker_is_an_error_also_where_no_gap_is_seen(
    monkeypatch: pytest.MonkeyPatch, problems: list[str], said: str
) -> None:
    llm = LLM(Worker((0, 1)), Worker((2,)))
    for worker, problem in zip(llm.workers, problems, strict=True):
        captures = worker.recorder.captures

        def close(number: int, close: Any = captures.close, problem: str = problem) -> Closed:
            return Closed(*close(number)[:2], problem)

        monkeypatch.setattr(captures, "close", close)
    with pytest.raises(moe_native.CaptureError, match=f"^the engine's workers could not keep all .*: {said}$"):
        moe_native.capture(llm, PROMPTS)


def test_a_shard_without_a_field_is_no_tensor_of_anything() -> None:
    """Where one of the workers has not seen a router's logits, nothing stands for them."""
    llm = LLM(Worker(part=(0, 2)), Worker(part=(1, 2)))
    of_second = llm.workers[1].model
    record = of_second.recorder.record
    of_second.recorder = SimpleNamespace(record=lambda binding, ids, weights, *_: record(binding, ids, weights))
    with pytest.raises(
        moe_native.CaptureError, match="prompt 0 lacks rows from position 2 on, of 4, in logits of layer 0"
    ):
        moe_native.capture(llm, [[1, 2, 3, 4]], SamplingParams(1))
    assert matches(moe_native.capture(llm, [[1, 2]], fields="weights"), llm, ("ids", "weights"))


def test_prompts_that_no_worker_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()
    monkeypatch.setattr(llm, "_run", lambda: None)
    with pytest.raises(moe_native.CaptureError, match="did not see prompt 0: was it sent to another data-parallel"):
        moe_native.capture(llm, "a")


# What goes wrong.


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), Stop()])
def test_a_generation_that_fails_closes_the_capture(error: BaseException) -> None:
    llm = LLM()
    llm.error = error
    with pytest.raises(type(error)) as caught:
        moe_native.capture(llm, PROMPTS)
    assert caught.value is error and llm.calls == ["open", "close"]
    assert len(llm.workers[0].recorder.captures) == 0
    with pytest.raises(type(error)):
        moe_native.capture(llm, PROMPTS)
    (first,), _, (second,), _ = llm.replies
    assert first["handle"] == second["handle"]  # its memory was given back
    llm.error = None
    assert matches(moe_native.capture(llm, PROMPTS), llm)


def test_a_generation_that_fails_leaves_nothing_of_ours_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()
    llm.enqueue(["theirs"], [SamplingParams(9)])
    llm.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        moe_native.capture(llm, PROMPTS, SamplingParams(2, n=2))
    assert [request.output.request_id for request in llm.running] == ["0"]

    def fail(names: list[str]) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(llm.llm_engine, "abort_request", fail)
    with pytest.raises(KeyboardInterrupt):
        moe_native.capture(llm, PROMPTS)
    llm.error = None
    assert matches(moe_native.capture(llm, PROMPTS), llm)  # and what could not be aborted is not taken for ours


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConnectionError("no answer")])
def test_an_interrupt_while_it_is_opened_closes_the_capture(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    llm = LLM()
    answer = llm.collective_rpc

    def interrupted(method: Any, args: Any = (), kwargs: Any = None) -> Any:
        replies = answer(method, args, kwargs)
        if args == ("open",):
            raise error
        return replies

    monkeypatch.setattr(llm, "collective_rpc", interrupted)
    with pytest.raises(type(error)):
        moe_native.capture(llm, "a")
    assert llm.calls == ["open", "close"] and len(llm.workers[0].recorder.captures) == 0


def test_an_engine_that_does_not_answer_after_an_error_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "_PATIENCE", 0.05)
    llm = LLM()
    llm.error = KeyboardInterrupt()
    answer, stopped = llm.collective_rpc, threading.Event()

    def dead(method: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args == ("close",):
            asked.set()
            stopped.wait(60)
        return answer(method, args, kwargs)

    asked = threading.Event()
    monkeypatch.setattr(llm, "collective_rpc", dead)
    with pytest.raises(KeyboardInterrupt):
        moe_native.capture(llm, PROMPTS)
    assert asked.is_set() and llm.calls == ["open"]
    (waiting,) = [thread for thread in threading.enumerate() if thread.name == "moe_native close"]
    assert waiting.daemon
    stopped.set()
    waiting.join()
    assert llm.calls == ["open", "close"] and len(llm.workers[0].recorder.captures) == 0


def test_the_first_error_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()
    llm.error = RuntimeError("the engine died")
    answer = llm.collective_rpc

    def dead(method: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args == ("close",):
            raise ConnectionError("nobody there")
        return answer(method, args, kwargs)

    monkeypatch.setattr(llm, "collective_rpc", dead)
    with pytest.raises(RuntimeError, match="the engine died"):
        moe_native.capture(llm, PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sampling_params": [SamplingParams()] * 2}, "2 sampling_params for 3 prompts"),
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params is a dict: give vLLM's SamplingParams, or a list of"),
        ({"sampling_params": (SamplingParams() for _ in PROMPTS)}, "sampling_params is a generator: give"),
        ({"sampling_params": SimpleNamespace(beam_width=2)}, "sampling_params is a SimpleNamespace: give"),
        ({"sampling_params": "greedy"}, "sampling_params is a str: give"),
        ({"sampling_params": [SamplingParams(), None, {}]}, "sampling_params is a list with a NoneType: give"),
        ({"sampling_params": []}, "0 sampling_params for 3 prompts"),
        ({"fields": "ids,tokens"}, "'tokens' cannot be captured"),
        ({"layers": "x"}, "layers is 'x'"),
        ({"layers": ""}, "layers is '', which names none"),
        ({"fields": ""}, "fields is '', which names none"),
    ],
)
def test_wrong_arguments_reach_no_worker(arguments: dict[str, Any], said: str) -> None:
    llm = LLM()
    with pytest.raises(ValueError, match=said):
        moe_native.capture(llm, PROMPTS, **arguments)
    with pytest.raises(ValueError, match="Unsupported input format"):
        moe_native.capture(llm, [{"nothing": 1}])
    with pytest.raises(ValueError, match="fake/model takes no images"):
        moe_native.capture(llm, {"prompt": "a", "multi_modal_data": {"image": None}})
    assert llm.calls == []


def test_parameters_of_vllm_that_are_for_something_else_reach_no_worker() -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here")
    llm = LLM()
    for given in (vllm.BeamSearchParams(2, 3), pytest.importorskip("vllm").PoolingParams()):
        with pytest.raises(
            ValueError, match=f"sampling_params is a {type(given).__name__}: give vLLM's SamplingParams"
        ):
            moe_native.capture(llm, PROMPTS, given)
    assert llm.calls == []
    assert (
        len(call._params(vllm.SamplingParams(), 3, None))
        == 3
        == len(call._params([vllm.SamplingParams()] * 3, 3, None))
    )


def test_layers_that_the_model_does_not_have_or_show() -> None:
    llm = LLM(Worker((0, 1, 2, 5, 7, 8), missed={3: "a monolithic kernel"}))
    with pytest.raises(ValueError, match="the model has no MoE layer 6; it has 0-2, 5, 7-8"):
        moe_native.capture(llm, "a", layers=[1, 6])
    with pytest.raises(ValueError, match="layer 3 cannot be captured: a monolithic kernel"):
        moe_native.capture(llm, "a", layers=[1, 3])
    assert llm.calls == ["open", "close"] * 2 and len(llm.workers[0].recorder.captures) == 0
    with pytest.warns(UserWarning, match="1 MoE layers of this model are not captured, such as layer 3: a mono"):
        capture = moe_native.capture(llm, "a")
    assert capture.missed == {3: "a monolithic kernel"} and matches(capture, llm)


def test_what_is_no_engine() -> None:
    with pytest.raises(ValueError, match="object is no vLLM engine"):
        moe_native.capture(object(), "a")
    llm = LLM()
    llm.llm_engine.model_config = llm.__dict__.pop("model_config")  # as in older versions
    assert matches(moe_native.capture(llm, "a"), llm)


def test_workers_that_cannot_capture() -> None:
    problem = SimpleNamespace(moe_native_capture=lambda *_, **__: {"error": "fake has no MoE layer that is known here"})
    other = Worker()
    with pytest.raises(moe_native.CaptureError, match="cannot be captured: fake has no MoE layer"):
        moe_native.capture(LLM(other, problem), "a")
    assert len(other.recorder.captures) == 0
    with pytest.raises(moe_native.CaptureError, match="no worker of this engine records"):
        moe_native.capture(LLM(Idle(), Idle()), "a")


def test_a_worker_that_cannot_close(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()
    monkeypatch.setattr(llm.workers[0].recorder.captures, "close", lambda number: 1 / 0)
    with pytest.raises(moe_native.CaptureError, match="could not close the capture: division by zero"):
        moe_native.capture(llm, "a")


def test_memory_of_another_machine() -> None:
    worker = Worker()
    answer = worker.moe_native_capture
    worker.moe_native_capture = lambda *args, **kw: {**answer(*args, **kw), "process": 2**22 + 1}  # type: ignore[method-assign]
    with pytest.raises(moe_native.CaptureError, match=r"process 4194305\) cannot be mapped here.*on this machine"):
        moe_native.capture(LLM(worker), "a")
    assert len(worker.recorder.captures) == 0


# Engines that were built before.


class Unarmed:
    """A worker that has not heard of captures, as vLLM calls one by a method's name."""

    def __init__(self) -> None:
        self.captured: Worker | None = None

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"Method {name!r} is not implemented.")

    def execute(self, output: Any, batch: Any) -> None:
        if self.captured is not None:
            self.captured.execute(output, batch)


def late(monkeypatch: pytest.MonkeyPatch, answer: Any) -> LLM:
    """An engine whose worker says this when it is asked to follow late."""

    def follow_loaded(worker: Unarmed) -> Any:
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            worker.captured = Worker()
            worker.moe_native_capture = worker.captured.moe_native_capture
        return answer

    monkeypatch.setattr(vllm_worker, "follow_loaded", follow_loaded)
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", "1")  # as arm() leaves it
    return LLM(Unarmed())


def test_an_engine_that_can_be_bound_late_is(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = late(monkeypatch, None)
    capture = moe_native.capture(llm, PROMPTS)
    assert matches(capture, llm, workers=[llm.workers[0].captured])
    assert llm.calls == ["open", "follow_loaded", "open", "close"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"error": "its model is compiled, without what records"}, r" \(its model is compiled, without what records\)"),
        (TypeError("Object of type <class 'function'> is not serializable"), ""),
    ],
)
def test_one_that_cannot_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str) -> None:
    llm = late(monkeypatch, answer)
    said = rf"built before recording was armed{reason}\. Before the engine is built, .*arm\(\).*MOE_NATIVE_CAPTURE=1"
    with pytest.raises(moe_native.CaptureError, match=said):
        moe_native.capture(llm, "a")
    assert llm.calls == ["open", "follow_loaded"]


@pytest.mark.parametrize(("why", "reason"), [({"error": "compiled"}, r" \(compiled\)"), (TypeError("no"), "")])
def test_one_that_the_environment_forbids_is_told_the_variable(
    monkeypatch: pytest.MonkeyPatch, why: Any, reason: str
) -> None:
    llm = late(monkeypatch, why)
    monkeypatch.setenv("MOE_NATIVE_CAPTURE", "0")
    said = (
        rf"^this engine cannot be captured{reason}: MOE_NATIVE_CAPTURE=0 forbids it, whatever .*\. Unset it, or set it"
    )
    with pytest.raises(moe_native.CaptureError, match=said):
        moe_native.capture(llm, "a")


def test_another_error_of_an_engine_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM()

    def dead(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("Method 'other' is not implemented.")

    monkeypatch.setattr(llm, "collective_rpc", dead)
    with pytest.raises(NotImplementedError, match="other"):
        moe_native.capture(llm, "a")
    assert engine.not_armed(AttributeError("'Worker' object has no attribute 'moe_native_capture'"))
