"""Turns what a user gives into prompts that `vllm.LLM.generate` takes: `resolve`.

vLLM's engine loads nothing itself: a path in `multi_modal_data` is to it a sequence of characters, and a tensor of
three dimensions is a batch of embeddings. So images are loaded here, and become PIL images wherever vLLM could take
them for something else. vLLM is imported when something has to be fetched, or a video or a sound to be decoded.
"""

from __future__ import annotations

import contextlib
import importlib
import numbers
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["is_of_embeddings", "resolve"]

#: Where vLLM has kept `MediaConnector`, the newest place first.
_PLACES = ("vllm.multimodal.media.connector", "vllm.multimodal.media", "vllm.multimodal.utils")
_CHANNELS = (1, 3, 4)
_A_PROMPT = "a prompt is a string, token ids (integers), or a dict with 'prompt' or 'prompt_token_ids'"
_AN_IMAGE = "an image is a PIL image, a uint8 array (HxWx3 or HxW), a path, or an http(s), data or file URL"


def resolve(prompts: Any, *, model: str, takes_images: bool) -> list[Any]:
    """The prompts for `vllm.LLM.generate`, one per sample, in order.

    Args:
        prompts: one prompt, or a list or tuple of them. A prompt is a string; token ids (a list or tuple of integers,
            or an integer array or tensor [tokens]); or a dict with `prompt`, `prompt_token_ids` or `prompt_embeds`,
            perhaps `multi_modal_data`, and whatever else vLLM takes, which is left as it is. In `multi_modal_data`,

            - "image" is one image or a list or tuple of them: a PIL image; a uint8 array or tensor [height, width, 3]
              (or 1 or 4 channels, or [height, width], or channels first); a path; an http(s) URL, a base64 data URL or
              a file URL. Other arrays and dicts are vLLM's own forms, embeddings among them, and are left as they are,
              and so is None where `multi_modal_uuids` stands for it.
            - "video" and "audio" are what vLLM takes, or paths and URLs, one or several.
        model: its name, for what is said of a wrong prompt.
        takes_images: whether the model does.

    Returns:
        For each prompt a string or a new dict. What was loaded is in it as a PIL image in RGB (turned as its EXIF data
        say, on white where it was transparent, as vLLM does), (frames, metadata) or (samples, rate). Nothing of the
        caller's is changed.

    Raises:
        ValueError: something has none of these forms ("Unsupported input format"), cannot be fetched or is not what it
            should be; there is no prompt; or there is an image and the model takes none.
        FileNotFoundError: a path is not there.
        ImportError: something has to be fetched or decoded, and there is no vLLM, or one that is not known here.
    """
    if isinstance(prompts, (list, tuple)) and not prompts:
        raise ValueError("There is no prompt in the empty list that was given; give at least one")
    several = isinstance(prompts, (list, tuple)) and _token_ids(prompts) is None
    return [
        _prompt(prompt, f"prompt {index}", model, takes_images)
        for index, prompt in enumerate(prompts if several else [prompts])
    ]


def is_of_embeddings(prompt: Any) -> bool:
    """Whether vLLM reads the embeddings of a prompt that `resolve` has made. Then not all of its token ids are true,
    whatever vLLM returns as such: it fills in zeros, and token ids beside embeddings may stand for none."""
    return isinstance(prompt, Mapping) and prompt.get("prompt_embeds") is not None


def _prompt(given: Any, where: str, model: str, takes_images: bool) -> Any:
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping):
        return {"prompt_token_ids": _some_token_ids(given, where, _A_PROMPT)}
    prompt = dict(given)
    if prompt.get("prompt_token_ids") is not None:
        rule = "token ids are a list of integers or an integer array of one dimension"
        prompt["prompt_token_ids"] = _some_token_ids(prompt["prompt_token_ids"], f"prompt_token_ids of {where}", rule)
    elif prompt.get("prompt_embeds") is None and prompt.get("prompt") is None:
        raise _unsupported(given, where, _A_PROMPT)
    if not isinstance(prompt.get("prompt"), (str, type(None))):
        raise _unsupported(prompt["prompt"], f"'prompt' of {where}", "it is a string")
    media = prompt.get("multi_modal_data")
    if media is None:
        return prompt
    if not isinstance(media, Mapping):
        raise _unsupported(media, f"multi_modal_data of {where}", "it is a dict such as {'image': image}")
    prompt["multi_modal_data"] = media = dict(media)
    if "image" in media:
        if not takes_images:
            raise ValueError(f"{model} takes no images, and {where} has 'image' in its multi_modal_data; give it text")
        media["image"] = _images(media["image"], where, cached=prompt.get("multi_modal_uuids") is not None)
    for kind in ("video", "audio"):
        if kind in media:
            media[kind] = _recordings(media[kind], kind, where)
    return prompt


def _some_token_ids(given: Any, where: str, rule: str) -> list[int]:
    tokens = _token_ids(given)
    if not tokens:
        raise _unsupported(given, where, rule if tokens is None else "a prompt has at least one token")
    return tokens


def _token_ids(given: Any) -> list[int] | None:
    """The token ids that `given` is a list, tuple, array or tensor of; None if it is not."""
    if isinstance(given, (np.ndarray, torch.Tensor)):
        integers = given.ndim == 1 and _dtype(given).startswith(("int", "uint"))
    else:
        integers = isinstance(given, (list, tuple)) and all(map(_is_integer, given))
    return [int(token) for token in given] if integers else None


def _is_integer(given: Any) -> bool:
    return isinstance(given, numbers.Integral) and not isinstance(given, bool)


def _images(given: Any, where: str, cached: bool) -> Any:
    """What stands at "image". `cached` says that images may be left out, because vLLM may know their ids."""
    if isinstance(given, Mapping):
        return given
    if isinstance(given, (list, tuple)) or (isinstance(given, (np.ndarray, torch.Tensor)) and given.ndim == 4):
        return [_image(image, f"image {index} of {where}", cached, False) for index, image in enumerate(given)]
    return _image(given, f"image 0 of {where}", cached, True)


def _image(given: Any, where: str, cached: bool, alone: bool) -> Any:
    given = _unwrapped(given)
    if isinstance(given, Image.Image) or (given is None and cached):
        return given
    if isinstance(given, (np.ndarray, torch.Tensor)):
        return _of_array(given, where, alone)
    if not isinstance(given, (str, os.PathLike)):
        raise _unsupported(given, where, _AN_IMAGE)
    path = _local(given, where)
    if path is None:
        return _fetch("image", str(given), where)
    try:
        with Image.open(path) as image:
            return _rgb(image)
    except Exception as error:
        raise _not_loaded(where, path, error) from error


def _of_array(array: np.ndarray[Any, Any] | torch.Tensor, where: str, alone: bool) -> Any:
    """An array of bytes as an image; another one as it is, if vLLM can make something of it."""
    if _dtype(array) != "uint8":
        embedding = array.ndim == 2 and isinstance(array, torch.Tensor) and not alone
        if array.ndim == 3 or embedding:
            return array
        raise _unsupported(array, where, _AN_IMAGE)
    pixels = array.numpy(force=True) if isinstance(array, torch.Tensor) else array
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[2] not in _CHANNELS and pixels.shape[0] in _CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] not in _CHANNELS or not pixels.size:
        raise _unsupported(array, where, _AN_IMAGE)
    return _rgb(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _rgb(image: Image.Image) -> Image.Image:
    """A copy in memory as vLLM makes it of what it fetches, so that an image is the same wherever it lies."""
    with contextlib.suppress(Exception):  # EXIF data that make no sense
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _recordings(given: Any, kind: str, where: str) -> Any:
    """What stands at "video" or "audio", with the paths and URLs in it loaded."""
    if isinstance(given, (str, os.PathLike)):
        return _recording(given, kind, f"{kind} 0 of {where}")
    if isinstance(given, (list, tuple)) and any(isinstance(item, (str, os.PathLike)) for item in given):
        return [_recording(item, kind, f"{kind} {index} of {where}") for index, item in enumerate(given)]
    return _unwrapped(given)


def _recording(given: Any, kind: str, where: str) -> Any:
    if not isinstance(given, (str, os.PathLike)):
        return given
    path = _local(given, where)
    if path is None:
        return _fetch(kind, str(given), where)
    path = path.resolve()
    return _fetch(kind, path.as_uri(), where, path)


def _local(given: str | os.PathLike[Any], where: str) -> Path | None:
    """The file that a path or file URL names; None for a URL that is to be fetched."""
    name = os.fsdecode(given)
    if isinstance(given, str):
        scheme = re.match(r"(data):|([a-z][a-z0-9+.-]*)://", given, re.IGNORECASE)
        kind = (scheme[1] or scheme[2]).lower() if scheme else ""
        if kind in ("http", "https", "data"):
            return None
        if kind == "file":
            name = unquote(given[len("file://") :].removeprefix("localhost"))
        elif kind:
            raise _unsupported(given, where, "URLs that can be loaded begin with http://, https://, file:// or data:")
    if not os.path.exists(name):
        raise FileNotFoundError(f"{where} is {_named(name)}, which is neither a URL nor a file that is there")
    if not os.path.isfile(name):
        raise ValueError(f"{where} is {_named(name)}, which is a directory or a device; give the path of a file")
    return Path(name)


def _fetch(kind: str, url: str, where: str, path: Path | None = None) -> Any:
    """The image, video or audio at a URL, loaded by vLLM. `path` is what a file URL names."""
    connector = _connector()(allowed_local_media_path=str(path.parent) if path else "")
    try:
        return _unwrapped(getattr(connector, f"fetch_{kind}")(url))
    except Exception as error:
        raise _not_loaded(where, path or url, error) from error


def _connector() -> Any:
    """vLLM's MediaConnector."""
    first: Exception | None = None
    for place in _PLACES:
        try:
            return importlib.import_module(place).MediaConnector
        except (ImportError, AttributeError) as error:
            first = first or error
    raise ImportError(f"URLs, videos and sounds are loaded with vLLM's {_PLACES[0]}: {first}") from first


def _unwrapped(given: Any) -> Any:
    # vLLM does not take its own MediaWithBytes everywhere: one video that is not in a list is taken apart.
    return getattr(given, "media", given)


def _not_loaded(where: str, place: str | Path, error: Exception) -> ValueError:
    if isinstance(error, UnidentifiedImageError) or isinstance(error.__cause__, UnidentifiedImageError):
        cause = "what is there is not an image"
    else:
        cause = re.sub(r" \(parameter=.*\)$", "", str(error))  # where vLLM repeats the URL
    return ValueError(f"Cannot load {where} from {_named(str(place))}: {_short(cause or type(error).__name__, 300)}")


def _unsupported(given: Any, where: str, rule: str) -> ValueError:
    if isinstance(given, (np.ndarray, torch.Tensor)):
        shown = f"shape {tuple(given.shape)}, {_dtype(given)}"
    else:
        shown = _short(reprlib.repr(given), 80)
    return ValueError(f"Unsupported input format: {where} is of type {type(given).__name__} ({shown}); {rule}")


def _named(place: str) -> str:
    return _short(repr(place), 80 if place[:5].lower() == "data:" else 300)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _dtype(array: np.ndarray[Any, Any] | torch.Tensor) -> str:
    return str(array.dtype).removeprefix("torch.")
