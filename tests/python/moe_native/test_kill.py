"""SIGKILL anywhere: at every point of the recorder's protocol, at any moment, and during recovery. What was committed
is in the trace once, bit for bit, nothing else is, and recovering again changes nothing.

`MOE_NATIVE_KILLS=1000 pytest test_kill.py` kills so often at random (else 40 times).
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kill_workload as workload
import numpy as np
import pytest

import moe_trace

ROOT = Path(__file__).resolve().parents[3]
CORE = ROOT / "build" / "cpp" / "libmoe_native_core.so"
POINTS = {
    point: path.name
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*"))
    for point in re.findall(r'MOE_TEST_POINT\("([^"]+)"\)', path.read_text())
}
ONCE = {"ring", "end of recording"}  # points that a recorder passes once, by how their names begin
SMALL = {"ring_bytes": 64 << 10, "segment_bytes": 6000}
KILLS = int(os.environ.get("MOE_NATIVE_KILLS", "40"))

Ask = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not CORE.is_file(), reason="the library with the points is made by the C++ tests: make test-cpp"
)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks the program that is killed."""
    log = (tmp_path_factory.mktemp("kill") / "log").open("w+")
    program = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("kill_program.py"))],
        env={**os.environ, "LD_PRELOAD": str(CORE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert program.stdin is not None and program.stdout is not None

    def of(do: str, trace: Path, **arguments: Any) -> dict[str, Any]:
        arguments = {"do": do, "trace": str(trace), **arguments}
        program.stdin.write(json.dumps(arguments) + "\n")  # type: ignore[union-attr]
        program.stdin.flush()  # type: ignore[union-attr]
        line = program.stdout.readline()  # type: ignore[union-attr]
        log.seek(0)
        assert line, log.read()[-3000:]
        answer: dict[str, Any] = json.loads(line)
        assert answer["code"] == 0, log.read()[-3000:]
        return answer

    yield of
    program.stdin.close()
    program.wait(30)


def check(trace: moe_trace.Trace, ended: int, wide: int = 0, deleted: bool = False) -> dict[int, list[int]]:
    """The rows of a trace are those of the steps that had ended, and of one more at most. Returns the steps of each
    layer."""
    check_said(trace.problems, ended)
    found = {layer: check_layer(trace.layer(layer), layer, ended, wide) for layer in trace.layers}
    assert ended == 0 or set(found) == set(workload.LAYERS)
    for steps in found.values():
        first, end = (steps[0], steps[-1] + 1) if steps else (0, 0)
        assert steps == list(range(first, end)) and (first == 0 or deleted)
        assert ended <= end <= ended + 1, "a step that had ended is missing, or there is one that never was"
    lost = {cause: loss.steps for cause, loss in trace.losses.items() if loss.steps}
    assert set(lost) <= {"incomplete", "aborted"} and sum(lost.values()) <= 1
    return {layer: steps for layer, steps in found.items() if steps}


def check_said(problems: list[str], ended: int) -> None:
    """There is nothing to say but that a step was open."""
    assert len(problems) <= 1
    for problem in problems:
        assert f"the process died inside step {ended} " in problem


def check_layer(rows: moe_trace.Selection, layer: int, ended: int, wide: int) -> list[int]:
    """Each row of a layer is what the workload has. Returns the steps."""
    numbers, ids, weights, positions, requests = (
        rows.step_numbers, rows.ids, rows.weights, rows.positions, rows.request_ids
    )  # fmt: skip
    steps: list[int] = np.unique(numbers).tolist()
    for number in steps:
        of_step = numbers == number
        expected = workload.step(number, wide)
        np.testing.assert_array_equal(ids[of_step], expected.ids[layer])
        np.testing.assert_array_equal(weights[of_step], expected.weights[layer])
        if number < ended or requests[of_step][0] is not None:
            np.testing.assert_array_equal(positions[of_step], expected.positions)
            assert requests[of_step].tolist() == expected.names
    return steps


def check_both(path: Path, ended: int, rings: Path, **how: Any) -> None:
    """A trace as it was left, recovered, and recovered once more."""
    found = check(moe_trace.open(path), ended, **how)
    report = moe_trace.recover(path)
    check_said(report.problems, ended)
    trace = moe_trace.open(path)
    assert check(trace, ended, **how) == found and trace.state == "closed"
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert moe_trace.recover(path).ranks == []
    assert files == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert list(rings.iterdir()) == []


def begun(path: Path) -> bool:
    """Whether there is anything that a reader could open."""
    return any(path.rglob("*.moe*")) or any(path.rglob("rank.json"))


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(ask: Ask, tmp_path: Path, point: str) -> None:
    retention = point.startswith("retention")
    how: dict[str, Any] = {"wide": 500, "deleted": True} if retention else {}
    for number in (1,) if point.split(",")[0] in ONCE else (1, 2) if retention else (1, 2, 3, 7):
        path, rings = tmp_path / f"trace-{number}", tmp_path / f"rings-{number}"
        rings.mkdir()
        settings = {"max_bytes": 1 << 20, "segment_bytes": 128 << 10, "ring_bytes": 1 << 20} if retention else SMALL
        answer = ask("record", path, ring_dir=str(rings), steps=800 if retention else 2000, point=point,
                     wide=how.get("wide", 0), **{"pass": number}, **settings)  # fmt: skip
        assert answer["signal"] == 9, f"nobody came to {point!r} {number} times"
        if answer["ended"] or begun(path):
            check_both(path, answer["ended"], rings, **how)


def test_killed_at_any_moment(ask: Ask, tmp_path: Path) -> None:
    rng = random.Random(1)
    killed = 0
    for n in range(KILLS):
        path, rings = tmp_path / f"trace-{n}", tmp_path / f"rings-{n}"
        rings.mkdir()
        answer = ask("record", path, ring_dir=str(rings), steps=100_000, after=rng.uniform(0.002, 0.25), **SMALL)
        assert answer["signal"] == 9
        killed += answer["ended"] > 0
        if answer["ended"] or begun(path):
            check_both(path, answer["ended"], rings)
    assert killed > KILLS / 2


def test_killed_during_recovery(ask: Ask, tmp_path: Path) -> None:
    """Before each line of it, in strides; then recovered for good."""
    line, died = 1, 0
    while True:
        path, rings = tmp_path / f"trace-{line}", tmp_path / f"rings-{line}"
        rings.mkdir()
        ended = ask("record", path, ring_dir=str(rings), steps=60, point="drain, written", **{"pass": 3}, **SMALL)[
            "ended"
        ]
        answer = ask("recover", path, line=line)
        check_both(path, ended, rings)
        if answer["signal"] == 0:
            break
        died += 1
        line += 37
    assert died > 5
