"""Directories and rank.json are as csrc/FORMAT.md says."""

from __future__ import annotations

import json
import os
import re
import stat

import pytest

from moe_native.rank_directory import RankFile, make_rank_directory


def test_names_and_modes(tmp_path):
    directory = make_rank_directory(tmp_path / "a" / "trace", "rank-0")
    assert re.fullmatch(rf"run-\d{{8}}T\d{{6}}Z-{os.getpid()}", directory.parent.name)
    for made in (directory, directory.parent, directory.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_second_recorder_in_the_same_second(tmp_path):
    made = {make_rank_directory(tmp_path, "rank-0") for _ in range(5)}
    assert len(made) == 5


def test_ranks_of_one_run_share_it(tmp_path):
    a, b = (make_rank_directory(tmp_path, rank, run="run-x") for rank in ("rank-0", "rank-1"))
    assert a.parent == b.parent and a.parent.name == "run-x"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_only_plain_names(tmp_path, name):
    with pytest.raises(ValueError, match="not a name"):
        make_rank_directory(tmp_path, name)


def test_the_file_is_replaced_as_a_whole(tmp_path):
    file = RankFile(tmp_path, {"pid": 1, "start_ticks": 2, "boot_id": "x"})
    file.update(metadata={"model": "m"})
    before = os.stat(file.path).st_ino
    file.update(closed=True)
    content = json.loads(file.path.read_text())
    assert content["format"] == "moe-native rank" and content["version"] == 1
    assert content["run_id"] == file.run_id.hex() and len(file.run_id) == 16
    assert content["closed"] and content["metadata"] == {"model": "m"} and content["owner"]["pid"] == 1
    assert os.stat(file.path).st_ino != before
    assert [p.name for p in tmp_path.iterdir()] == ["rank.json"]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_a_failure_leaves_the_old_file(tmp_path):
    file = RankFile(tmp_path, {})
    file.update(closed=False)
    with pytest.raises(TypeError):
        file.update(metadata={"bad": object()})
    assert json.loads(file.path.read_text())["closed"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["rank.json"]
