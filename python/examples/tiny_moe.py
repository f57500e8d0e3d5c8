"""A small Mixture-of-Experts checkpoint whose routing is known beforehand.

    python tiny_moe.py DIRECTORY

It has the routing geometry of Qwen1.5-MoE-A2.7B (24 layers, 60 experts, top-4) and a tiny hidden size, so that it
loads in a second and still exercises everything that records a real model: `Qwen2MoeForCausalLM`, a byte-level BPE
tokenizer, safetensors. The weights are random, from a fixed seed, but for the gates: in every layer three experts are
favoured, and every token is routed to them. `expected_top3.json` beside the weights says which three, per layer.

Why every token: feature 0 of the residual stream is the constant `CONSTANT`. The embeddings put it there and no layer
writes to it (row 0 of each output projection is zero). The gate row of a favoured expert reads that feature alone.
The other gate rows are orthogonal to it and to each other and have the length `NOISE`. With h the router's input
after RMSNorm, |h|² = H, and f the share of |h|² in feature 0, a favoured expert has a logit of at least FAVOUR·√(fH),
and, by Bessel's inequality, two of the others can both reach t only if 2t² ≤ NOISE²·(1-f)·H. Of a row's four places
one is left to the others, so a favoured expert loses its place only if two of them are above it, which cannot happen
while

    FAVOUR / NOISE ≥ √((1-f) / 2f),   that is, with the numbers below,   f ≥ 0.182.

`smallest_share` measures f; on this checkpoint it stays above 0.22.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

EXPECTED = "expected_top3.json"
CONSTANT = 8.0  # feature 0 of every token, in every layer
FAVOUR = 1.2  # the weakest favoured expert's gate weight on that feature
NOISE = 0.8  # length of the other experts' gate rows
END = "<|endoftext|>"

TEXT = """\
A farmer has twelve hens and each hen lays five eggs in a week. How many eggs does he collect in three weeks?
Maria bought four notebooks at two dollars each and paid with a ten dollar note. How much change did she get?
There are thirty seats in a bus. Eighteen people get on and seven get off. How many seats are free now?
A baker makes ninety rolls, sells two thirds of them and gives half of the rest away. How many are left?
The train leaves at nine and arrives at a quarter past eleven. How many minutes did the journey take?
Each box holds six apples. If 54 apples are packed, how many boxes are full? 54 / 6 = 9, so the answer is 9.
First we add: 17 + 25 = 42. Then we subtract: 42 - 12 = 30. Then we multiply: 30 * 2 = 60. The answer is 60.
Question: what is the sum of 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10? Answer: 55, because 10 * 11 / 2 = 55.
Let x be the number of pupils. Then 3x + 4 = 25, so 3x = 21 and x = 7. There are seven pupils in the group.
He walked half of the way, rested for ten minutes, and then walked the other half twice as fast as before.
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `TEXT`; any string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def favoured(layer: int, experts: int) -> list[int]:
    """The three experts that every token of one layer is routed to, the strongest first. They differ from layer to
    layer."""
    return [(7 * layer + start) % experts for start in (3, experts // 3, 2 * experts // 3 + 1)]


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, layers: int = 24, experts: int = 60, hidden: int = 64, seed: int = 1234
) -> Qwen2MoeForCausalLM:
    """The model, in float32. `experts` must be less than `hidden` + 3, or the gate rows cannot be orthogonal."""
    if not 4 <= experts < hidden + 3:
        raise ValueError(f"need 4 <= experts < hidden + 3, not {experts=}, {hidden=}")
    vocabulary = len(tokenizer)
    # The end of text, and the bytes that are no character by themselves: generated text goes on and is readable.
    unwanted = [token for token in range(vocabulary) if token == 0 or not tokenizer.decode([token]).isprintable()]
    unwanted += [token for token in range(vocabulary) if "\ufffd" in tokenizer.decode([token])]
    config = Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        num_experts=experts,
        num_experts_per_tok=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.06,
        dtype="float32",
        eos_token_id=0,
        pad_token_id=0,
    )
    random = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = Qwen2MoeForCausalLM(config).float().eval()
        with torch.no_grad():
            _plant(model, experts, hidden, unwanted)
    finally:
        torch.random.set_rng_state(random)
    return model


def _plant(model: Qwen2MoeForCausalLM, experts: int, hidden: int, unwanted: list[int]) -> None:
    """Puts the constant feature into the residual stream and the skew into the gates (see the top of this file)."""
    embedding = model.model.embed_tokens.weight
    embedding.normal_()
    embedding[:, 0] = CONSTANT
    head = model.lm_head.weight
    head.normal_()
    head[:, 0] = 0
    head[unwanted, 0] = -10  # the constant feature is a bias: these tokens never come out
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.shared_expert.down_proj.weight[0] = 0
        layer.mlp.experts.down_proj[:, 0] = 0
        rows = torch.linalg.qr(torch.randn(hidden - 1, hidden - 1)).Q[: experts - 3] * NOISE
        best = favoured(number, experts)
        gate = layer.mlp.gate.weight
        gate.zero_()
        gate[[expert for expert in range(experts) if expert not in best], 1:] = rows
        for place, expert in enumerate(best):
            gate[expert, 0] = FAVOUR * (1.1 - 0.05 * place)


def smallest_share(model: Qwen2MoeForCausalLM, tokens: torch.Tensor) -> float:
    """f of the proof above: the least share of |h|² in feature 0, over all routers and all `tokens` ([batch,
    length])."""
    shares: list[float] = []

    def measure(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        energy = inputs[0].reshape(-1, inputs[0].shape[-1]).square()
        shares.append(float((energy[:, 0] / energy.sum(-1)).min()))

    hooks = [layer.mlp.gate.register_forward_pre_hook(measure) for layer in model.model.layers]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return min(shares)


def make(
    directory: str | Path, *, layers: int = 24, experts: int = 60, hidden: int = 64, seed: int = 1234
) -> dict[int, list[int]]:
    """Writes the checkpoint, its tokenizer and `expected_top3.json`; returns the expected top-3, layer by layer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, layers=layers, experts=experts, hidden=hidden, seed=seed)
    expected = {layer: favoured(layer, experts) for layer in range(layers)}
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    # Last: a directory that has this file is a whole checkpoint.
    (directory / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")
    return expected


def expected_top3(directory: str | Path) -> dict[int, list[int]] | None:
    """What `make` wrote, or None where the checkpoint is not one of ours."""
    file = Path(directory) / EXPECTED
    if not file.is_file():
        return None
    return {int(layer): best for layer, best in json.loads(file.read_text()).items()}


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the small Mixture-of-Experts checkpoint of this project's demo.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args(None if arguments is None else list(arguments))
    make(options.directory, layers=options.layers, experts=options.experts, seed=options.seed)
    print(f"{options.directory}: {options.layers} layers, {options.experts} experts, top-4")


if __name__ == "__main__":
    main()
