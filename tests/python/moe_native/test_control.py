"""Commands to a recorder: by call, and by the file in its directory; refused ones are told and change nothing."""

from __future__ import annotations

import json
import os
import stat
import threading
import time

import pytest
from routed_program import LAYERS, Program

import moe_native
import moe_trace
from moe_native import control
from moe_trace import ctl


@pytest.fixture
def recorder(tmp_path):
    with moe_native.Recorder(tmp_path / "t") as recorder:
        yield recorder


def step(recorder, program, rows=2):
    with recorder.step(rows=rows):
        program.forward(rows)


def test_commands_do_what_they_say(recorder):
    program = Program(recorder)
    assert control.obey(recorder, "pause")["state"] == "paused"
    step(recorder, program)
    assert control.obey(recorder, "resume")["state"] == "recording"
    step(recorder, program)
    answer = control.obey(recorder, "flush")
    assert answer["ok"] and answer["rows"] == 2 and answer["paused"] == {"steps": 1, "layers": 0, "rows": 2}
    answer = control.obey(recorder, "set", {"fields": "ids,logits", "layers": [0, "2"], "sample": "0.5"})
    assert (answer["fields"], answer["layers"], answer["sample"]) == (["ids", "logits"], [0, 2], 0.5)
    assert control.obey(recorder, "status") == answer
    assert json.loads(json.dumps(answer)) == answer


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        ("stop", {}, "no command"),
        ("pause", {"now": 1}, "takes nothing"),
        ("set", {}, "set what"),
        ("set", {"ring_bytes": 1}, "takes fields, layers, sample"),
        ("set", {"fields": "idz"}, "'idz' is not a field"),
        ("set", {"sample": 2}, "sample is 2"),
        ("flush", {"seconds": "x"}, "float"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(recorder, command, arguments, why):
    before = recorder.status()
    answer = control.obey(recorder, command, arguments)
    assert answer["ok"] is False and why in answer["error"]
    assert recorder.status() == before


def test_a_command_by_file_holds_from_the_next_step_on(tmp_path, recorder):
    program = Program(recorder)
    step(recorder, program)
    (answer,) = ctl.send(tmp_path / "t", "set", {"fields": "counts"}, 60)
    assert answer.ok and answer.directory == recorder.directory and answer.reply["fields"] == ["counts"]
    step(recorder, program, 5)
    (answer,) = ctl.send(tmp_path / "t", "pause", {}, 60)
    step(recorder, program)
    (answer,) = ctl.send(tmp_path / "t", "flush", {}, 60)
    assert answer.reply["state"] == "paused" and answer.reply["rows"] == 7 and answer.reply["rows_stored"] == 2
    trace = moe_trace.open(tmp_path / "t")
    assert (trace.rows, trace.executed_rows, trace.paused.rows) == (2, 7, 2)
    assert trace.metadata["fields"] == ["counts"]
    assert sorted(file.name for file in recorder.directory.iterdir()) == ["000000.moe.open", "rank.json"]


def test_a_refusal_comes_back(tmp_path, recorder):
    (answer,) = ctl.send(tmp_path / "t", "set", {"fields": "everything"}, 60)
    assert not answer.ok and "'everything' is not a field" in answer.reply["error"]


def give(recorder, content, mode=0o600):
    path = recorder.directory / "command.json"
    path.write_text(content)
    path.chmod(mode)
    return path


def until_taken(path):
    end = time.monotonic() + 60
    while os.path.lexists(path) and time.monotonic() < end:
        time.sleep(0.02)
    assert not os.path.lexists(path)


def test_strangers_files_are_refused(recorder, caplog):
    target = recorder.directory / "elsewhere"
    target.write_text('{"command": "pause"}')
    for make in (
        lambda path: give(recorder, '{"command": "pause"}', 0o666),  # anybody could have written it
        lambda path: os.symlink(target, path),
        lambda path: give(recorder, "no json"),
        lambda path: give(recorder, '["pause"]'),
        lambda path: os.mkfifo(path, 0o600),
    ):
        path = recorder.directory / "command.json"
        make(path)
        until_taken(path)
    assert recorder.status()["state"] == "recording" and target.exists()
    assert sum("cannot be followed" in record.message for record in caplog.records) == 1
    until_taken(give(recorder, '{"command": "pause", "id": "x"}'))
    (reply,) = [recorder.directory / "reply.json"]
    end = time.monotonic() + 60
    while not reply.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert json.loads(reply.read_text())["state"] == "paused"
    assert stat.S_IMODE(reply.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_another_users_file_is_refused(recorder):
    path = recorder.directory / "command.json"
    beside = recorder.directory / "x"
    beside.write_text('{"command": "pause"}')
    beside.chmod(0o600)
    os.chown(beside, 12345, -1)
    os.replace(beside, path)
    until_taken(path)
    assert recorder.status()["state"] == "recording"


def test_the_thread_ends_with_the_recorder(tmp_path):
    def ours():
        return [thread for thread in threading.enumerate() if thread.name == "moe-native-ctl"]

    before = len(ours())
    recorder = moe_native.Recorder(tmp_path / "t")
    assert len(ours()) == before + 1
    child = os.fork()
    if child == 0:
        there = len(ours())
        recorder.close()
        os._exit(there)
    assert os.waitpid(child, 0)[1] == 0
    recorder.close()
    assert len(ours()) == before
    assert control.obey(recorder, "status")["state"] == "closed"
    recorder = moe_native.Recorder(tmp_path / "t")
    del recorder
    assert len(ours()) == before


def test_commands_while_steps_run(tmp_path):
    """Another thread changes everything while steps go on: each step is of one kind, and nothing is lost."""
    done = threading.Event()
    with moe_native.Recorder(tmp_path / "t") as recorder:

        def steer():
            i = 0
            while not done.is_set():
                i += 1
                recorder.set(fields=("counts", "ids,weights", "ids,logits")[i % 3], layers=("all", "0-1")[i % 2])
                recorder.set(sample=i % 4 / 3)
                (recorder.pause if i % 5 == 0 else recorder.resume)()

        thread = threading.Thread(target=steer)
        thread.start()
        program = Program(recorder)
        try:
            for i in range(300):
                with recorder.step(requests=["a", "b"], positions=[[i], [i]]):
                    program.forward(2)
        finally:
            done.set()
            thread.join()
        begun = recorder.counters()["steps_begun"]
    trace = moe_trace.open(tmp_path / "t")
    assert trace.losses == {} and trace.problems == []
    assert trace.executed_rows == 2 * begun and begun + trace.paused.steps == 300
    assert trace.stats()[0].rows == 2 * begun == trace.stats()[LAYERS - 2].rows
