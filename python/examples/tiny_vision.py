"""A small vision-language checkpoint with the routing geometry of Qwen3-VL-MoE (128 experts, top-8), and pictures for
it.

Its weights are random, from a fixed seed: it has learned nothing, and what its experts prefer means nothing. It serves
to try out what looks at a model. vLLM needs torchvision to load it, as for any model that sees.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny_moe
from PIL import Image, ImageDraw

LAYERS, EXPERTS, TOP_K = 3, 128, 8
TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IMAGE, FILM = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
PIXELS = 32  # of a token's edge: 2 x 2 patches of 16
# Of a chat: the parts of each message as they are, without roles.
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def make(directory: Path) -> dict[str, int]:
    """Writes model, tokenizer and processor; returns the ids of `TOKENS`. Random weights, a fixed seed."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    tokenizer = tiny_moe.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    ids = dict(zip(TOKENS, tokenizer.convert_tokens_to_ids(TOKENS), strict=True))
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "norm_topk_prob": True,  # as in the published configuration; vLLM asks for it
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
            "initializer_range": 0.1,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PIXELS // 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.1,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = Qwen3VLMoeForConditionalGeneration(config).float().eval()
    model.save_pretrained(directory)
    # With the published layout of the experts, which transformers reads and does not write.
    weights = {
        name: weight.transpose(1, 2).contiguous() if ".experts." in name else weight
        for name, weight in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    # Written by hand, because transformers' own classes for it need torchvision.
    pixels = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PIXELS // 2,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": PIXELS**2, "longest_edge": 64 * PIXELS**2},
        "image_mean": [0.5] * 3,  # vLLM reads them here, and knows no default
        "image_std": [0.5] * 3,
    }
    images = {"image_processor_type": "Qwen2VLImageProcessor", **pixels}
    videos = {"video_processor_type": "Qwen3VLVideoProcessor", **pixels}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    (directory / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return ids


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Discs of colour on a gradient."""
    random = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, radius = (int(n) for n in random.integers(0, [width, height, 1 + width // 3]))
        colour = tuple(int(n) for n in random.integers(0, 256, 3))
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return image


def gradient(seed: int, width: int, height: int) -> Image.Image:
    """A smooth change from colour to colour, corner to corner."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3)).astype(np.uint8)
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    above, below = ((1 - across) * left + across * right for left, right in corners.astype(float))
    return Image.fromarray(((1 - down) * above + down * below).astype(np.uint8))


def drawing(seed: int, width: int, height: int) -> Image.Image:
    """Black on white: words, lines and circles."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    words = tiny_moe.TEXT.split()
    for top in range(4, height - 12, 24):
        start = int(random.integers(len(words) - 12))
        draw.text((4, top), " ".join(words[start : start + 12]), fill="black")
    for _ in range(4):
        x, y, to_x, to_y = (int(n) for n in random.integers(0, [width, height, width, height]))
        draw.line([x, y, to_x, to_y], fill="black", width=2)
        draw.ellipse([x - 14, y - 14, x + 14, y + 14], outline="black", width=2)
    return image


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Each pixel of a colour of its own."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))
