"""What is known of a MoE architecture that vLLM shall run, and small checkpoints of it.

Weights are random, from a fixed seed: written by transformers' own class where it has one; else there is only a
configuration, and vLLM's model is filled (`load_format="dummy"`, `randomise`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routing_formulas import Routing

VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        family: its name.
        vllm: the class that vLLM must choose for it.
        config: transformers' configuration class; empty where transformers has none.
        settings: of the configuration, beside SIZES.
        layers: the MoE layers; `of` how many there are in all.
        experts: number of routed experts.
        routing: how it chooses, by what was published of it.
        transformers: what transformers' weights are, as a multiple of those that vLLM's router gives, since vLLM may
            apply the routed scaling factor to the experts' output. None where transformers is no judge: see `remark`.
        sees_logits: False where vLLM's router is not given the logits.
        hole: why it is not captured, in the trace's words; empty where it is.
        error: what vLLM says instead of running it; empty where it runs.
    """

    family: str
    vllm: str
    config: str
    settings: Mapping[str, Any]
    layers: tuple[int, ...] = ()
    experts: int = 0
    routing: Routing | None = None
    transformers: float | None = 1.0
    sees_logits: bool = True
    of: int = 3
    engine: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""
    hole: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        return "-".join(re.findall(r"\w+", self.family.lower()))


# Parts of configurations.
QWEN = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "norm_topk_prob": True}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
# Attention with a latent cache. The CPU build has a kernel for one size of it, 512 + 64.
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
}
DEEPSEEK = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
FIRST_DENSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
DELTA = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
BAILING = {
    **QWEN,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "rope_theta": 10000.0,
}

_CONFIGURATION = """\
from transformers import PreTrainedConfig


class Config(PreTrainedConfig):
    model_type = "without_a_class"
"""


def make(architecture: Architecture, directory: Path) -> None:
    """Writes the checkpoint: configuration and weights, or the configuration alone where transformers has no class."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "config.json"
    if architecture.config:
        _save_model(architecture, directory)
        written = json.loads(file.read_text())
    else:
        (directory / "configuration.py").write_text(_CONFIGURATION)
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        unsaid = {"model_type": "without_a_class", "rope_parameters": rope, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
        written = {**SIZES, **unsaid, **architecture.settings}
        written["auto_map"] = {"AutoConfig": "configuration.Config"}
    if architecture.vllm and not architecture.vllm.startswith("Transformers"):
        written["architectures"] = [architecture.vllm]  # as published: some differ from transformers' in their spelling
    file.write_text(json.dumps(written, indent=1))


def _save_model(architecture: Architecture, directory: Path) -> None:
    import transformers

    config = getattr(transformers, architecture.config)(**{**SIZES, **architecture.settings})
    if architecture.engine.get("load_format") == "dummy":
        config.save_pretrained(directory)
        return
    model_class = getattr(transformers, re.sub("(Text)?Config$", "ForCausalLM", architecture.config))
    model = model_class(config).float().eval()
    randomise([*model.named_parameters(), *model.named_buffers()])
    model.save_pretrained(directory)


def randomise(tensors: Iterable[tuple[str, Any]]) -> None:
    """Random values for every matrix and bias; the correction biases of routers too, which are made as zeros."""
    import torch

    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, tensor in tensors:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            if "bias" in name:
                tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
            elif "per_expert_scale" in name:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.dim() >= 2:
                spread = 0.15 if "gate.weight" in name or "router" in name else 0.06
                tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
            elif "norm" in name:
                tensor.fill_(1)
