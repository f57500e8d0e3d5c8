"""`moe-native ctl`: what it says to whom, and what comes back. The other side is a recorder made of files here."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest
import ring_bytes as rb
import segment_bytes as sb

from moe_trace import ctl
from moe_trace.cli import main
from moe_trace.errors import TraceError

META = {"model": "tiny", "layers": sb.ledger()}
STANDING = {
    "ok": True, "state": "recording", "fields": ["ids", "weights"], "layers": None, "sample": 1.0, "steps": 1200,
    "rows": 34000, "rows_stored": 34000, "lost": {}, "paused": None,
}  # fmt: skip


class Recorder:
    """Answers the commands that appear in a rank's directory."""

    def __init__(self, directory, reply):
        self.directory, self.reply, self.commands, self.modes = directory, reply, [], []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        path = self.directory / "command.json"
        while not self._stop.wait(0.01):
            if path.exists():
                self.modes.append(stat.S_IMODE(path.stat().st_mode))
                command = json.loads(path.read_text())
                path.unlink()
                self.commands.append((command["command"], command["arguments"]))
                (self.directory / "new").write_text(json.dumps({"id": command["id"], **self.reply}))
                os.replace(self.directory / "new", self.directory / "reply.json")

    def close(self):
        self._stop.set()
        self._thread.join()


@pytest.fixture
def ranks(tmp_path):
    """Directories of two live ranks of one run, and of a dead one."""
    made = []
    for run, rank in (("run-2", "rank-0"), ("run-2", "rank-1"), ("run-1", "rank-0")):
        owner = rb.owner_of(os.getpid()) if run == "run-2" else rb.dead_owner()
        made.append(tmp_path / "t" / run / rank)
        sb.write_rank(made[-1], [], metadata=META, closed=False, owner=owner)
    return made


@pytest.fixture
def recorders(ranks):
    made = [Recorder(rank, dict(STANDING)) for rank in ranks[:2]]
    yield made
    for recorder in made:
        recorder.close()


def test_every_live_rank_answers(tmp_path, ranks, recorders, capsys):
    assert main(["ctl", str(tmp_path / "t"), "status", "--timeout", "60"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run-2/rank-{i}  recording: ids,weights of all layers, sample 1; 1,200 steps, 34,000 rows written; "
        "lost nothing"
        for i in (0, 1)
    ]
    assert [recorder.commands for recorder in recorders] == [[("status", {})]] * 2
    assert recorders[0].modes == [0o600]
    assert all(not list(rank.glob("*command*")) and not list(rank.glob("*reply*")) for rank in ranks)


def test_json_has_an_object_for_each_that_records(tmp_path, ranks, recorders, capsys):
    recorders[1].reply = {"ok": False, "error": "no"}
    assert main(["ctl", str(tmp_path / "t"), "status", "--timeout", "60", "--json"]) == 1
    said = capsys.readouterr()
    assert said.err == "" and json.loads(said.out) == {
        "format": "moe-native ctl", "version": 1, "path": str(tmp_path / "t"), "command": "status",
        "answers": [
            {"run": "run-2", "rank": "rank-0", **STANDING},
            {"run": "run-2", "rank": "rank-1", "ok": False, "error": "no"},
        ],
    }  # fmt: skip


def test_set_sends_the_settings_as_they_are_written(tmp_path, ranks, recorders, capsys):
    words = ["fields=ids,weights,logits", "layers=0-3", "sample=0.1"]
    recorders[1].reply |= {"layers": [0, 3], "sample": 0.1, "rows_stored": 12, "lost": {"ring_full": {}}}
    assert main(["ctl", str(tmp_path / "t"), "set", *words, "--timeout", "60"]) == 0
    sent = {"fields": "ids,weights,logits", "layers": "0-3", "sample": "0.1"}
    assert [recorder.commands for recorder in recorders] == [[("set", sent)]] * 2
    second = capsys.readouterr().out.splitlines()[1]
    assert "layers 0,3, sample 0.1; 1,200 steps, 34,000 rows written, 12 of them stored; lost ring_full" in second


def test_a_refusal_is_told(tmp_path, ranks, recorders, capsys):
    recorders[0].reply = {"ok": False, "error": "fields is 'idz': 'idz' is not a field"}
    assert main(["ctl", str(tmp_path / "t"), "set", "fields=idz", "--timeout", "60"]) == 1
    said = capsys.readouterr()
    assert "run-2/rank-0: fields is 'idz'" in said.err and said.out.startswith("run-2/rank-1")


def test_a_rank_that_does_not_answer_is_told_and_not_steered_later(ranks, recorders, capsys):
    recorders[1].close()
    assert main(["ctl", str(ranks[1]), "pause", "--timeout", "0.1"]) == 1
    assert "run-2/rank-1: no answer within 0.1 s" in capsys.readouterr().err
    assert not (ranks[1] / "command.json").exists() and recorders[0].commands == []


def test_nobody_records(tmp_path, ranks, capsys):
    assert main(["ctl", str(ranks[2]), "status"]) == 1
    assert "nobody records into" in capsys.readouterr().err
    with pytest.raises(TraceError, match="there is no trace"):
        ctl.send(tmp_path / "x", "status", {})


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["stop"], "invalid choice"),
        (["set"], "set what?"),
        (["set", "ring_bytes=1"], "no setting that can be changed"),
        (["set", "sample"], "no setting that can be changed"),
        (["pause", "sample=1"], "takes no settings"),
        (["pause", "--timeout", "-1"], "number of seconds"),
    ],
)
def test_usage(tmp_path, words, hint, capsys):
    assert main(["ctl", str(tmp_path), *words]) == 2
    assert hint in capsys.readouterr().err
