"""The GSM8K experiment: its problems, what it reads and counts, its timing, and the whole of it on a small model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import numpy as np
import pytest
from scipy.stats import entropy

import moe_trace
from moe_trace import metrics
from moe_trace.exchange import jsonl

KIT = conftest.EXAMPLES / "gsm8k"
sys.path.insert(0, str(KIT))

import make_prompts  # noqa: E402
import plot_experts  # noqa: E402
import run_generate  # noqa: E402

# Prompts.


def test_each_bundled_problem_has_the_answer_that_its_working_gives() -> None:
    problems = json.loads(make_prompts.BUNDLED.read_text())
    assert len(problems) == 25 == len({problem["question"] for problem in problems})
    for problem in problems:
        assert re.fullmatch(r"[\d\s()+*/-]+", problem["working"])
        assert eval(problem["working"]) == problem["answer"], problem["question"]


def run(script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MOE_NATIVE_", "VLLM_LOG"))}
    return subprocess.run(
        [sys.executable, str(KIT / script), *map(str, arguments)],
        env=env | environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def test_bundled_prompts(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    done = run("make_prompts.py", "--bundled", "--number", 3, "--out", file)
    assert done.returncode == 0 and "3 problems, bundled" in done.stdout
    prompts = json.loads(file.read_text())
    assert prompts["source"] == "bundled" and [set(p) for p in prompts["problems"]] == [{"question", "answer"}] * 3


def test_gsm8k_comes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((names, split))
        return [{"question": "q", "answer": "#### 1", "other": ""}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))  # type: ignore[misc]
    prompts = make_prompts.make(25)
    assert asked == [(("openai/gsm8k", "main"), "test[:25]")]
    assert prompts == {"source": "openai/gsm8k test", "problems": [{"question": "q", "answer": "#### 1"}]}


def test_without_datasets_or_a_network_the_bundled_ones_are_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto anything")

    for module in (None, SimpleNamespace(load_dataset=load_dataset)):
        monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
        prompts = make_prompts.make()
        assert prompts["source"] == "bundled" and len(prompts["problems"]) == 25
    assert "GSM8K could not be had (no route): taking" in capsys.readouterr().err


# Counting.

LINES = [
    {"type": "meta", "model_id": "m", "layers_logged": [0, 5], "top_k": 2},
    {"type": "route", "req_id": "a", "token_idx": 0, "layer": 0, "topk_ids": [1, 3], "topk_weights": [0.5, 0.5]},
    {"type": "route", "req_id": "a", "token_idx": 0, "layer": 5, "topk_ids": [2, 0], "topk_weights": [0.5, 0.5]},
    {"type": "route", "req_id": "a", "token_idx": 1, "layer": 0, "topk_ids": [1, -1], "topk_weights": None},
    {"layer": 0, "topk_ids": [1, 0]},  # as other loggers have it
]


@pytest.fixture
def routes(tmp_path: Path) -> Path:
    path = tmp_path / "routes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + "\n")
    return path


def test_lines_are_counted(routes: Path) -> None:
    usage = plot_experts.of_jsonl(routes, None, None)
    assert {layer: counts.tolist() for layer, counts in usage.counts.items()} == {0: [1, 3, 0, 1], 5: [1, 0, 1, 0]}
    assert usage.rows == {0: 3, 5: 1} and usage.invalid == 1 and usage.model == "m"
    assert "4 experts are taken for all" in usage.notes[0]
    one = plot_experts.of_jsonl(routes, [5], 8)
    assert one.counts[5].tolist() == [1, 0, 1, 0, 0, 0, 0, 0] and list(one.counts) == [5] and not one.notes


def test_the_table_has_scipys_entropy(routes: Path) -> None:
    usage = plot_experts.of_jsonl(routes, [0], 6)
    (line,) = [line for line in plot_experts.table(usage).splitlines() if line.startswith("    0 ")]
    bits = entropy([1, 3, 0, 1], base=2)
    assert line.split() == [
        "0", "3", "1", "60.00", "%", "0", "20.00", "%", "3", "20.00", "%",
        f"{bits:.4f}", f"{bits / np.log2(6):.4f}", "3/6", "3.60",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "JSONDecodeError"),
        ('{"layer": 0}', "KeyError"),
        ("[1]", "AttributeError"),
        ('{"topk_ids": 3}', "TypeError"),
    ],
)
def test_a_line_that_is_not_understood_is_named(routes: Path, line: str, what: str) -> None:
    with routes.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(plot_experts.BadInput, match=rf"line 7 is no line of routes \({what}"):
        plot_experts.of_jsonl(routes, None, None)


def test_what_is_not_there_is_said(routes: Path) -> None:
    with pytest.raises(plot_experts.BadInput, match="no line of layer 1"):
        plot_experts.of_jsonl(routes, [0, 1], None)
    with pytest.raises(plot_experts.BadInput, match="has expert 3, so there are more than 3"):
        plot_experts.of_jsonl(routes, None, 3)
    done = run("plot_experts.py", routes.parent / "nothing.jsonl")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nothing.jsonl" in done.stderr
    done = run("plot_experts.py", routes.parent)
    assert done.returncode == 1 and "there is no trace in" in done.stderr


def test_a_trace_and_its_lines_give_the_same(tmp_path: Path) -> None:
    import torch

    from moe_native import Recorder

    generator = torch.Generator().manual_seed(1)
    with Recorder(tmp_path / "trace", metadata={"model": "m"}) as recorder:
        binding = recorder.bind(layer=3, experts=16, top_k=4)
        with recorder.step(requests=["a"], positions=[range(50)]):
            ids = torch.rand(50, 15, generator=generator).argsort(-1)[:, :4].to(torch.int32)  # expert 15 is dead
            recorder.record(binding, ids, torch.rand(50, 4, generator=generator))
    trace = moe_trace.open(tmp_path / "trace")
    file = tmp_path / "routes.jsonl"
    file.write_text("".join(text for text, _ in jsonl.jsonl(trace, trace, [])))
    said = []
    for source in ((tmp_path / "trace",), (file, "--experts", 16)):
        picture = tmp_path / "x.png"
        done = run("plot_experts.py", *source, "--layer", 3, "--out", picture)
        assert done.returncode == 0 and picture.read_bytes().startswith(b"\x89PNG"), done.stderr
        picture.unlink()
        said.append(done.stdout)
    assert said[0] == said[1]
    counts = np.bincount(ids.numpy().ravel(), minlength=16)
    assert f"{float(metrics.normalized_entropy(counts)):.4f}" in said[0] and " 15/16 " in said[0]


# Timing.


def turn(seconds: float, *tokens: list[int]) -> dict[str, Any]:
    return {"seconds": seconds, "tokens": list(tokens), "texts": ["" for _ in tokens]}


def test_timing_of_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_generate, "said", lambda settings: {"model": "m"})
    turns = {
        "no_log": [turn(1.0, [1, 2], [3]), turn(2.0, [1, 2], [3]), turn(4.0, [1, 2], [3])],
        "log": [turn(1.5, [1, 2], [3]), turn(2.0, [1, 2], [3]), turn(4.0, [1, 2], [])],
    }
    settings = {"questions": ["p", "q"]}
    timing = run_generate.compared(settings, turns, {"no_log": 0.5, "log": 0.75}, False)
    assert timing["no_log"]["wall_seconds"] == 2.0 and timing["no_log"]["tokens"] == 3
    assert timing["no_log"]["tokens_per_second"] == 1.5 and timing["log"]["turns"] == [1.5, 2.0, 4.0]
    assert timing["log"]["seconds_to_end"] == 0.75
    ratio = timing["ratio"]
    assert ratio["pairs"] == [1.5, 1.0, 1.5]  # the last turn took as long, for two thirds of the tokens
    assert (ratio["median"], ratio["lowest"], ratio["highest"], ratio["coverage"]) == (1.5, 1.0, 1.5, 0.75)
    assert ratio["same_answers"] == "1 of 2"


def test_timing_of_other_settings_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_generate, "said", lambda settings: settings)
    run_generate.write_json(tmp_path / "timing.json", {"settings": {"model": "a"}, "no_log": {}})
    assert "no_log" in run_generate.read_timing(tmp_path, {"model": "a"}) and not capsys.readouterr().err
    assert run_generate.read_timing(tmp_path, {"model": "b"}) == {"settings": {"model": "b"}}
    assert "of other settings" in capsys.readouterr().err


# The whole of it.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    with contextlib.redirect_stderr(io.StringIO()):
        conftest.tiny_moe.make(directory, layers=2)
    return directory


@pytest.mark.vllm
@pytest.mark.timeout(1500)  # four engines
def test_the_experiment(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    out, prompts = tmp_path / "out", tmp_path / "prompts.json"
    assert run("make_prompts.py", "--bundled", "--number", 4, "--out", prompts).returncode == 0
    common = ["--model", small, "--prompts", prompts, "--out", out, "--max-tokens", 8]
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    for arguments in ([], ["--log", "--layers", "1"]):
        done = run("run_generate.py", *common, *arguments, **environment)
        assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    assert "4 of 4 answers have the same tokens as those of no_log" in done.stdout
    timing = json.loads((out / "timing.json").read_text())
    assert set(timing) == {"settings", "no_log", "log"} and timing["log"]["tokens"] == timing["no_log"]["tokens"] > 0
    # Each executed token of the prompts and the answers, the last one of each being sampled only.
    usage = plot_experts.of_jsonl(out / "moe_routes.jsonl", None, 60)
    assert list(usage.counts) == [1]
    assert set(metrics.top(usage.counts[1]).tolist()) == set(conftest.tiny_moe.favoured(1, 60))
    lines = [json.loads(line) for line in (out / "moe_routes.jsonl").read_text().splitlines()[1:]]
    answers = json.loads((out / "answers_log.json").read_text())["answers"]
    decoded = {str(number): len(answer["tokens"]) - 1 for number, answer in enumerate(answers)}
    last = {name: max(line["token_idx"] for line in lines if line["req_id"] == name) for name in decoded}
    assert len(lines) == sum(last.values()) + 4 and all(last[name] > decoded[name] for name in decoded)

    done = run("run_generate.py", *common, "--compare", 1, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    timing = json.loads((out / "timing.json").read_text())
    assert set(timing) == {"settings", "no_log", "log", "ratio"} and len(timing["ratio"]["pairs"]) == 1
    assert timing["ratio"]["same_answers"] == "4 of 4"
    assert timing["log"]["turns"][0] / timing["no_log"]["turns"][0] == pytest.approx(timing["ratio"]["median"])
    assert "moe_native: recording 1 of 2 MoE layers" in (out / "log.vllm.log").read_text()
    assert "moe_native" not in (out / "no_log.vllm.log").read_text()
