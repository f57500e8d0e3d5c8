"""The demo's checkpoint has the skew that it says, by transformers' own routing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_moe
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_every_token_goes_to_the_favoured_experts(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = tiny_moe.expected_top3(checkpoint)
    assert expected is not None and model.dtype == torch.float32
    assert json.loads((checkpoint / tiny_moe.EXPECTED).read_text()) == {str(k): v for k, v in expected.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        routed = model(torch.randint(0, len(tokenizer), (4, 256)), output_router_logits=True).router_logits
    for layer, logits in enumerate(routed):
        chosen = logits.topk(4).indices
        for expert in expected[layer]:
            assert (chosen == expert).any(-1).all(), f"layer {layer}, expert {expert}"
        # The fourth place is the only one that varies, and it does.
        assert torch.bincount(chosen.flatten(), minlength=60).gt(0).sum() > 20


def test_the_bound_of_the_proof_holds_in_the_demo_model() -> None:
    tokenizer = tiny_moe.make_tokenizer()
    model = tiny_moe.make_model(tokenizer)  # 24 layers: the share falls from layer to layer
    torch.manual_seed(0)
    share = tiny_moe.smallest_share(model, torch.randint(0, len(tokenizer), (2, 256)))
    assert math.sqrt((1 - share) / (2 * share)) <= tiny_moe.FAVOUR / tiny_moe.NOISE


def test_the_seed_decides_everything() -> None:
    tokenizer = tiny_moe.make_tokenizer()
    first, second, other = (tiny_moe.make_model(tokenizer, layers=1, seed=seed) for seed in (5, 5, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_too_many_experts_for_the_proof_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden"):
        tiny_moe.make_model(tiny_moe.make_tokenizer(), layers=1, experts=128, hidden=64)
