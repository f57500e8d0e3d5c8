"""What holds for every command: usage, errors, exit codes, help, terminals and pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import segment_bytes as sb
from command_line import ENV, META, blocks, failed, ok, run, write, write_lossy

from moe_trace import cli

COMMANDS = re.findall(r"^    (\w+) ", cli._parser().format_help(), re.MULTILINE)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "trace")


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    return write_lossy(tmp_path_factory.mktemp("cli") / "lossy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["summary"],
        ["summary", "TRACE", "--layer", "x"],
        ["summary", "TRACE", "--layer", "5-1"],
        ["summary", "TRACE", "--layer", "-1"],
        ["summary", "TRACE", "--layer", "70000"],
        ["summary", "TRACE", "--layer", "3"],
        ["summary", "TRACE", "--phase", "warm-up"],
        ["summary", "TRACE", "--since", "yesterday"],
        ["summary", "TRACE", "--run", "of yesterday"],
        ["export", "TRACE"],
        ["export", "TRACE", "-o", "-", "--format", "xml"],
        ["export", "TRACE", "-o", "rows.csv"],
        ["export", "TRACE", "-o", "-", "--format", "npz"],
        ["export", "TRACE", "-o", "rows.jsonl", "--per-step"],
        ["import", "rows.jsonl"],
        ["import", "rows.csv", "-o", "imported"],
        ["import", "rows.jsonl", "-o", "imported", "--top-k", "4"],
        ["import", "counts.pt", "-o", "imported", "--keep-going"],
        ["plot", "TRACE", "--nonsense"],
    ],
)
def test_usage_is_exit_code_2(trace, arguments):
    assert failed(*(str(trace) if a == "TRACE" else a for a in arguments), code=2)


def test_a_layer_that_is_not_there_says_which_are(trace, lossy):
    assert "which has layers 0, 1, 5" in failed("summary", trace, "--layer", "3", code=2)
    assert "layer 7 was missed: a fused kernel" in failed("plot", lossy, "--layer", "7", code=2)


def test_layers_add_up_and_a_negative_age_is_explained(trace):
    of = json.loads(ok("summary", trace, "--json", "--layer", "5", "--layer", "0,5"))
    assert of["selection"]["layers"] == [0, 5]
    assert failed("summary", trace, "--since", "-5m", code=2).endswith("write --since 5m for the last 5 minutes")


def test_what_cannot_be_read_is_exit_code_1(trace, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no trace at all, but a text")
    newer = sb.segment(blocks(), META, major=9)
    write(tmp_path / "newer", segments=[newer])
    segment = next((tmp_path / "newer").rglob("*.moe"))
    for command in (["summary"], ["info"], ["plot", "-o", tmp_path / "x.png"], ["export", "-o", tmp_path / "x"]):
        name, *rest = command
        assert "there is no" in failed(name, tmp_path / "nowhere", *rest, code=1)
        assert "empty" in failed(name, tmp_path / "empty", *rest, code=1)
        assert "text" in failed(name, tmp_path / "text", *rest, code=1)
        assert "version 9" in failed(name, segment, *rest, code=1)
    for command, name in (("plot", "x.png"), ("export", "x.jsonl")):
        assert failed(command, trace, "-o", tmp_path / "no" / name, code=1).endswith(f"directory {tmp_path / 'no'}")
    assert "no request 'z'" in failed("export", trace, "-o", "-", "--request", "z", code=1)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.png").exists()


def test_version_and_help():
    assert ok("--version").startswith("moe-native 0.")
    text = ok("--help")
    for command in ("summary", "info", "plot", "report", "compare", "export", "import", "recover", "ctl", "doctor"):
        assert command in text and command in COMMANDS
        assert ok(command, "--help").startswith(f"usage: moe-native {command}")


def examples_of(text):
    """The arguments of the command lines that a help gives."""
    lines = re.findall(r"^  (moe-native .*)", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def test_without_arguments_it_says_what_it_can_do(tmp_path):
    text = ok()
    assert text.startswith(ok("--help"))
    write(tmp_path / "trace", **layers_of_the_examples())
    examples = examples_of(text)
    assert [arguments[0] for arguments in examples] == ["summary", "plot", "doctor"]
    for arguments in examples[:2]:
        ok(*arguments, cwd=tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_works(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "40")  # narrower than an example, which is kept as it is written
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    *_, heading, last = text.splitlines()
    (arguments,) = examples_of(text)
    assert heading == "example:" and last.startswith(f"  moe-native {command} ") and arguments[0] == command
    for name in ("trace", "before", "after"):
        write(tmp_path / name, **layers_of_the_examples())
    (tmp_path / "moe_routes.jsonl").write_text('{"type": "route", "layer": 0, "topk_ids": [59, 7]}')
    done = run(*arguments, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    if command == "ctl":
        assert done.returncode == 1 and "nobody records into trace now" in done.stderr
    elif command == "doctor":
        assert done.returncode in (0, 1, 3) and done.stdout  # as the machine is
    else:
        assert (done.returncode, done.stderr) == (0, "")


def layers_of_the_examples():
    """What `write` takes for a trace that has every layer of which an example speaks."""
    layers = tuple(range(13))
    steps, notes = sb.make_steps([6, 2], layers=layers)
    metadata = {**META, "layers": sb.ledger(layers)}
    return {"metadata": metadata, "segments": [sb.segment([sb.rows_block(steps, notes=notes)], metadata)]}


def test_help_is_quick_because_it_imports_little():
    code = (
        "import sys; from moe_trace import cli; cli.main(['--help'])\n"
        "heavy = {'matplotlib', 'rich', 'torch', 'moe_native', 'vllm', 'subprocess'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENV, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("arguments", [["summary"], ["summary", "--json"], ["info"], ["export", "-o", "-"]])
def test_a_reader_that_leaves_early(tmp_path, arguments):
    """More output than a pipe holds, and nobody reads it: quiet, and the code of SIGPIPE."""
    layers = tuple(range(2000))
    steps, _ = sb.make_steps([2], layers=layers)
    path = write(
        tmp_path / "t", metadata={"layers": sb.ledger(layers)}, segments=[sb.segment([sb.rows_block(steps)], {})]
    )
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "moe_trace", arguments[0], str(path), *arguments[1:]]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENV)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_colour_and_progress_only_for_a_person(trace, tmp_path):
    command = [sys.executable, "-m", "moe_trace"]
    main, side = pty.openpty()
    env = {**ENV, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen([*command, "summary", str(trace)], stdout=side, stderr=side, env=env) as process:
        process.wait()
    text = os.read(main, 1 << 16)
    assert b"\x1b[1m" in text and b"losses" in text
    for name, file, said in (("export", "rows.jsonl", b"exporting"), ("report", "report.html", b"reading")):
        out = tmp_path / file
        with subprocess.Popen([*command, name, str(trace), "-o", str(out)], stdout=-3, stderr=side, env=env) as process:
            process.wait()
        assert said in os.read(main, 1 << 16) and out.exists()
    os.close(main)
    os.close(side)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to have a full disk")
@pytest.mark.parametrize("arguments", [["summary"], ["summary", "--json"], ["export", "-o", "-"], ["info"]])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_stdout(trace, arguments, unbuffered):
    command = [sys.executable, "-m", "moe_trace", arguments[0], str(trace), *arguments[1:]]
    with open("/dev/full", "w") as full:
        environment = {**ENV, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["summary"], ["summary", "--json"], ["export", "-o", "-"], ["info"]])
def test_a_closed_stdout(trace, arguments):
    command = [sys.executable, "-m", "moe_trace", arguments[0], str(trace), *arguments[1:]]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True, env=ENV)
    assert (done.returncode, done.stderr) == (1, "moe-native: standard output is closed\n")
