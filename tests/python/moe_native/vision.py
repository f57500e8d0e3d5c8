"""The small vision-language checkpoint of the examples, and films for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_vision import EXPERTS, FILM, IMAGE, LAYERS, PIXELS, TOKENS, TOP_K, make, picture

__all__ = ["EXPERTS", "FILM", "IMAGE", "LAYERS", "PIXELS", "TOKENS", "TOP_K", "film", "make", "picture"]


def film(seed: int, frames: int, width: int, height: int) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    """Two frames a second, as `[frames, height, width, 3]`, and what vLLM wants to know of them."""
    pixels = np.stack([np.asarray(picture(seed + frame, width, height)) for frame in range(frames)])
    return pixels, {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
