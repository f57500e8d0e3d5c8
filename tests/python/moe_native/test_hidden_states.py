"""`hidden_states`: what it computes from logits, and from what the model chose. Live, it is in test_vllm_capture.py."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import moe_native.hidden_states as hs

ROWS, EXPERTS = 200, 12


@pytest.fixture
def logits() -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {layer: torch.randn(ROWS + layer, EXPERTS, generator=generator) for layer in (1, 4)}


def test_softmax_top_k_of_plain_tensors(logits: dict[int, torch.Tensor]) -> None:
    usage = hs.analyze_expert_usage(logits, top_k=3)
    assert list(usage) == [
        "expert_selection",
        "expert_weights",
        "expert_usage_counts",
        "load_balance",
        "num_tokens_analyzed",
    ]
    for layer, rows in logits.items():
        expected = np.argsort(-rows.numpy(), axis=1, kind="stable")[:, :3]
        assert usage["expert_selection"][layer].dtype == torch.int64
        assert np.array_equal(usage["expert_selection"][layer].numpy(), expected)
        probabilities = np.exp(rows.numpy()) / np.exp(rows.numpy()).sum(axis=1, keepdims=True)
        chosen = np.take_along_axis(probabilities, expected, axis=1)
        np.testing.assert_allclose(usage["expert_weights"][layer].numpy(), chosen, rtol=1e-5)
        counts = np.bincount(expected.ravel(), minlength=EXPERTS)
        assert usage["expert_usage_counts"][layer] == counts.tolist()
        assert usage["load_balance"][layer] == pytest.approx(stats.variation(counts, ddof=1), rel=1e-6)
    assert usage["num_tokens_analyzed"] == ROWS + 4


def test_normalised_counts_of_each_layer_add_up_to_k(logits: dict[int, torch.Tensor]) -> None:
    usage, plain = (hs.analyze_expert_usage(logits, top_k=4, normalize=each) for each in (True, False))
    for layer, rows in logits.items():
        assert sum(usage["expert_usage_counts"][layer]) == pytest.approx(4)
        shares = [count / len(rows) for count in plain["expert_usage_counts"][layer]]
        assert usage["expert_usage_counts"][layer] == pytest.approx(shares)
        assert usage["load_balance"][layer] == pytest.approx(plain["load_balance"][layer], rel=1e-5)


def test_a_range_of_tokens(logits: dict[int, torch.Tensor]) -> None:
    part = hs.analyze_expert_usage(logits, top_k=2, token_range=(10, 15))
    same = hs.analyze_expert_usage({layer: rows[10:15] for layer, rows in logits.items()}, top_k=2)
    assert part["num_tokens_analyzed"] == 5
    assert part["expert_usage_counts"] == same["expert_usage_counts"]


def test_what_the_model_chose_counts_before_softmax(logits: dict[int, torch.Tensor]) -> None:
    # A router with a bias: it does not choose the largest logits.
    ids = {layer: rows.topk(4, largest=False).indices.to(torch.uint8) for layer, rows in logits.items()}
    weights = {layer: torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) for layer, rows in ids.items()}
    captured = hs.RouterLogits(logits, ids, weights)
    usage = hs.analyze_expert_usage(captured, top_k=4)
    for layer in logits:
        assert torch.equal(usage["expert_selection"][layer].sort().values, ids[layer].long().sort().values)
        of_ids = usage["expert_weights"][layer]
        assert (of_ids[:, :-1] >= of_ids[:, 1:]).all()
        heaviest = ids[layer].long().gather(1, weights[layer].argmax(1, keepdim=True))
        assert torch.equal(hs.analyze_expert_usage(captured, top_k=1)["expert_selection"][layer], heaviest)
    # More than the model chose: there softmax is all there is.
    more = hs.analyze_expert_usage(captured, top_k=5)["expert_selection"]
    assert all(torch.equal(more[layer], logits[layer].topk(5).indices) for layer in logits)


def test_an_invalid_id_is_counted_for_nobody(logits: dict[int, torch.Tensor]) -> None:
    ids = {1: torch.full((ROWS + 1, 1), 255, dtype=torch.uint8)}
    ids[1][0] = 3
    usage = hs.analyze_expert_usage(hs.RouterLogits({1: logits[1]}, ids, {1: torch.ones(ROWS + 1, 1)}), top_k=1)
    assert sum(usage["expert_usage_counts"][1]) == usage["expert_usage_counts"][1][3] == 1


def test_an_even_load_is_balanced() -> None:
    usage = hs.analyze_expert_usage({0: torch.eye(8)}, top_k=1)
    assert usage["expert_usage_counts"][0] == [1.0] * 8 and usage["load_balance"][0] == 0
    assert hs.analyze_expert_usage({}, top_k=1)["num_tokens_analyzed"] == 0


@pytest.mark.parametrize(("top_k", "rows"), [(0, torch.ones(2, 4)), (5, torch.ones(2, 4)), (1, torch.ones(4))])
def test_unusable_arguments(top_k: int, rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="layer 7"):
        hs.analyze_expert_usage({7: rows}, top_k=top_k)


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_importing_it_arms_engines_unless_the_environment_says_no(before: str | None, after: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MOE_NATIVE_CAPTURE"}
    environment |= {} if before is None else {"MOE_NATIVE_CAPTURE": before}
    program = "import os, moe_native.hidden_states; print(os.environ['MOE_NATIVE_CAPTURE'])"
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == after
