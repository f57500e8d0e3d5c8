"""`Recorder`: records the routing of any torch program into a trace."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import operator
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import moe_trace
from moe_native import _C, ops
from moe_native.capturing import Capturing
from moe_native.config import Config
from moe_native.control import CommandFile
from moe_native.metadata import Metadata
from moe_native.notes import Notes
from moe_native.rank_directory import RankFile, make_rank_directory, sweep_emptied_ranks
from moe_native.runs import RUN_DTYPE, one_per_row, runs_of
from moe_native.sampling import Sampling
from moe_native.tier import Tier
from moe_trace.units import count

__all__ = ["Recorder"]

log = logging.getLogger("moe_native")

_MIB = 1 << 20


class Recorder:
    """Records routing into a trace directory, from the first step to `close()`.

    In a plain torch program:

        with moe_native.Recorder("trace") as recorder:
            binding = recorder.bind(layer=0, experts=64, top_k=8)
            with recorder.step(requests=["a", "b"], positions=[range(0, 5), range(0, 7)]):
                ...  # in the router: recorder.record(binding, topk_ids, topk_weights)

    For a transformers model, `moe_native.hf.attach(model, recorder)` does the binding and the steps; in vLLM the plugin
    does.

    Args:
        path: the trace's directory; made if it is missing. A trace may hold many runs: each recorder adds one. None:
            there is no trace, and what is recorded is for captures alone.
        fields: what to store of `ids`, `weights`, `logits`, `hidden` (the router's input) and `tokens` (token ids).
            `ids` is always stored. Or `counts`: statistics, and no row.
        layers: the layers to record (the model's own indices), also as `"0,4-7"`; None for all that are bound.
        max_bytes: bound on the whole trace directory, in bytes or as `"1GB"`: the oldest closed segments are deleted to
            keep it. None for no bound.
        ring_bytes: size of the ring in memory, up to 1 GiB. Half of it should hold the largest step; a larger step is
            streamed out.
        overflow: `"drop"`: a step that finds no room is not recorded, and counted; `"block"`: the model waits, nothing
            is lost.
        weights_dtype: `"float16"`, or `"exact"` to store weights as the router gave them.
        flush_seconds: how old the newest rows in the segment files may get.
        sample: the share of requests whose rows are stored, 0 to 1, chosen by a hash of their names: a request is kept
            whole or not at all, and in each process alike. Rows of the others, and below 1 rows that are nobody's, are
            counted in the statistics only.
        segment_bytes: size at which a segment is closed; None chooses 64 MiB, less when `max_bytes` is small.
        ring_dir: where the ring file lies; None for /dev/shm.
        rank: name of this process's directory in the run.
        run: name of the run's directory, for several ranks of one run; None for a new one.
        lanes: how many threads may record in one step.
        metadata: what ran, as a JSON-like mapping (csrc/FORMAT.md, section 6).

    Raises:
        ValueError: an argument is not usable; the message says which and why.
        OSError: the trace or the ring cannot be made.

    Attributes:
        path, directory: of the trace, and of this process in it; None where there is no trace.
        captures: the captures of it (`moe_native.capturing`).
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        fields: str | Iterable[str] = ("ids", "weights"),
        layers: str | Iterable[int] | None = None,
        max_bytes: int | str | None = None,
        ring_bytes: int | str = 64 * _MIB,
        overflow: str = "drop",
        weights_dtype: str = "float16",
        flush_seconds: float = 10.0,
        sample: float | str = 1.0,
        segment_bytes: int | None = None,
        ring_dir: str | Path | None = None,
        rank: str = "rank-0",
        run: str | None = None,
        lanes: int = 1,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        settings = Config.of_arguments(
            trace=path,
            fields=fields,
            layers=layers,
            max_bytes=max_bytes,
            ring_bytes=ring_bytes,
            ring_dir=ring_dir,
            overflow=overflow,
            weights_dtype=weights_dtype,
            flush_seconds=flush_seconds,
            sample=sample,
        )
        if path is not None and settings.trace is None:
            raise ValueError("the trace's path is empty")
        largest = settings.max_bytes or 0
        if segment_bytes is None:
            segment_bytes = min(64 * _MIB, largest // 4) if largest else 64 * _MIB
        if largest and segment_bytes > largest // 2:
            raise ValueError("segment_bytes must be at most half of max_bytes: whole segments are what is deleted")

        self.path = settings.trace
        tier = Tier(settings.fields, Tier.layer_set(settings.layers), settings.sample)
        self._sampling = Sampling(tier)
        self._metadata = Metadata(tier, settings.weights_dtype, metadata or {})
        self.directory: Path | None = None
        self._file: RankFile | None = None
        if self.path is not None:
            self._recover_dead_runs(self.path)
            if largest:
                sweep_emptied_ranks(self.path)
            self.directory = make_rank_directory(self.path, rank, run)
            self._file = RankFile(self.directory, _C.owner())
        try:
            self._core = _C.Recording(
                trace="" if self.path is None else str(self.path.resolve()),
                rank_directory=str(self.directory or ""),
                run_id=bytes(16) if self._file is None else self._file.run_id,
                ring_directory="" if settings.ring_dir is None else str(settings.ring_dir),
                ring_bytes=settings.ring_bytes,
                lanes=lanes,
                block=settings.overflow == "block",
                fields=tier.bits,
                exact_weights=settings.weights_dtype == "exact",
                segment_bytes=segment_bytes,
                max_bytes=largest,
                flush_seconds=settings.flush_seconds,
            )
        except BaseException:  # nothing was recorded: leave nothing
            if self._file is not None and self.directory is not None:
                self._file.release()
                with contextlib.suppress(OSError):
                    self.directory.rmdir()
                    self.directory.parent.rmdir()
            raise
        self._begin_step, self._end_step = self._core.begin_step, self._core.end_step
        self._core.configure(tier.bits, tier.counted)
        self._notes = Notes(settings.ring_bytes // lanes // 8, tier)
        self._bindings: dict[int, int] = {}  # their layers
        self.captures = Capturing(self._core, self._bindings)
        self._for_captures = False  # the open step: the trace does not have it
        self._closed = False
        self._publish_metadata(ring={"path": self._core.ring_path, "id": f"{self._core.ring_id:016x}"})
        self._at_exit = _close_at_exit(self)
        self._commands = None if self.directory is None else CommandFile(self, self.directory)

    # What is recorded: bindings and metadata.

    @property
    def fields(self) -> tuple[str, ...]:
        """What is stored now, as the argument of this name; `("counts",)` for no row."""
        return self._sampling.tier.fields

    @property
    def layers(self) -> frozenset[int] | None:
        """The layers that are recorded now; None for all."""
        return self._sampling.tier.layers

    @property
    def sample(self) -> float:
        """The share of requests whose rows are stored now."""
        return self._sampling.tier.sample

    def set(
        self,
        *,
        fields: str | Iterable[str] | None = None,
        layers: str | Iterable[int] | None = None,
        sample: float | str | None = None,
    ) -> None:
        """Change what is recorded from the next step on; None leaves a setting as it is, `layers="all"` asks for all.
        May be called by any thread, at any time.

        Another `sample` decides about requests that begin after it. `fields="counts"` (as `sample=0`) stores no row
        any more, of nobody; the requests of that time are not stored afterwards either.

        Raises:
            ValueError: a value is not usable; nothing is changed.
        """
        self._sampling.want(fields, layers, sample)

    def _adopt_wanted(self) -> None:
        """Between two steps: before a request of the next one is known, because that decides about it."""
        if self._sampling.changes and not self._core.step_open:
            self._sampling.adopt(self._take)

    def _take(self, tier: Tier) -> None:
        self._notes.tier = tier
        self._core.configure(tier.bits, tier.counted)
        for binding, layer in self._bindings.items():
            self._core.enable(binding, tier.takes(layer))
        self._metadata.tier(tier)

    @property
    def state(self) -> torch.Tensor:
        """The small tensor that the op mutates in name: its first argument."""
        return ops.state

    def bind(
        self,
        layer: int,
        *,
        experts: int,
        top_k: int,
        name: str = "",
        status: str = "exact",
        detail: str = "",
        every_step: bool = True,
        logits: int = 0,
    ) -> int:
        """Make a binding for one router; bind in the order of the model's modules.

        Args:
            layer: the model's own layer index, 0 to 65534.
            experts: number of legal expert ids, fused shared experts included; larger ids are counted as invalid.
            top_k: ids per row; only for the coverage ledger and the first admission, what counts are the tensors.
            name: the module's name.
            status: `"exact"`, or `"derived"` where the ids are computed from logits and not seen.
            detail: a remark for the coverage ledger.
            every_step: False where a step may leave the layer out, as an encoder's layers in a decoding step; else a
                step without its rows counts as a loss.
            logits: width of the router's logits: a tensor of another width is not taken for them. 0 takes any.

        Returns:
            The index to give to `record` or to the op.

        Raises:
            ValueError: a number is out of range.
        """
        layer, experts, top_k = operator.index(layer), operator.index(experts), operator.index(top_k)
        if not 0 <= layer < 0xFFFF:
            raise ValueError(f"layer {layer} is not between 0 and 65534")
        if not 1 <= experts <= 0xFFFF or not 1 <= top_k <= 0xFFFF:
            raise ValueError(f"layer {layer}: experts={experts}, top_k={top_k} must be between 1 and 65535")
        if not 0 <= operator.index(logits) < 1 << 32:
            raise ValueError(f"layer {layer}: logits={logits} is no width")
        enabled = self._sampling.tier.takes(layer)
        binding = int(self._core.bind(layer, experts, top_k, enabled, every_step, operator.index(logits)))
        self._bindings[binding] = layer
        self.captures.changed = True
        self._metadata.add_layer(layer, name, experts, top_k, status, detail, every_step)
        return binding

    def miss(self, layer: int, *, name: str, detail: str, experts: int = 0, top_k: int = 0) -> None:
        """Say in the trace that a layer is not recorded, and why."""
        self._metadata.add_layer(operator.index(layer), name, int(experts), int(top_k), "missed", detail)

    def update_metadata(self, **items: Any) -> None:
        """Set items of the trace's metadata. Mappings are merged, one level deep.

        Raises:
            TypeError, ValueError: an item is not JSON; nothing is changed.
            OSError: `rank.json` cannot be written. The next segment has the items all the same.
        """
        self._metadata.merge(items)
        self._publish_metadata()

    def _publish_metadata(self, **rank_items: Any) -> None:
        text = self._metadata.text()
        if not self._core.here or self._file is None:  # in a forked child the trace is its parent's
            return
        self._core.set_metadata(text)
        self._file.update(metadata=self._metadata.items, **rank_items)

    # Requests.

    def request(self, id: str, **info: Any) -> int:
        """The index of a request for `runs`. `info` (such as `prompt_len`) travels with the next step; what is given
        again replaces the old."""
        self._adopt_wanted()
        return self._notes.request(id, info)

    def finish(self, id: str) -> None:
        """The request has ended: nothing more will be said of it under this index."""
        self._notes.finish(id)

    def amend(self, step: int, row: int, count: int, flags: Sequence[str]) -> None:
        """A late fact about rows of an earlier step: `flags` of `recomputed`, `rejected`, `superseded`, `discarded`.
        Where the step has rows that are not stored, it has to be one of the last thousand such steps, and the rows have
        to have positions.

        Raises:
            ValueError: a flag is none of these.
        """
        places = self._sampling.places(step, row, count)
        if places is None:
            return self._notes.amend(step, row, count, flags)
        for request, position, number in places:
            self._notes.amend(step, row, number, flags, at=(request, position))
        return None

    @property
    def step_number(self) -> int:
        """The number of the open step, or of the one begun last; -1 before the first."""
        return int(self._core.step_number)

    @property
    def step_open(self) -> bool:
        """Whether a step is being recorded."""
        return bool(self._core.step_open)

    # Steps.

    def begin_step(self, n_rows: int, spans: Sequence[tuple[int, int]] | None = None) -> bool:
        """Open a step of `n_rows` real rows. `spans` says which rows of each layer's tensors they are, as `(start,
        count)`; None: the first; empty: what `place` will say.

        Every call takes the next step number, also when the step is not recorded, so that processes which see the same
        steps number them alike.

        Returns:
            Whether the step is recorded, be it for captures alone. False is a counted loss (or recording is paused); do
            not call `end_step` then.

        Raises:
            RuntimeError: a step is open already.
        """
        self._adopt_wanted()
        if self.captures.changed and not self._core.step_open:
            self.captures.adopt()
        if self._metadata.stale:
            try:
                self._publish_metadata()
            except OSError as error:  # segments carry the metadata as well, and close() writes it again
                log.warning("moe_native: rank.json cannot be written: %s", error)
        begun = self._begin_step(n_rows, None if spans is None else list(spans))
        if begun & _C.MESSAGES:
            self._log_messages()
        begun &= ~_C.MESSAGES
        self._for_captures = begun == _C.CAPTURED
        return begun == _C.ADMITTED or self._for_captures

    def place(self, places: Sequence[tuple[int, int, int, int]]) -> None:
        """Say where this thread's calls find the rows of the open step, which was begun with empty `spans`. A call
        whose tensors fit none of the places is counted as bad input.

        Args:
            places: at most 8 of `(tensor_rows, start, first, count)`: in tensors of `tensor_rows` rows (-1: of any
                number), those from `start` on are the step's rows from `first` on, `count` of them. The first that fits
                counts.

        Raises:
            ValueError: a number is negative, or there are too many.
        """
        self._core.place(list(places))

    def announce(self, runs: npt.NDArray[np.void] | bytes) -> None:
        """Say early, before the open step's first layer, what `end_step` will be told. Captures then take each layer as
        it comes, and a large step does not have to be kept for them until it ends."""
        self._core.announce(runs if isinstance(runs, bytes) else runs.tobytes())

    def narrow(self, n_rows: int) -> None:
        """The open step has only `n_rows` rows. To be said before its first layer."""
        self._core.narrow(n_rows)

    def end_step(self, runs: npt.NDArray[np.void] | bytes, tokens: npt.NDArray[Any] | None = None) -> bool:
        """Commit the open step.

        Args:
            runs: `RUN_DTYPE`, also as bytes, in the order of the rows; the counts add up to the step's rows.
            tokens: `[rows]` token ids; stored when the field `tokens` was asked for.

        Returns:
            Whether the step is in the trace; False is a counted loss, or it was for captures alone.

        Raises:
            ValueError: the runs do not cover the step's rows. The step stays open: abort it.
        """
        if not isinstance(runs, bytes):
            if runs.dtype != RUN_DTYPE or runs.ndim != 1:
                raise ValueError("runs must be a one-dimensional array of RUN_DTYPE")
            runs = runs.tobytes()
        if self._for_captures:  # what travels with steps waits for one that the trace has
            self._end_step(runs, None, b"", 0)
            return False
        if self._sampling.may_leave_out:
            runs = self._sampling.mark(self._core.step_number, np.frombuffer(runs, RUN_DTYPE)).tobytes()
        if tokens is None and not self._notes.waiting:  # as it is most often
            return self._end_step(runs, None, b"", 0)
        stored = None
        if tokens is not None and "tokens" in self.fields:
            stored = np.asarray(tokens, dtype=np.uint32).tobytes()
        notes = self._notes.next()
        kept = self._end_step(runs, stored, b"".join(notes), len(notes))
        if kept:
            self._notes.delivered(len(notes))
        return kept

    def abort_step(self) -> None:
        """Give the open step up, as after an exception in the forward pass. It is counted."""
        self._core.abort_step()

    def pause(self) -> None:
        """Record no step from the next one on, until `resume()`. The trace says how many there were; they are no
        losses. May be called by any thread, at any time."""
        self._core.pause(True)

    def resume(self) -> None:
        """Record again after `pause()`."""
        self._core.pause(False)

    def record(
        self,
        binding: int,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        router_logits: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Record one layer's rows of the open step (`moe_native.ops.record`). Outside a step it does nothing. Called
        again in a step, it goes on with the rows behind; rows beyond the step's are padding.

        Raises:
            ValueError: the binding is none of this recorder's.
        """
        if binding not in self._bindings:
            raise ValueError(f"binding {binding!r} is none of this recorder's: use what bind() returned")
        ops.record(topk_ids, topk_weights, router_logits, hidden, binding)

    @contextlib.contextmanager
    def step(
        self,
        requests: Sequence[str] | None = None,
        positions: Any = None,
        *,
        rows: int | None = None,
        prompt_lens: Mapping[str, int] | None = None,
        tokens: npt.ArrayLike | None = None,
        modality: str = "unknown",
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> Iterator[bool]:
        """A forward pass. What the routers record inside belongs to this step; an exception aborts it.

        Args:
            requests: names of the requests in the batch, in the order of their rows. With `positions` one sequence per
                request, one name per request; with `positions` a flat sequence of ints, one name per row. None: the
                rows are nobody's.
            positions: the absolute positions of the rows in their requests: `[[0, 1, 2], [7]]`, `[range(0, 5), range(0,
                7)]`, or one int a row; an int array works too. None where they are not known; then `rows` is needed.
            rows: number of rows, where it does not follow from `positions`.
            prompt_lens: length of each request's prompt, by name; rows below it are prefill, the others decode. Said
                once it holds for the request's later steps. Before that, its rows are of unknown phase.
            tokens: `[rows]` token ids, for the field `tokens`.
            modality: of all these rows.
            spans: which rows of the routers' tensors are real, as `(start, count)`; None: the first.

        Yields:
            Whether the step is recorded.
        """
        names, flat = one_per_row(requests, positions, rows)
        self._adopt_wanted()
        runs = runs_of(names, flat, modality, lambda name: self._learn(name, prompt_lens or {}))
        admitted = self.begin_step(len(flat), spans)
        if admitted and self.captures.under_way:
            self.announce(runs)
        try:
            yield admitted
            if admitted:
                self.end_step(runs, None if tokens is None else np.asarray(tokens))
        except BaseException:
            if admitted:
                self.abort_step()
            raise

    def _learn(self, name: str, prompt_lens: Mapping[str, int]) -> tuple[int, int]:
        """Index of a request, and its prompt's length (-1: unknown)."""
        info = {"prompt_len": int(prompt_lens[name])} if name in prompt_lens else {}
        return self._notes.request(name, info), self._notes.info(name).get("prompt_len", -1)

    # Life and death.

    def counters(self) -> dict[str, Any]:
        """What happened so far: steps begun and committed, losses by cause (`lost`), what was not recorded on request
        (`paused`), rows written (of these, `rows_stored` are not only counted), time waited, bytes, the drain thread's
        CPU seconds."""
        return dict(self._core.counters())

    def status(self) -> dict[str, Any]:
        """How it stands, in plain types: `directory` (None: no trace), `state` (`recording`, `paused` or `closed`;
        without a trace `idle` while nothing is captured), `fields`, `layers` (None: all) and `sample` as they are from
        the next step on, and of `counters()` the `steps`, `rows`, `rows_stored`, `lost` and `paused`."""
        tier, c = self._sampling.next, self.counters()
        return {
            "directory": None if self.directory is None else str(self.directory),
            "state": self._standing(),
            "fields": list(tier.fields),
            "layers": None if tier.layers is None else sorted(tier.layers),
            "sample": tier.sample,
            "steps": c["steps_committed"],
            "rows": c["rows_written"],
            "rows_stored": c["rows_stored"],
            "lost": c["lost"],
            "paused": c["paused"],
        }

    def flush(self, timeout: float = 30.0) -> None:
        """Make everything that is committed visible to readers.

        Raises:
            TimeoutError: the disk did not take it, or not in time. Losses are counted, as ever.
        """
        done = self._core.flush(timeout)
        self._log_messages()
        if not done and not self._closed:
            raise TimeoutError(f"{self.directory} could not be flushed within {timeout} s")

    def close(self) -> None:
        """Write what is there, close the trace and remove the ring. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        if not self._core.here:  # a forked child: the trace is its parent's
            return
        if self._commands is not None:
            self._commands.close()
        self._core.pause(False)  # late facts are to be written all the same
        if self._notes.amendments_wait and not self._core.step_open and self.begin_step(0):
            self.end_step(np.zeros(0, RUN_DTYPE))  # a step without rows takes them along
        self._core.close()
        self._log_messages()
        counters = self.counters()
        if self._file is None:
            self._core.remove_ring()
            return
        # The segments are whole either way, and say so themselves. Killed here, the ring is named by a rank that is
        # closed: whoever recovers the trace removes it, and nobody thinks that it has anything to say.
        with contextlib.suppress(OSError):
            self._file.update(closed=True, metadata=self._metadata.items, losses=counters["lost"])
        self._core.remove_ring()
        with contextlib.suppress(OSError):
            self._file.update(ring=None)
        self._file.release()
        with contextlib.suppress(
            OSError
        ):  # last, as a busy disk takes seconds, and vLLM kills a worker 5 s after its end
            self._file.sync()
        if counters["lost"]:
            log.warning("moe_native: %s: lost %s", self.directory, json.dumps(counters["lost"]))
        elif self._bindings and not counters["steps_begun"]:
            log.warning("moe_native: %s: no step was ever opened, so nothing is recorded", self.directory)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_at_exit"):
            self.close()

    def __repr__(self) -> str:
        if not self._core.here:
            return f"<moe_native.Recorder of the parent process {self.directory}>"
        c = self.counters()
        state = self._standing()
        if self.directory is None:
            return f"<moe_native.Recorder {state}, without a trace: {count(len(self.captures), 'capture')}>"
        steps, rows = c["steps_committed"], c["rows_written"]
        return f"<moe_native.Recorder {state} {self.directory}: {steps} steps, {rows} rows written>"

    def _standing(self) -> str:
        if self._closed:
            return "closed"
        if self.directory is None:
            return "recording" if len(self.captures) else "idle"
        return "paused" if self._core.paused else "recording"

    def _log_messages(self) -> None:
        for text in self._core.take_messages():
            log.warning("moe_native: %s", text)

    def _recover_dead_runs(self, trace: Path) -> None:
        """Fold the rings that crashed runs of this trace left into their segments. Recording must go on whatever is
        found there."""
        if not trace.is_dir():
            return
        try:
            for problem in moe_trace.recover(trace).problems:
                log.warning("moe_native: %s", problem)
        except Exception as error:
            log.warning("moe_native: a crashed run in %s could not be recovered: %s", trace, error)


def _close_at_exit(recorder: Recorder) -> Any:
    reference = weakref.ref(recorder)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close()

    atexit.register(close)
    return close
