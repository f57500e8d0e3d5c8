"""Every form of a prompt and of an image, and what is said of everything else."""

from __future__ import annotations

import base64
import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_native.captures import prompts as module
from moe_native.captures.prompts import resolve

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
GREY = COLOURS[:, :, 0]
IDS = {"prompt_token_ids": [3, 5]}


def media_of(kind: str, given: Any, **more: Any) -> Any:
    """What becomes of the images, say, in a prompt."""
    (prompt,) = resolve({"prompt": "", "multi_modal_data": {kind: given}, **more}, model="Tiny", takes_images=True)
    return prompt["multi_modal_data"][kind]


image_of = functools.partial(media_of, "image")


def pixels(image: Any) -> np.ndarray:
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files in a directory whose name has to be quoted in a URL."""
    path = tmp_path / "my pictures"
    path.mkdir()
    turned = Image.Exif()
    turned[0x112] = 6  # the camera was held upright
    Image.fromarray(COLOURS).save(path / "colours.png")
    Image.fromarray(COLOURS).save(path / "turned.png", exif=turned)
    Image.fromarray(np.dstack([COLOURS, GREY])).save(path / "clear.png")
    (path / "text.png").write_text("no image")
    (path / "torn.png").write_bytes((path / "colours.png").read_bytes()[:-40])
    return path


@pytest.fixture
def site(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL under which the directory is served."""
    pytest.importorskip("vllm", reason="URLs are fetched by vLLM, which is not installed here")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_texts_and_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # it is not needed
    ask = functools.partial(resolve, model="Tiny", takes_images=False)
    assert ask("hello") == ask(["hello"]) == ask(("hello",)) == ["hello"]
    several = ["", "file:///x.png", {"prompt": "a", "cache_salt": "s"}, {**IDS, "multi_modal_data": None}]
    assert ask(several) == several
    tokens = [[3, 5], (np.int64(3), 5), np.array([3, 5], np.uint16), torch.tensor([3, 5])]
    for given in (*tokens, {"prompt_token_ids": np.array([3, 5])}, [(3, 5)]):
        assert ask(given) == [IDS]
        assert [type(token) for token in ask(given)[0]["prompt_token_ids"]] == [int, int]
    assert ask([*tokens, "a"]) == [IDS, IDS, IDS, IDS, "a"]


def test_what_is_vllms_own_passes_and_nothing_of_the_callers_changes(directory: Path) -> None:
    data = {"image": [str(directory / "colours.png")], "vision_chunk": object(), "audio": ([0.5], 8000)}
    more = {"multi_modal_uuids": {"image": ["u"]}, "mm_processor_kwargs": {"n": 1}, "prompt_embeds": torch.ones(2, 3)}
    given = {**more, "multi_modal_data": data}
    (prompt,) = resolve([given], model="Tiny", takes_images=True)
    media = prompt["multi_modal_data"]
    assert all(prompt[name] is value for name, value in more.items())
    assert media["vision_chunk"] is data["vision_chunk"] and media["audio"] is data["audio"]
    assert (pixels(media["image"][0]) == COLOURS).all()
    assert given["multi_modal_data"] is data and data["image"] == [str(directory / "colours.png")]


def test_arrays_of_bytes_become_images() -> None:
    grey, clear = np.dstack([GREY] * 3), np.dstack([COLOURS, np.zeros_like(GREY)])
    cases = [(COLOURS, COLOURS), (np.moveaxis(COLOURS, 2, 0), COLOURS), (clear, np.full_like(COLOURS, 255))]
    for array, expected in [*cases, (GREY, grey), (GREY[:, :, None], grey)]:
        for given in (array, torch.from_numpy(np.ascontiguousarray(array))):
            assert np.array_equal(pixels(image_of(given)), expected)
            one, other = map(pixels, image_of((Image.fromarray(COLOURS), given)))
            assert np.array_equal(one, COLOURS) and np.array_equal(other, expected)


def test_other_forms_that_vllm_takes() -> None:
    embedding, picture = torch.ones(4, 8), Image.new("P", (3, 4))
    for given in (picture, np.ones((3, 5, 7), np.float32), embedding[None], {"image_embeds": embedding}):
        assert image_of(given) is given
    assert image_of([embedding])[0] is embedding
    with pytest.raises(ValueError, match=r"^Unsupported input format: .*Tensor \(shape \(4, 8\)"):
        image_of(embedding)  # of which vLLM would make four
    assert [pixels(image).shape for image in image_of(np.stack([COLOURS] * 2))] == [(5, 7, 3)] * 2
    assert image_of([None], multi_modal_uuids={"image": ["u"]}) == [None]
    # As vLLM's own fetch_image and fetch_video return it.
    assert all(media_of(kind, SimpleNamespace(media=picture)) is picture for kind in ("image", "video"))


def test_local_paths(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.chdir(directory)
    path = directory / "colours.png"
    for given in (path, str(path), "colours.png", path.as_uri(), f"file://localhost{path}"):
        assert np.array_equal(pixels(image_of(given)), COLOURS)
    assert np.array_equal(pixels(image_of(directory / "turned.png")), np.rot90(COLOURS, -1))


def test_urls_give_the_same_images_as_paths(directory: Path, site: str) -> None:
    for name in ("colours.png", "clear.png", "turned.png"):
        data = "data:image/png;base64," + base64.b64encode((directory / name).read_bytes()).decode()
        fetched, decoded, opened = map(pixels, image_of([f"{site}/{name}", data, directory / name]))
        assert np.array_equal(fetched, opened) and np.array_equal(decoded, opened), name


def test_a_url_that_cannot_be_fetched(site: str) -> None:
    causes = {"no.png": ".*404[^()]*$", "text.png": "what is there is not an image$"}
    urls = {f"{site}/{name}": cause for name, cause in causes.items()}
    for url, cause in {**urls, "http://127.0.0.1:1/": ".*refused"}.items():
        with pytest.raises(ValueError, match=f"^Cannot load image 1 of prompt 0 from '{url}': {cause}") as info:
            image_of([COLOURS, url])
        assert info.value.__cause__ is not None


@pytest.mark.parametrize("head", ["data:image/png;base64,AA", "data:image/png;base64,@@", "data:image/png,", "DATA:"])
def test_a_broken_data_url_is_named_in_short(head: str) -> None:
    pytest.importorskip("vllm", reason="data URLs are decoded by vLLM, which is not installed here")
    with pytest.raises(ValueError, match=f"^Cannot load image 0 of prompt 0 from '{head}A*…: .*[a-z]") as info:
        image_of(head + "A" * 400)
    assert len(str(info.value)) < 250


@pytest.mark.parametrize("name", ["no.png", "", "a\0.png", "iVBORw0KGgo" * 1000, "file:///no/where.png"])
def test_a_path_that_is_not_there(name: str) -> None:
    for kind in ("image", "video", "audio"):
        with pytest.raises(FileNotFoundError, match=f"^{kind} 1 of prompt 0 is '") as info:
            media_of(kind, [Image.new("L", (2, 2)), name])
        assert repr(name.removeprefix("file://"))[:40] in str(info.value) and len(str(info.value)) < 400


def test_a_file_that_is_no_image(directory: Path) -> None:
    for name, cause in {".": "which is a directory", "text.png": "is not an image", "torn.png": "[a-z]"}.items():
        with pytest.raises(ValueError, match=f"image 0 of prompt 0 .*{directory}/{name}'.* {cause}"):
            image_of(f"{directory}/{name}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, r"prompt 0 is of type NoneType \(None\); a prompt is a string"),
        (["a", 1.5], r"prompt 1 is of type float \(1\.5\)"),
        ([True, False], r"prompt 0 is of type bool \(True\)"),
        (np.ones((2, 3), np.int64), r"prompt 0 is of type ndarray \(shape \(2, 3\), int64\)"),
        (torch.ones(3), r"prompt 0 is of type Tensor \(shape \(3,\), float32\)"),
        (["a", []], r"prompt 1 is of type list \(\[\]\); a prompt has at least one token"),
        ({"promt": "x" * 1000}, r"prompt 0 is of type dict \(\{'promt': 'x+\.\.\.x+'\}\); a prompt is .*'prompt'"),
        ({"prompt": 7}, r"'prompt' of prompt 0 is of type int \(7\); it is a string"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids of prompt 0 is of type str .*list of integers"),
        ({"prompt": "", "multi_modal_data": [1]}, r"multi_modal_data of prompt 0 is of type list .*it is a dict"),
    ],
)
def test_a_prompt_of_no_known_form(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^Unsupported input format: {said}") as info:
        resolve(given, model="Tiny", takes_images=True)
    assert len(str(info.value)) < 300


@pytest.mark.parametrize("given", [None, b"\x89PNG", "s3://a/b.png", GREY / 2, COLOURS[:, :, :2], COLOURS[:0], GREY[0]])
def test_an_image_of_no_known_form(given: Any) -> None:
    for index, images in enumerate((given, [COLOURS, given])):
        said = rf"^Unsupported input format: image {index} of prompt 0 is of type {type(given).__name__} \("
        with pytest.raises(ValueError, match=said):
            image_of(images)


def test_no_prompt_and_no_images() -> None:
    with pytest.raises(ValueError, match="empty list"):
        resolve([], model="Tiny", takes_images=True)
    prompts = ["a", {"prompt": "b", "multi_modal_data": {"image": "not.there.png"}}]
    with pytest.raises(ValueError, match=r"^Tiny takes no images, and prompt 1 has"):
        resolve(prompts, model="Tiny", takes_images=False)


def test_a_video_is_decoded_by_vllm(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="videos are decoded by vLLM, which is not installed here")
    cv2 = pytest.importorskip("cv2", reason="the video is made with OpenCV, which is not installed here")
    path = tmp_path / "a film.avi"
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 4, (64, 48))
    for shade in (0, 100, 200):
        film.write(np.full((48, 64, 3), shade, np.uint8))
    film.release()
    for frames, metadata in (media_of("video", str(path)), *media_of("video", [path, path.as_uri()])):
        assert frames.shape == (3, 48, 64, 3) and metadata["fps"] == 4
        assert np.abs(frames.mean(axis=(1, 2, 3)) - (0, 100, 200)).max() < 4


@pytest.mark.parametrize("place", module._PLACES)
def test_sounds_and_where_vllm_has_its_loader(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every vLLM can decode sounds: a stand-in says what it was asked."""
    path, wave = tmp_path / "a b.wav", np.ones(3)
    path.touch()
    monkeypatch.chdir(tmp_path)
    for other in ("vllm", *module._PLACES):
        monkeypatch.setitem(sys.modules, other, None)
    with pytest.raises(ImportError, match=r"vLLM's vllm\.multimodal\.media\.connector: "):
        media_of("audio", path)

    def connector(allowed_local_media_path: str) -> SimpleNamespace:
        return SimpleNamespace(fetch_audio=lambda url: (url, allowed_local_media_path))

    monkeypatch.setitem(sys.modules, place, SimpleNamespace(MediaConnector=connector))
    local, fetched, (sound, _) = media_of("audio", [path.name, "https://host/c.wav", (wave, 8000)])
    assert local == (path.as_uri(), str(tmp_path)) and fetched == ("https://host/c.wav", "") and sound is wave
