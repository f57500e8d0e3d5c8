"""What a vLLM engine was asked, what it answered, what was recorded of it, and the judges of that: vLLM's own account
of the tokens that it executed, and transformers' routing of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import moe_trace
from moe_native.runs import DRAFT

LAYERS, EXPERTS, TOP_K = 4, 60, 4  # of the checkpoint
PROMPTS = [f"Maria has {n} hens and buys {3 * n} more." + " How many eggs?" * n for n in range(6)]
MAX_TOKENS = 12
RECOMPUTED, REJECTED, SUPERSEDED, UNDECIDED = 1, 2, 4, 16  # flags of a row
NEAR_TIE = 1e-5  # two float32 implementations may order logits closer than this differently
ALL_FIELDS = "ids,weights,logits,hidden,tokens"


def job(checkpoint: Path, *calls: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """A job for `vllm_engine.py`; one call with all prompts unless given."""
    return {
        "engine": {
            "model": str(checkpoint),
            "dtype": "float32",
            "seed": 1234,
            "max_model_len": 256,
            "max_num_seqs": 4,  # fewer than the prompts, so that requests come and go
            "enable_prefix_caching": False,
            **engine,
        },
        "calls": list(calls) or [{"prompts": PROMPTS, "max_tokens": MAX_TOKENS}],
        "inspect": True,
    }


class Recorded:
    """A trace, and what vLLM said of the requests in it."""

    def __init__(self, path: Path, answer: dict[str, Any]) -> None:
        self.path = path
        self.trace = moe_trace.open(path)
        self.answer = answer
        self.calls: list[list[dict[str, Any]]] = answer["calls"]
        self.requests = [request for call in self.calls for request in call]

    @property
    def generated(self) -> list[list[int]]:
        return [request["generated"] for request in self.requests]

    def executed(self, request: dict[str, Any]) -> list[int]:
        """The tokens of a request that went through the model: the last one is sampled and not executed."""
        return [*request["prompt"], *request["generated"][:-1]]


class Transformers:
    """The routing of token sequences by transformers' own model of the checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    def logits(self, tokens: list[int], **inputs: Any) -> npt.NDArray[np.float32]:
        """`[tokens, layers, experts]`, from one pass over all of them. `inputs`: what the model is given beside."""
        import torch

        with torch.no_grad():
            output = self._model(torch.tensor([tokens]), output_router_logits=True, **inputs)
        logits: npt.NDArray[np.float32] = torch.stack(output.router_logits, dim=1).numpy()
        return logits

    def check_ids(self, tokens: list[int], ids: npt.NDArray[Any], what: str, **inputs: Any) -> tuple[int, int]:
        """`ids` `[tokens, layers, k]` are the experts that transformers chooses, but for near-ties. Returns how many
        rows of layers were compared, and how many of them were near-ties."""
        logits, top_k = self.logits(tokens, **inputs), ids.shape[-1]
        expected = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
        ranked = -np.sort(-logits, axis=-1)
        margin = ranked[..., top_k - 1] - ranked[..., top_k]
        different = (np.sort(ids.astype(np.int64), axis=-1) != np.sort(expected, axis=-1)).any(axis=-1)
        assert (margin[different] < NEAR_TIE).all(), f"{what}: {margin[different]}"
        return different.size, int(different.sum())


def check_rows(recorded: Recorded, requests: list[dict[str, Any]]) -> int:
    """The row that counts at each position holds the token that vLLM says was there, rows are marked as repeats exactly
    where their position had been executed before, and each executed position has its row. Returns how many repeats."""
    repeated = 0
    for request in requests:
        rows = recorded.trace.request(request["id"])
        seen: set[int] = set()
        for position, flag in zip(rows.positions.tolist(), rows.flags.tolist(), strict=True):
            assert flag & RECOMPUTED == (position in seen)
            repeated += flag & RECOMPUTED
            seen.add(position)
        cached = recorded.trace.requests[request["id"]].cached_tokens
        executed = recorded.executed(request)
        assert seen >= set(range(cached, len(executed)))
        current = rows.current()
        tokens = dict(zip(current.positions.tolist(), current.tokens.tolist(), strict=True))
        assert len(tokens) == current.rows
        for position in range(cached, len(executed)):
            assert tokens[position] == executed[position], (request["id"], position)
    return repeated


def check_fates(recorded: Recorded) -> tuple[int, int]:
    """Rejected drafts are exactly the rows whose position was executed again, beside those behind a request's end.
    Returns how many drafts there were, and how many were rejected."""
    rejected = 0
    for request in recorded.requests:
        rows, executed = recorded.trace.request(request["id"]), len(recorded.executed(request))
        order = rows.positions.tolist()
        for number, (position, flag) in enumerate(zip(order, rows.flags.tolist(), strict=True)):
            assert not flag & UNDECIDED  # the sampler's output says what became of the last step's drafts, too
            # A rejected draft's position is executed again, except behind the end of the request.
            if position < executed:
                assert bool(flag & REJECTED) == (position in order[number + 1 :])
            rejected += bool(flag & REJECTED)
    return sum(rows for cls, rows in recorded.trace.rows_by_class.items() if cls & DRAFT), rejected


def check_routing(recorded: Recorded, requests: list[dict[str, Any]], judge: Transformers) -> int:
    """Every position of these requests, cached ones included, was routed as transformers routes it. Returns how many
    rows of layers were compared."""
    compared = near_ties = 0
    for request in requests:
        tokens = recorded.executed(request)
        sequence = recorded.trace.sequence(request["id"])
        assert (sequence.state[: len(tokens)] >= 2).all(), sequence
        size, ties = judge.check_ids(tokens, sequence.ids[: len(tokens)], request["id"])
        compared, near_ties = compared + size, near_ties + ties
    assert near_ties <= compared / 100
    return compared
