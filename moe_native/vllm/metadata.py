"""What ran: the trace's metadata, from a vLLM worker and its config."""

from __future__ import annotations

import hashlib
import re
from importlib import metadata
from typing import Any

_SIZES = {
    "tensor_parallel": "tensor_parallel_size",
    "pipeline_parallel": "pipeline_parallel_size",
    "data_parallel": "data_parallel_size",
}


def parallel_layout(worker: Any) -> dict[str, Any]:
    """Sizes of the parallel groups and this worker's rank in each, as `<group>_size` and `<group>_rank`. They exist
    once the worker has its device."""
    config = worker.parallel_config
    layout: dict[str, Any] = {f"{group}_size": int(getattr(config, name, 1)) for group, name in _SIZES.items()}
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    layout["tensor_parallel_rank"] = get_tp_group().rank_in_group
    layout["pipeline_parallel_rank"] = get_pp_group().rank_in_group
    layout["data_parallel_rank"] = int(getattr(config, "data_parallel_rank", 0) or 0)
    layout["prefill_context_parallel_size"] = int(getattr(config, "prefill_context_parallel_size", 1))
    layout["sequence_parallel"] = bool(getattr(config, "use_sequence_parallel_moe", False))
    layout["microbatches"] = int(config.num_ubatches) if getattr(config, "use_ubatching", False) else 1
    layout["expert_parallel"] = bool(getattr(config, "enable_expert_parallel", False))
    layout["world_size"] = int(getattr(config, "world_size", 1))
    return layout


def rank_name(rank: int, layout: dict[str, Any]) -> str:
    """Name of the rank's directory: `rank-0`, with the rank in each group that has more than one, as in
    `rank-0-tp0-dp1`."""
    name = f"rank-{rank}"
    for group, short in (("tensor", "tp"), ("pipeline", "pp"), ("data", "dp")):
        if layout[f"{group}_parallel_size"] > 1:
            name += f"-{short}{layout[f'{group}_parallel_rank']}"
    return name


def engine_key(vllm_config: Any) -> str | None:
    """The same in all workers of an engine, its data-parallel ranks included, and in no other engine; None where vLLM
    does not say."""
    instance = re.sub(r"_dp\d+$", "", str(getattr(vllm_config, "instance_id", "") or ""))
    return hashlib.blake2s(instance.encode(), digest_size=4).hexdigest() if instance else None


def describe(worker: Any, layout: dict[str, Any]) -> dict[str, Any]:
    """Metadata for the recorder (csrc/FORMAT.md, section 6)."""
    model, scheduler = worker.model_config, worker.scheduler_config
    compilation = worker.compilation_config
    return {
        "model": str(model.model),
        "device": str(getattr(worker, "device", None) or worker.device_config.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": model.seed,
        "versions": {"vllm": _vllm_version(), "transformers": _version("transformers")},
        "parallel": layout,
        "engine": {
            "runner": f"{type(worker.model_runner).__module__}.{type(worker.model_runner).__name__}",
            "enforce_eager": bool(model.enforce_eager),
            "compilation_mode": str(getattr(compilation, "mode", "unknown")),
            "max_model_len": model.max_model_len,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "prefix_caching": bool(getattr(worker.cache_config, "enable_prefix_caching", False)),
        },
    }


def _vllm_version() -> str | None:
    import vllm

    return str(vllm.__version__)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
