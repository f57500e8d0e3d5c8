"""The examples: `stage_usage.py` as a user runs it, judged by a trace of the same capture; and how the others count, on
stand-ins for captures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import image_kind_usage
import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest
import stage_usage
import text_image_usage
import tiny_vision
import torch

import moe_trace
from moe_trace import metrics, plots

LAYER = 7
# Runs an example as the main program, and keeps what it captured.
KEEPING = """
import runpy, sys
import moe_native
capture, (program, path, *arguments) = moe_native.capture, sys.argv[1:]
def keeping(*given, **named):
    captured = capture(*given, **named)
    captured.save(path)
    return captured
moe_native.capture, sys.argv = keeping, [program, *arguments]
sys.path.insert(0, program.rpartition("/")[0])
runpy.run_path(program, run_name="__main__")
"""


class Sample:
    """Of a capture's sample what the examples look at. A letter of `tokens` is a token: t of text, i of an image, a and
    b of an answer; `ids` has the experts of each."""

    def __init__(self, tokens: str, ids: list[list[int]]) -> None:
        self._tokens, self._ids = tokens, torch.tensor(ids, dtype=torch.uint8).reshape(len(tokens), 2)
        self.prompt_len = len(tokens.rstrip("ab"))
        self.ids = {LAYER: self._ids}
        self.modality = np.array(["image" if token == "i" else "text" for token in tokens])

    def tokens(self, first: int, end: int) -> Sample:
        return Sample(self._tokens[first:end], self._ids[first:end].tolist())

    @property
    def prefill(self) -> Sample:
        return self.tokens(0, self.prompt_len)

    @property
    def decode(self) -> Sample:
        return self.tokens(self.prompt_len, len(self))

    def __len__(self) -> int:
        return len(self._tokens)


class Capture(list):
    def __init__(self, *samples: Sample, experts: int = 5) -> None:
        super().__init__(samples)
        self.geometry = [SimpleNamespace(layer=LAYER, experts=experts, top_k=2, name="")]


def lists(counts: dict[str, npt.NDArray[np.int64]]) -> dict[str, list[int]]:
    return {name: count.tolist() for name, count in counts.items()}


@pytest.fixture
def capture() -> Capture:
    return Capture(
        Sample("tiit", [[0, 1], [2, 3], [2, 4], [0, 255]]),  # 255 is no expert
        Sample("tti", [[1, 0], [1, 2], [3, 2]]),
        Sample("tt", [[4, 0], [4, 1]]),
    )


def test_text_and_images_are_counted_apart(capture: Capture) -> None:
    counts = text_image_usage.usage(capture)
    assert lists(counts) == {"text": [4, 4, 1, 0, 2], "image": [0, 0, 3, 2, 1]}
    said = text_image_usage.finding(counts, named=2).splitlines()
    # Half of |4/11 - 0| + |4/11 - 0| + |1/11 - 3/6| + |0 - 2/6| + |2/11 - 1/6|
    assert said[0].startswith("74.2 % of the choices would have to change")
    assert said[1] == (
        "chosen more by text: expert 0 (36.36 % of text, 0.00 % of images), "
        "expert 1 (36.36 % of text, 0.00 % of images)"
    )
    assert said[2] == (
        "chosen more by images: expert 2 (9.09 % of text, 50.00 % of images), "
        "expert 3 (0.00 % of text, 33.33 % of images)"
    )


def test_text_and_images_that_are_alike() -> None:
    said = text_image_usage.finding({"text": np.array([1, 3]), "image": np.array([2, 6])}).splitlines()
    assert said[0].startswith("0.0 %") and said[1:] == ["chosen more by text: none", "chosen more by images: none"]


def test_kinds_of_images_are_counted_apart(capture: Capture) -> None:
    counts = image_kind_usage.usage(capture, ["noise", "photos", "noise"])
    assert lists(counts) == {"noise": [0, 0, 2, 1, 1], "photos": [0, 0, 1, 1, 0]}
    assert image_kind_usage.finding(counts).splitlines() == [
        "noise: most its own is expert 4, 25.00 % of its choices, at most 0.00 % of another kind's",
        "photos: most its own is expert 3, 50.00 % of its choices, at most 25.00 % of another kind's",
    ]
    with pytest.raises(ValueError):
        image_kind_usage.usage(capture, ["noise"])


def test_stages_are_counted_apart() -> None:
    ids = [[0, 1], [0, 2], [1, 3], [1, 255], [4, 3], [4, 2], [4, 0]]
    capture = Capture(Sample("ttaabbb", ids), Sample("t", [[3, 1]]), Sample("tb", [[1, 0], [2, 4]]))
    assert lists(stage_usage.usage(capture)) == {
        "prompt": [3, 3, 1, 1, 0],
        "early": [0, 2, 0, 1, 0],
        "late": [1, 0, 2, 1, 4],
    }


def test_images_of_a_kind_are_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("a[1]/2.png", "a[1]/1.JPG", "a[1]/notes.txt", "b/x1.webp", "b/x2.webp", "b/y.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = image_kind_usage.named
    assert named([f"mine={tmp_path}/a[1]", f"{tmp_path}/b/x*.webp", f"{tmp_path}/b/y.webp"]) == (
        "mine",
        [f"{tmp_path}/{name}" for name in ("a[1]/1.JPG", "a[1]/2.png", "b/x1.webp", "b/x2.webp", "b/y.webp")],
    )
    for wrong in ("mine", "=x.png", "mine="):
        with pytest.raises(ValueError, match="--kind is NAME=PATH"):
            named([wrong])
    for missing in (f"{tmp_path}/c", f"{tmp_path}/a[1]/notes.txt"):
        with pytest.raises(ValueError, match="no image for mine at"):
            named([f"mine={missing}"])


def test_pictures_of_each_kind_are_drawn_alike_every_time() -> None:
    drawn = image_kind_usage.drawn()
    assert list(drawn) == ["gradients", "drawings", "noise"]
    pixels = {kind: [np.asarray(image) for image in images] for kind, images in drawn.items()}
    again = image_kind_usage.drawn()
    for kind, images in pixels.items():
        assert all((image == np.asarray(other)).all() for image, other in zip(images, again[kind], strict=True))
        assert len({image.tobytes() for image in images}) == len(images)
    rough = {kind: np.abs(np.diff(images[0].astype(int), axis=1)).mean() for kind, images in pixels.items()}
    assert rough["gradients"] < 2 < rough["drawings"] < rough["noise"]


def test_the_template_of_the_small_vision_model_says_where_an_image_is() -> None:
    tokenizer = tiny_vision.tiny_moe.make_tokenizer()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = tokenizer.apply_chat_template(chat, chat_template=tiny_vision.TEMPLATE, tokenize=False)
    assert text == f"{tiny_vision.IMAGE}What is it?"


@pytest.mark.vllm
def test_stage_usage_as_a_user_runs_it(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    program, picture, layer, generated = conftest.EXAMPLES / "stage_usage.py", tmp_path / "stages.png", 2, 21
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOE_NATIVE_")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_CACHE_ROOT"] = str(tmp_path / "cache")
    arguments = ["--model", checkpoint, "--layer", layer, "--out", picture, "--max-tokens", generated]
    done = subprocess.run(
        [sys.executable, "-c", KEEPING, str(program), str(tmp_path / "trace"), *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    trace = moe_trace.open(tmp_path / "trace")
    assert trace.layers == (layer,) and len(trace.requests) == len(stage_usage.PROMPTS)
    stages = {stage: np.zeros(60, np.int64) for stage in ("prompt", "early", "late")}
    for request in trace.requests:
        rows = trace.request(request)
        prompt = rows.prefill().rows
        # The last token is sampled and not executed; of the others the first half is early.
        assert rows.positions.tolist() == list(range(prompt + generated - 1))
        for stage, first, end in (
            ("prompt", 0, prompt),
            ("early", prompt, prompt + (generated - 1) // 2),
            ("late", prompt + (generated - 1) // 2, prompt + generated - 1),
        ):
            stages[stage] += np.bincount(rows.layer(layer).ids[first:end].ravel(), minlength=60)
    assert f"\n{stage_usage.finding(stages)}\n{picture}\n" in done.stdout
    shares = {stage: metrics.shares(count) for stage, count in stages.items()}
    expert = int(np.ptp(np.stack(list(shares.values())), axis=0).argmax())
    said = ", ".join(f"{stage} {100 * share[expert]:.2f} %" for stage, share in shares.items())
    assert f"\nexpert {expert} differs: {said}\n" in done.stdout

    pixels = matplotlib.image.imread(picture)
    expected = tmp_path / "expected.png"
    title, note = f"{checkpoint} · layer {layer}", f"{len(stage_usage.PROMPTS)} requests"
    plots.save(plots.groups_histogram(stages, title=title, note=note), expected)
    assert np.array_equal(pixels, matplotlib.image.imread(expected))
