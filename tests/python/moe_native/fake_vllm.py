"""Stand-ins for vLLM's routers and workers, with what the adapter looks at and no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class Router:
    """As vLLM's BaseRouter."""

    def __init__(self, experts: int = 8, top_k: int = 2) -> None:
        self.global_num_experts, self.top_k = experts, top_k

    def _compute_routing(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = router_logits.softmax(-1).topk(self.top_k, dim=-1, sorted=False)
        return weights, ids.to(torch.int32)

    def select_experts(self, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._compute_routing(hidden, logits, None, input_ids=None)


class Runner(torch.nn.Module):
    """As vLLM's MoERunner."""

    def __init__(
        self, name: str, router: Any, *, monolithic: bool = False, shared: int = 0, experts: int = 8, top_k: int = 2
    ) -> None:
        super().__init__()
        self.layer_name, self.router = name, router
        self.moe_config = SimpleNamespace(num_logical_experts=experts, experts_per_token=top_k)
        method = SimpleNamespace(is_monolithic=monolithic)
        experts_map = SimpleNamespace(num_fused_shared_experts=shared)
        self.routed_experts = SimpleNamespace(quant_method=method, expert_map_manager=experts_map)


def model(*runners: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleList([torch.nn.Linear(2, 2), *runners])


class Worker:
    """As vLLM's worker: two layers, `max_num_tokens` rows in its warm-up, and a batch of one request a step."""

    def __init__(self, **additional_config: Any) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config=additional_config, cache_config=SimpleNamespace(enable_prefix_caching=False)
        )
        self.rank, self.device = 0, torch.device("cpu")
        self.model_config = SimpleNamespace(model="fake", max_model_len=64, enforce_eager=True)
        self.model_runner: Any = None
        self.calls: list[str] = []
        self.forward_error: Exception | None = None

    def load_model(self) -> None:
        self.calls.append("load_model")
        self.model = model(*(Runner(f"model.layers.{n}.mlp.experts", Router()) for n in (1, 2)))
        self.model_runner = SimpleNamespace(
            get_model=lambda: self.model,
            input_batch=SimpleNamespace(req_ids=["r-01234567"], num_reqs=1),
            positions=torch.zeros(64, dtype=torch.int64),
            input_ids=torch.zeros(64, dtype=torch.int32),
            execute_model_state=None,
        )

    def compile_or_warm_up_model(self) -> str:
        self.calls.append("compile_or_warm_up_model")
        self.execute_model(scheduled(0, 64))  # as the newer runner does on a GPU
        return "warm"

    def execute_model(self, scheduler_output: Any) -> int:
        self.calls.append("execute_model")
        rows, first = scheduler_output.total_num_scheduled_tokens, scheduler_output.first
        self.model_runner.positions[:rows] = torch.arange(first, first + rows)
        for runner in list(self.model)[1:]:
            runner.router.select_experts(torch.randn(rows, 4), torch.randn(rows, 8))
        if self.forward_error is not None:
            raise self.forward_error
        return rows

    def sample_tokens(self, grammar_output: Any) -> str:
        self.calls.append("sample_tokens")
        return "sampled"

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def scheduled(first: int, count: int, prompt: int | None = None) -> Any:
    """The scheduler's output for `count` tokens of the one request; `prompt` is the prompt's length of a new one."""
    new = (
        []
        if prompt is None
        else [
            SimpleNamespace(
                req_id="r-01234567", prompt_token_ids=[0] * prompt, num_computed_tokens=first, block_ids=([],)
            )
        ]
    )
    cached = [] if new or not count else ["r-01234567"]
    return SimpleNamespace(
        first=first,
        finished_req_ids=set(),
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=cached, new_block_ids=[None] * len(cached), num_computed_tokens=[first], resumed_req_ids=set()
        ),
        num_scheduled_tokens={"r-01234567": count},
        total_num_scheduled_tokens=count,
    )
