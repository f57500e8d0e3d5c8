"""Choosing a format, and what holds for each."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings

import exchanged
import numpy as np
import pytest
import segment_bytes as sb
import test_joined

import moe_trace
from moe_trace import exchange
from moe_trace.exchange.made import package


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return exchanged.made(tmp_path_factory.mktemp("t") / "t")[0]


@pytest.mark.parametrize(
    ("name", "format"),
    [("x.jsonl", "jsonl"), ("a/x.NPZ", "npz"), ("x.parquet", "parquet"), ("x.safetensors", "safetensors"),
     ("x.pt", "sglang"), ("x.ndjson", "jsonl")],
)  # fmt: skip
def test_the_ending_names_the_format(name, format):
    assert exchange.format_of(name) == format


@pytest.mark.parametrize("name", ["x", "x.csv", ".npz"])
def test_an_ending_that_names_none(name):
    with pytest.raises(ValueError, match=r"says no format: end it in one of jsonl \(\.jsonl\), npz"):
        exchange.format_of(name)


def test_arguments_that_do_not_fit(trace, tmp_path):
    with pytest.raises(ValueError, match="no format 'csv' to export to: use jsonl, npz"):
        exchange.export(trace, tmp_path / "x", "csv")
    with pytest.raises(ValueError, match="per_step is for the format sglang"):
        exchange.export(trace, tmp_path / "x.npz", per_step=True)
    with pytest.raises(ValueError, match="only jsonl is text"):
        exchange.export(trace, io.StringIO(), "npz")
    with pytest.raises(ValueError, match="no format 'npz' to import: use jsonl or sglang"):
        exchange.load([tmp_path / "x.npz"], tmp_path / "t")
    with pytest.raises(ValueError, match="no file to import"):
        exchange.load([], tmp_path / "t")
    with pytest.raises(ValueError, match="experts=0 is no number of experts"):
        exchange.load([tmp_path / "x.jsonl"], tmp_path / "t", experts=0)
    with pytest.raises(ValueError, match="top_k is for the format sglang"):
        exchange.load([tmp_path / "x.jsonl"], tmp_path / "t", top_k=2)
    with pytest.raises(ValueError, match="token_idx='batch' is not known: use auto, position, step"):
        exchange.load([tmp_path / "x.jsonl"], tmp_path / "t", token_idx="batch")
    with pytest.raises(moe_trace.TraceError, match="is a directory"):
        exchange.export(trace, tmp_path, "npz")
    assert not list(tmp_path.iterdir())


def test_counts_alone_have_no_rows(tmp_path):
    steps, _ = sb.make_steps([4, 2])
    data = sb.segment([sb.sampled_block(steps, ())], {"layers": sb.ledger()})
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata={"layers": sb.ledger()})
    for format in set(exchange.FORMATS) - {"sglang"}:
        with pytest.raises(moe_trace.TraceError, match="counts only, and no row to export; counts can be"):
            exchange.export(moe_trace.open(tmp_path / "t"), tmp_path / "x", format)


@pytest.mark.parametrize("format", ["jsonl", "npz"])
def test_sampled_rows_are_said_to_be(tmp_path, format):
    steps, notes = sb.make_steps([4, 3, 2])
    data = sb.segment([sb.sampled_block(steps, (0,), notes=notes)], {"layers": sb.ledger()})
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata={"layers": sb.ledger()})
    trace = moe_trace.open(tmp_path / "t")
    done = exchange.export(trace, tmp_path / "x", format)
    assert done.rows == trace.stored_rows < 9
    assert done.notes == [f"{done.rows} of 9 rows are stored, and exported; the others are counted"]


@pytest.mark.parametrize("format", ["jsonl", "npz", "safetensors"])
def test_what_fails_leaves_what_was_there(trace, tmp_path, monkeypatch, format):
    (tmp_path / "x").write_text("of yesterday")
    monkeypatch.setattr("moe_trace.batch.Batch.request_ids", property(lambda self: 1 / 0))
    with pytest.raises((ZeroDivisionError, moe_trace.TraceError)):
        exchange.export(trace, tmp_path / "x", format)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of yesterday"]


def test_progress_adds_up(trace, tmp_path):
    for format in ("jsonl", "npz", "vllm"):
        seen = []
        done = exchange.export(trace, tmp_path / format, format, advance=seen.append)
        assert sum(seen) == done.rows > 0


def test_a_missing_package_is_one_line(monkeypatch):
    with pytest.raises(moe_trace.TraceError, match=r"^Parquet needs nonsense, which is not installed: pip install"):
        package("nonsense.parquet", "Parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(moe_trace.TraceError, match="Parquet needs pyarrow") as error:
        package("pyarrow", "Parquet")
    assert "\n" not in str(error.value)


def test_it_imports_without_what_it_does_not_need():
    code = (
        "import sys; from moe_trace import exchange\n"
        "heavy = {'torch', 'pyarrow', 'safetensors', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_a_stream_gets_what_a_file_gets(trace, tmp_path):
    stream = io.StringIO()
    assert exchange.export(trace, stream).path is None
    exchange.export(trace, tmp_path / "x.jsonl")
    assert stream.getvalue() == (tmp_path / "x.jsonl").read_text()


@pytest.mark.parametrize("lost", [((), ()), ((), (2, 3))], ids=["whole", "a stage lost steps"])
def test_stages_of_a_pipeline_are_one_model(tmp_path, lost):
    """Lines and rows are written stage by stage, arrays joined; an import of the lines joins them as well."""
    steps, _ = sb.make_steps(test_joined.SIZES, layers=test_joined.LAYERS)
    test_joined.pipeline(tmp_path / "t" / "run-1", steps, lost=lost)
    trace = moe_trace.open(tmp_path / "t")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joined = trace.ids
    npz = exchange.export(trace, tmp_path / "x.npz")
    assert len(npz.problems) == bool(lost[1]) and all("not all stages" in text for text in npz.problems)
    with np.load(tmp_path / "x.npz") as found:
        assert np.array_equal(found["ids"], joined) and (found["run"] == 0).all()
    exchange.export(trace, tmp_path / "x.jsonl")
    done = exchange.load([tmp_path / "x.jsonl"], tmp_path / "back")
    back = moe_trace.open(tmp_path / "back")
    assert done.lines == sum(step.rows * 4 - (step.number in lost[1]) * step.rows * 2 for step in steps)
    assert done.rows == sum(step.rows for step in steps) and not done.problems
    for layer, stage in ((0, 0), (13, 1)):
        kept = [step for step in steps if step.number not in lost[stage]]
        assert np.array_equal(back.layer(layer).ids, sb.of_rows(kept, layer))
        assert np.array_equal(back.layer(layer).positions, sb.per_row(kept, "position"))
    both = [batch.ids for batch in back.batches() if batch.layers == test_joined.LAYERS]
    assert np.array_equal(np.concatenate(both), joined)
