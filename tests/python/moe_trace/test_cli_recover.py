"""`moe-native recover`: what it prints and its exit codes."""

from __future__ import annotations

import json

import segment_bytes as sb
from command_line import META, blocks, ok, run, write


def test_recover(tmp_path):
    assert "nothing to recover" in ok("recover", write(tmp_path / "whole"))
    torn = sb.segment(blocks(), META, closed=False) + b"torn"
    path = write(tmp_path / "t", segments=[torn], closed=False)
    done = run("recover", path)
    assert done.returncode == 3 and "recovered" in done.stdout and "torn" in done.stdout
    assert len(done.stderr.splitlines()) == 1 and "the trace is not whole" in done.stderr
    assert [file.name for file in path.rglob("*.moe*")] == ["000000.moe"]
    assert json.loads(run("summary", path, "--json").stdout)["layers"][0]["rows"] == 103
    (tmp_path / "empty").mkdir()
    assert "nothing to recover" in ok("recover", tmp_path / "empty")


def test_json_says_what_was_recovered(tmp_path):
    of = json.loads(ok("recover", write(tmp_path / "whole"), "--json"))
    nothing = {"ranks": [], "steps": 0, "rows": 0, "problems": []}
    assert of == {
        "format": "moe-native recover", "version": 1, "path": str(tmp_path / "whole"), **nothing, "complete": True
    }  # fmt: skip
    torn = sb.segment(blocks(), META, closed=False) + b"torn"
    path = write(tmp_path / "t", segments=[torn], closed=False)
    of = json.loads(ok("recover", path, "--json", code=3))
    (rank,), (problem,) = of["ranks"], of["problems"]
    assert rank == str(next(path.rglob("rank-0"))) and "torn" in problem and of["complete"] is False
    (tmp_path / "empty").mkdir()
    assert json.loads(ok("recover", tmp_path / "empty", "--json"))["complete"] is True
