"""What the program that is killed records, step by step: known in advance, so that a test can say what must be there.

Bit for bit: random from the number of the step, weights that float16 has exactly. Two requests at a time, for eight
steps each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LAYERS = (0, 3)
EXPERTS, K = 60, 4
STEPS_EACH = 8  # of a request
AT_ONCE = 2


@dataclass(frozen=True)
class Step:
    names: list[str]  # of each row
    positions: npt.NDArray[np.int64]
    prompts: dict[str, int]
    ids: dict[int, npt.NDArray[np.int32]]  # by layer, [rows, K]
    weights: dict[int, npt.NDArray[np.float32]]


def prompt_of(generation: int, wide: int) -> int:
    return 1 + generation * 7 % 23 + wide


def step(number: int, wide: int = 0) -> Step:
    """wide: so many rows more in each prompt."""
    generation, at = divmod(number, STEPS_EACH)
    prompt = prompt_of(generation, wide)
    of_request = np.arange(prompt) if at == 0 else np.array([prompt + at - 1])
    names = [f"{generation}-{i}" for i in range(AT_ONCE)]
    positions = np.concatenate([of_request] * AT_ONCE)
    ids, weights = {}, {}
    for layer in LAYERS:
        rng = np.random.default_rng((number, layer))  # nothing that compression could make small
        ids[layer] = np.argsort(rng.random((len(positions), EXPERTS)))[:, :K].astype(np.int32)
        weights[layer] = (rng.integers(0, 1024, (len(positions), K)) / 1024).astype(np.float32)
    of_rows = [name for name in names for _ in of_request]
    return Step(of_rows, positions, dict.fromkeys(names, prompt), ids, weights)
