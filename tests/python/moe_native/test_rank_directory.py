"""Directories and rank.json are as csrc/FORMAT.md says."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import os
import re
import stat

import pytest

from moe_native.rank_directory import RankFile, make_rank_directory, shared_run, sweep_emptied_ranks


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


def test_processes_of_one_key_share_a_run(tmp_path):
    """Many at once: whoever comes first makes it."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda key: shared_run(tmp_path / "trace", key), ["aaaa", "bbbb"] * 20))
    assert len(set(names[::2])) == len(set(names[1::2])) == 1
    assert re.fullmatch(r"run-\d{8}T\d{6}Z-aaaa", names[0]) and sorted(set(names)) == names_of(tmp_path / "trace")
    assert stat.S_IMODE((tmp_path / "trace" / names[0]).stat().st_mode) == 0o700


def names_of(trace):
    return sorted(path.name for path in trace.iterdir())


def test_ranks_that_start_again_have_a_new_run(tmp_path):
    """Once a rank of a run is closed, or was recovered after a crash, the run takes no others."""
    first = shared_run(tmp_path, "aaaa")
    file = RankFile(make_rank_directory(tmp_path, "rank-0", first), {})
    file.update(closed=False)
    assert shared_run(tmp_path, "aaaa") == first
    file.update(closed=True)
    again = shared_run(tmp_path, "aaaa")
    assert again != first and all(shared_run(tmp_path, "aaaa") == again for _ in range(3))
    assert names_of(tmp_path) == sorted((first, again))


def test_a_rank_that_is_there_is_not_touched(tmp_path):
    there = make_rank_directory(tmp_path, "rank-0", "run-x")
    assert make_rank_directory(tmp_path, "rank-0", "run-x") != there


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


def locked(directory):
    """What another process finds: does somebody hold the directory's lock?"""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_the_rank_is_locked_while_its_owner_lives(tmp_path):
    file = RankFile(tmp_path, {})
    assert locked(tmp_path)
    file.release()
    assert not locked(tmp_path)
    file.release()
    another = RankFile(tmp_path, {})
    assert locked(tmp_path)
    del another
    assert not locked(tmp_path)


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    file = RankFile(tmp_path, {})
    told, tell = os.pipe()
    go, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(start)
        os.write(tell, b"x")
        os.read(go, 1)  # lives on until the parent has looked
        os._exit(0)
    os.read(told, 1)
    assert locked(tmp_path)
    file.release()
    held = locked(tmp_path)
    os.close(start)
    os.waitpid(child, 0)
    for handle in (told, tell, go):
        os.close(handle)
    assert not held


def test_only_closed_ranks_without_data_are_swept(tmp_path):
    def rank(name, closed, *files):
        directory = make_rank_directory(tmp_path, name, run=f"run-{name}")
        RankFile(directory, {}).update(closed=closed)
        for file in files:
            (directory / file).touch()
        return directory

    emptied = rank("emptied", True)
    stay = [rank("whole", True, "000003.moe"), rank("crashed", False), rank("ring", True, "x.ring")]
    broken = rank("broken", True)
    (broken / "rank.json").write_text("[")
    sweep_emptied_ranks(tmp_path)
    assert not emptied.parent.exists()
    assert all(directory.exists() for directory in [*stay, broken])
