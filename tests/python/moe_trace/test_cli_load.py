"""`moe-native import`, and `export` to the formats that are no text, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import exchanged
import numpy as np
import pytest
from command_line import ENV, failed, ok, run, write
from exchanged import log, route

import moe_trace

ROUTES = [route("a", at, layer, [at, 7]) for at in range(3) for layer in (0, 1)]


def test_import_says_what_it_made_and_what_the_log_did_not_say(tmp_path):
    log(tmp_path / "routes.jsonl", ROUTES)
    out = ok("import", tmp_path / "routes.jsonl", "-o", tmp_path / "t", "--model", "m", "--experts", "8")
    trace = moe_trace.open(tmp_path / "t")
    assert out.splitlines() == [
        f"{tmp_path / 't'}: 3 rows, 2 layers, 1 request, in {trace.runs[0].name}",
        "  the log does not say phases, modalities, times and steps: a step here is a block of rows",
    ]
    assert trace.metadata["model"] == "m" and trace.counts().shape == (2, 8)
    assert "m" in ok("summary", tmp_path / "t") and "imported" in ok("info", tmp_path / "t")


def test_json_says_what_was_made(tmp_path):
    path = log(tmp_path / "routes.jsonl", [*ROUTES, "{"])
    of = json.loads(ok("import", path, "-o", tmp_path / "t", "--keep-going", "--json", code=3))
    (problem,), notes = of.pop("problems"), of.pop("notes")
    assert problem.startswith("1 malformed line") and any("does not say" in note for note in notes)
    assert of == {
        "format": "moe-native import", "version": 1, "path": str(tmp_path / "t"),
        "runs": [run.name for run in moe_trace.open(tmp_path / "t").runs], "rows": 3, "requests": 1, "layers": [0, 1],
        "lines": 6, "skipped": 1,
    }  # fmt: skip


def test_import_of_several_files_and_of_a_run_more(tmp_path):
    files = [log(tmp_path / f"{n}.jsonl", [r for r in ROUTES if r["layer"] == n]) for n in (0, 1)]
    for _ in range(2):
        ok("import", *files, "-o", tmp_path / "t", "--token-idx", "step")
    trace = moe_trace.open(tmp_path / "t")
    assert len(trace.runs) == 2 and trace.ids.shape == (6, 2, 2) and set(trace.positions) == {-1}


def test_a_malformed_line(tmp_path):
    path = log(tmp_path / "routes.jsonl", [*ROUTES, "{"])
    message = failed("import", path, "-o", tmp_path / "t", code=1)
    assert message.startswith(f"moe-native: {path}:7: the line cannot be imported: it is no JSON")
    assert message.endswith("(--keep-going)") and not (tmp_path / "t").exists()
    done = run("import", path, "-o", tmp_path / "t", "--keep-going")
    assert done.returncode == 3 and done.stderr.splitlines() == [
        f"moe-native: 1 malformed line of the imported log was skipped, {path}:7: it is no JSON (Expecting property "
        "name enclosed in double quotes at column 2)"
    ]
    assert run("summary", tmp_path / "t").returncode == 3


def test_what_cannot_be_imported(tmp_path):
    path = log(tmp_path / "routes.jsonl", ROUTES)
    assert "nowhere.jsonl" in failed("import", tmp_path / "nowhere.jsonl", "-o", tmp_path / "t", code=1)
    assert "is no trace" in failed("import", path, "-o", path, code=1)
    assert failed("import", path, "-o", tmp_path / "no" / "t", code=1).endswith(
        f"there is no directory {tmp_path / 'no'}"
    )
    assert "experts=0 is no number" in failed("import", path, "-o", tmp_path / "t", "--experts", "0", code=1)
    assert "experts are numbered from 0 to 6" in failed("import", path, "-o", tmp_path / "t", "--experts", "7", code=1)


def test_counts_of_sglang_there_and_back(tmp_path):
    pytest.importorskip("torch", reason="needs torch, whose files these are")
    write(tmp_path / "trace")
    ok("export", tmp_path / "trace", "-o", tmp_path / "c.pt", "--per-step")
    ok("import", tmp_path / "c.pt", "-o", tmp_path / "t", "--top-k", "4")
    found, trace = moe_trace.open(tmp_path / "t"), moe_trace.open(tmp_path / "trace")
    assert np.array_equal(found.counts(), trace.counts()) and found.executed_rows == trace.rows
    assert "counts only" in failed("export", tmp_path / "t", "-o", tmp_path / "x.npz", code=1)


def test_export_to_arrays(tmp_path):
    write(tmp_path / "trace")
    ok("export", tmp_path / "trace", "-o", tmp_path / "x.npz", "--layer", "1")
    with np.load(tmp_path / "x.npz") as found:
        assert np.array_equal(found["ids"][:, 0], moe_trace.open(tmp_path / "trace").layer(1).ids)
    assert "logits were not recorded" in failed("export", tmp_path / "trace", "-o", tmp_path / "x.safetensors", code=1)
    done = run("export", tmp_path / "trace", "--format", "vllm", "-o", tmp_path / "arrays")
    assert done.returncode == 0 and "the 3 layers of these arrays are layers 0, 1, 5" in done.stderr
    assert {path.name for path in (tmp_path / "arrays").iterdir()} == {"a.npy", "b.npy", "%C3%BC%0A.npy"}


def test_a_missing_package_is_one_line(tmp_path):
    write(tmp_path / "trace")
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError('no', name='pyarrow')")
    env = {**ENV, "PYTHONPATH": f"{tmp_path}:{ENV['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "moe_trace", "export", tmp_path / "trace", "-o", tmp_path / "x.parquet"],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    message = "moe-native: Parquet needs pyarrow, which is not installed: pip install pyarrow\n"
    assert (done.returncode, done.stderr, (tmp_path / "x.parquet").exists()) == (1, message, False)


def test_a_part_that_is_missing_makes_the_export_lossy(tmp_path):
    pytest.importorskip("torch", reason="needs torch, whose files these are")
    exchanged.made(tmp_path / "t", [6, 3])
    done = run("export", tmp_path / "t", "-o", tmp_path / "x.pt", "--layer", "3")
    assert (done.returncode, done.stderr) == (3, "moe-native: layer 0 was not selected, and read as unused\n")
