"""One vLLM worker that records: from its making to its shutdown.

- made: the compile cache's key is salted, because no graph without the op may be reused;
- `load_model`: right after it the routers are bound and the ring takes its memory, before the KV cache takes the rest;
- warm-up: profiling, compiling and warm-up run the routers too, but no step is open, so the op does nothing;
- `execute_model`, from the first one after `compile_or_warm_up_model`: a step around each;
- `sample_tokens`: what it returns says which draft tokens were accepted;
- `shutdown`: the trace is closed.

A worker that is armed for captures and has no trace does all of this too, but opens steps only while something is
captured. Callers reach both through `collective_rpc`.

Whatever goes wrong here is caught, counted, said once in the log, and the engine serves on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_native.config import Config, ConfigError
from moe_native.vllm import KEY, log_moe, symbols
from moe_native.vllm.probe import UnknownVLLM, require

if TYPE_CHECKING:
    from moe_native.recorder import Recorder
    from moe_native.vllm.captures import Captures
    from moe_native.vllm.steps import Steps

log = logging.getLogger("moe_native")

# Bindings of the workers that record in this process: the next worker's start behind them.
_bindings_in_use = 0


def follow(worker: Any) -> None:
    """Make `worker`, which has just been made, record if its settings say so. Never raises."""
    try:
        config = Config.parse(log_moe.environment(), _take_settings(worker.vllm_config))
        if config.trace is not None or config.capture:
            log_where_vllm_logs()
            require(worker, symbols.WORKER)
            WorkerRecording(worker, config)
    except ConfigError as error:
        log.error("moe_native: nothing is recorded: %s", error)
    except UnknownVLLM as error:
        log.error("moe_native: nothing is recorded: %s; vLLM serves on", error)
    except Exception as error:
        log.error("moe_native: nothing is recorded: %s: %s", type(error).__name__, error)


def follow_loaded(worker: Any) -> dict[str, Any] | None:
    """Arm a worker that has served already, which only a model that runs eagerly allows: a compiled one does not call
    the routers any more. For `collective_rpc`. None, or a reason in `error`; never raises."""
    try:
        worker = getattr(worker, "worker", worker)  # vLLM wraps it
        if hasattr(worker, "moe_native"):
            return None
        if not worker.model_config.enforce_eager:
            return {"error": "its model is compiled, without what records"}
        log_where_vllm_logs()
        require(worker, symbols.WORKER)
        WorkerRecording(worker, Config(capture=True)).bind_late()
        return None
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def log_where_vllm_logs() -> None:
    """Our log goes to vLLM's handlers: it configures its own logger only."""
    vllm_log = logging.getLogger("vllm")
    if vllm_log.handlers and not log.handlers:
        log.handlers, log.propagate = list(vllm_log.handlers), False
        log.setLevel(vllm_log.getEffectiveLevel())


def _take_settings(vllm_config: Any) -> Mapping[str, Any]:
    """Our part of the additional config."""
    additional = vllm_config.additional_config
    ours = additional.get(KEY) if isinstance(additional, Mapping) else None
    if ours is None or (isinstance(ours, Mapping) and "salt" in ours):  # the latter: ours, from a worker made before
        return {}
    if not isinstance(ours, Mapping):
        raise ConfigError(f"moe_native in the additional config is {ours!r}, not an object such as {{'trace': 'DIR'}}")
    return ours


class WorkerRecording:
    """Wraps methods of one worker, on the instance."""

    def __init__(self, worker: Any, config: Config) -> None:
        self.worker = worker
        worker.moe_native = self
        worker.moe_native_ctl = self.control  # for `collective_rpc`
        worker.moe_native_capture = self.capture
        self.config = config
        self.recorder: Recorder | None = None
        self.errors: dict[str, int] = {}
        self._steps: Steps | None = None
        self._captures: Captures | None = None
        self._problem = "the model has not been loaded yet"  # why nothing can be captured
        self._announces = False
        self._armed = False
        self._warming = False
        self._probed = False
        self._bound = 0
        self._first_binding = _bindings_in_use
        self._salt()
        for name, wrapper in (
            ("load_model", self._load_model),
            ("compile_or_warm_up_model", self._compile_or_warm_up_model),
            ("execute_model", self._execute_model),
            ("sample_tokens", self._sample_tokens),
            ("shutdown", self._shutdown),
        ):
            setattr(worker, name, wrapper(getattr(worker, name)))

    def _salt(self) -> None:
        """Put the op's schema into the hash that names vLLM's compile cache. It must be there before the model is
        loaded, because parts of a model copy the config then. The settings are taken out: a trace's path would make
        every graph be compiled again."""
        from moe_native import ops

        vllm_config = self.worker.vllm_config
        additional = vllm_config.additional_config
        if not isinstance(additional, dict):
            # A platform's own object, hashed in its own way.
            kind = type(additional).__name__
            raise ConfigError(f"the additional config is a {kind}, not a dict: the compile cache cannot be marked")
        # Graphs hold binding indices: a second engine of this process has others, and so needs graphs of its own.
        vllm_config.additional_config = {**additional, KEY: {"salt": ops.SCHEMA_VERSION, "first": self._first_binding}}

    def control(self, command: str = "status", arguments: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """A command to this worker's recorder, as `moe_native.control` has them; None where there is no recorder."""
        from moe_native.control import obey

        return None if self.recorder is None else obey(self.recorder, command, arguments)

    def capture(self, command: str, **arguments: Any) -> dict[str, Any] | None:
        """A command to this worker's captures (`moe_native.vllm.captures`); None from one that leaves recording to
        another worker."""
        if self._captures is None:
            return {"error": self._problem} if self._problem else None
        if command == "open":
            self._guard("preparing to announce rows", self._announce)
        return self._captures.obey(command, **arguments)

    def bind_late(self) -> None:
        """Bind a model that is loaded and warm.

        Raises:
            Exception: it cannot be bound.
        """
        try:
            self._bind()
        except Exception as error:
            self._problem = f"it could not be bound: {type(error).__name__}: {error}"
            raise
        if self._steps is not None:
            self._armed = True

    # The wrappers.

    def _load_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.recorder is None:
                self._problem = "its routers could not be bound: see the engine's log"
                self._guard("binding the routers", self._bind)
            return result

        return load_model

    def _compile_or_warm_up_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
            self._armed, self._warming = False, True
            result = original(*args, **kwargs)
            self._warming = False
            if self._steps is not None:
                self._guard("following the prefix cache", self._follow_blocks, self._steps)
                self._armed = True
            return result

        return compile_or_warm_up_model

    def _execute_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._probed and not self._warming:
                self._guard("probing the scheduler's output", self._probe, scheduler_output)
            steps = self._steps
            if not self._armed or steps is None:
                return original(scheduler_output, *args, **kwargs)
            number = steps.number
            opened = self._guard("opening a step", steps.begin, scheduler_output)
            if opened is None:
                self._guard("giving up a step", steps.lose, scheduler_output, number)
            try:
                result = original(scheduler_output, *args, **kwargs)
            except BaseException:
                if opened:
                    self._guard("giving up a step", steps.abort)
                raise
            if (
                opened
                and not self._guard("telling whose rows are whose", steps.end, scheduler_output)
                and not self._guard("closing a step", steps.end_as_nobodys, scheduler_output)
            ):
                self._guard("giving up a step", steps.abort)
            self._guard("reading the sampler's output", steps.sampled, result)  # older versions return it here
            return result

        return execute_model

    def _sample_tokens(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if self._armed and self._steps is not None:
                self._guard("reading the sampler's output", self._steps.sampled, output)
            return output

        return sample_tokens

    def _shutdown(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def shutdown(*args: Any, **kwargs: Any) -> Any:
            self._guard("closing the trace", self._close)
            return original(*args, **kwargs)

        return shutdown

    def _guard(self, what: str, action: Callable[..., Any], *args: Any) -> Any:
        """`action(*args)`, or None when it raised."""
        try:
            return action(*args)
        except Exception as error:
            count = self.errors.get(what, 0)
            self.errors[what] = count + 1
            if count == 0:
                self._say_failed(what, error)
            return None

    def _say_failed(self, what: str, error: Exception) -> None:
        if isinstance(error, UnknownVLLM):
            log.error("moe_native: nothing is recorded: %s; vLLM serves on", error)
        else:
            log.error("moe_native: %s failed: %s: %s (said once)", what, type(error).__name__, error, exc_info=True)
        if self.recorder is not None:  # now, because this process may be killed
            with contextlib.suppress(Exception):
                self.recorder.update_metadata(errors=dict(self.errors))

    # What they do.

    def _probe(self, scheduler_output: Any) -> None:
        """The first step behind the warm-up: is it one that we know?"""
        self._probed = True
        steps, self._steps = self._steps, None
        if steps is None:
            return
        if not self._armed:
            raise UnknownVLLM("this vLLM executes requests though `compile_or_warm_up_model` was not called")
        require(scheduler_output, symbols.SCHEDULER_OUTPUT)
        self._steps = steps

    def _bind(self) -> None:
        global _bindings_in_use
        from moe_native.rank_directory import shared_run
        from moe_native.recorder import Recorder
        from moe_native.vllm import forward, layout, metadata, routers
        from moe_native.vllm.captures import Captures
        from moe_native.vllm.steps import Steps

        parallel = metadata.parallel_layout(self.worker)
        if not layout.records(parallel):
            self._problem = ""
            return
        runner, placed = self.worker.model_runner, layout.needs_places(parallel)
        require(runner, symbols.RUNNER if hasattr(runner, "input_batch") else symbols.NEWER_RUNNER)
        model = runner.get_model()
        layers = routers.find(model, self.worker.device)
        obstacle = layout.obstacle(parallel) or (forward.obstacle(model) if placed else "")
        layers = [replace(layer, obstacle=layer.obstacle or obstacle) for layer in layers]
        trace, key = self.config.trace, metadata.engine_key(self.worker.vllm_config)
        recorder = Recorder(
            trace,
            run=None if key is None or trace is None else shared_run(trace, key),
            rank=metadata.rank_name(self.worker.rank, parallel),
            lanes=parallel["microbatches"],
            metadata={
                **metadata.describe(self.worker, parallel),
                "left_out": routers.left_out(runner),
                **log_moe.label(),
            },
            **self.config.recorder_arguments(),
        )
        try:
            self._bound = routers.bind(layers, recorder, self._first_binding)
            recorder.update_metadata()  # so that readers know the layers before the first request
        except BaseException:
            recorder.close()
            raise
        _bindings_in_use += self._bound
        self.recorder = recorder
        self._say(layers)
        if self._bound:
            places = forward.Forward(model, recorder, parallel, self._guard) if placed else None
            self._captures = Captures(
                recorder,
                self.worker.model_config.max_model_len,
                layers=[(each.layer, each.experts, each.top_k, each.name) for each in layers if not each.obstacle],
                missed={each.layer: each.obstacle for each in layers if each.obstacle},
            )
            self._steps = Steps(recorder, runner, forward=places, captures=self._captures)
        elif layers:
            self._problem = f"none of its MoE layers can be seen, such as layer {layers[0].layer}: {layers[0].obstacle}"
        else:
            self._problem = f"{self.worker.model_config.model} has no MoE layer that is known here"

    def _announce(self) -> None:
        """From now on captures are told before the forward pass whose rows it has."""
        from moe_native.vllm import forward

        model, steps = self.worker.model_runner.get_model(), self._steps
        if steps is None or self._announces or forward.obstacle(model):
            return
        self._announces = True
        model.register_forward_pre_hook(lambda *_: self._guard("announcing rows", steps.announce))

    def _follow_blocks(self, steps: Steps) -> None:
        from moe_native.vllm import prefix

        steps.owners = prefix.followed(self.worker.vllm_config, self.worker.model_runner)

    def _say(self, layers: list[Any]) -> None:
        assert self.recorder is not None
        if not layers:
            model = self.worker.model_config.model
            log.warning("moe_native: nothing is recorded: %s has no MoE layer that is known here", model)
            return
        trace = self.recorder.directory
        asked = self.recorder.layers if trace else None  # a capture says itself which it wants
        enabled = [layer.layer for layer in layers if not layer.obstacle and (asked is None or layer.layer in asked)]
        if self._bound and not enabled:
            last = max(layer.layer for layer in layers)
            what = "nothing is recorded into the trace"
            log.warning("moe_native: %s: none of the model's layers, up to %d, is asked for", what, last)
        else:
            where = f"into {trace}" if trace else "when they are captured"
            log.info("moe_native: recording %d of %d MoE layers %s", len(enabled), len(layers), where)
        missed = [layer for layer in layers if layer.obstacle]
        if missed:
            lost = "neither recorded nor captured" if trace else "not captured"
            example = f"layer {missed[0].layer}: {missed[0].obstacle}"
            log.warning("moe_native: %d MoE layers are %s, such as %s", len(missed), lost, example)

    def _close(self) -> None:
        global _bindings_in_use
        if self._steps is not None:
            self._guard("closing the steps", self._steps.close)
        self._armed, self._steps, self._captures = False, None, None
        self._problem = "the engine is shut down"
        recorder, self.recorder = self.recorder, None
        if recorder is None:
            return
        _bindings_in_use -= self._bound
        if self.errors:
            recorder.update_metadata(errors=dict(self.errors))
        recorder.close()
