"""A small Llava checkpoint whose text model is Qwen3-MoE: images through a projector into a mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_moe

LAYERS, EXPERTS, TOP_K = 2, 16, 4
IMAGE = "<image>"
EDGE, PATCH = 48, 16  # an image takes (48 / 16)² = 9 tokens


def make(directory: Path) -> int:
    """Writes model, tokenizer and processor; returns the id of the image token. Random weights, a fixed seed."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = tiny_moe.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    image = int(tokenizer.convert_tokens_to_ids(IMAGE))
    config = LlavaConfig(
        text_config={
            "model_type": "qwen3_moe",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "norm_topk_prob": True,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "architectures": ["Qwen3MoeForCausalLM"],
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": EDGE,
            "patch_size": PATCH,
            "projection_dim": 32,
        },
        image_token_index=image,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(EDGE // PATCH) ** 2,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(4321)
        model = LlavaForConditionalGeneration(config).float().eval()
    model.save_pretrained(directory)
    # With the published name of the vision tower, which transformers reads and does not write.
    weights = load_file(directory / "model.safetensors")
    tower = "vision_tower."
    save_file(
        {name.replace(tower, f"{tower}vision_model.", 1): weight for name, weight in weights.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save_pretrained(directory)
    # Written by hand, because transformers' own classes for it need torchvision.
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": EDGE},
        "crop_size": {"height": EDGE, "width": EDGE},
        "do_convert_rgb": True,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    (directory / "processor_config.json").write_text(json.dumps(processor))
    return image
