"""Parquet files, read by pyarrow, against the arrays that the trace was made of."""

from __future__ import annotations

import tracemalloc

import exchanged
import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_trace
from moe_trace import exchange
from moe_trace.exchange import parquet

pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow to read what was written")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(made=exchanged.traces(weights=st.booleans()), group=st.sampled_from([1, 5, 1 << 17]))
def test_rows_are_those_of_the_trace(made, group, tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet")
    trace, steps = exchanged.made(path / "t", **made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_ROWS", group)
        done = exchange.export(trace, path / "x.parquet")
    file = pq.ParquetFile(path / "x.parquet")
    rows = file.read().to_pylist()
    layers, total = made["layers"], sum(made["sizes"])
    positions, owners, classes = (sb.per_row(steps, what) for what in ("position", "request", "class"))
    numbers = np.repeat([s.number for s in steps], [s.rows for s in steps])
    times = np.repeat([s.time_ns for s in steps], [s.rows for s in steps])
    ids = {layer: sb.of_rows(steps, layer) for layer in layers}
    weights = {layer: sb.of_rows(steps, layer, "weights") for layer in layers} if made["weights"] else {}
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == [
        {
            "run": "run-1", "request": made["requests"][owners[row]], "step": numbers[row], "position": positions[row],
            "phase": moe_trace.format.PHASES[classes[row] & 3], "modality": "text", "flags": 0, "layer": layer,
            "ids": ids[layer][row].tolist(), "weights": weights[layer][row].tolist() if weights else None,
        }
        for row in range(total)
        for layer in layers
    ]  # fmt: skip
    assert file.read(["time"])["time"].cast("int64").to_pylist() == np.repeat(times, len(layers)).tolist()
    assert (done.rows, done.problems) == (total, [])
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert max(groups) <= max(group, len(layers)) and file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_what_is_unknown_is_null(tmp_path):
    (step,), notes = sb.make_steps([2], weights=False, requests=("a",))
    step.runs = [(sb.NOBODY, sb.NOBODY, 2, 0, 2)]
    step.layers[3]["ids"][1, 2] = 255
    step.layers[0]["weights"] = np.array([[0.5, np.nan, 0.25, 0], [1, 2, 3, 4]], np.float16)
    exchange.export(moe_trace.open(exchanged.put(tmp_path / "t", [step], notes)), tmp_path / "x.parquet")
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert {(r["request"], r["position"], r["phase"], r["modality"], r["flags"]) for r in rows} == {
        (None, None, "unknown", "unknown", 2)
    }
    assert [r["layer"] for r in rows] == [0, 3, 0, 3]
    assert rows[3]["ids"][2] is None and None not in rows[1]["ids"]
    assert [r["weights"] is None for r in rows] == [False, True] * 2 and np.isnan(rows[0]["weights"][1])
    assert rows[2]["weights"] == [1, 2, 3, 4]


def test_layers_of_other_widths_and_other_rows(tmp_path):
    first, notes = sb.make_steps([3], layers=(0,), k=2)
    second, _ = sb.make_steps([2], layers=(0, 7), first=1, k=3, experts=400)
    second[0].layers[0] = {name: array[:, :2] for name, array in second[0].layers[0].items()}
    trace = moe_trace.open(exchanged.put(tmp_path / "t", [*first, *second], notes, blocks=2))
    assert exchange.export(trace, tmp_path / "x.parquet").rows == 5
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [(r["layer"], len(r["ids"]), len(r["weights"])) for r in rows] == [(0, 2, 2)] * 3 + [
        (0, 2, 2),
        (7, 3, 3),
    ] * 2
    assert [r["ids"] for r in rows[4::2]] == sb.of_rows(second, 7).tolist()


def test_a_damaged_block_is_left_out_and_said(tmp_path):
    steps, notes = sb.make_steps([4, 3])
    made = [sb.rows_block(steps[:1], 0, notes=notes), sb.rows_block(steps[1:], 1)]
    data = bytearray(sb.segment(made, {"layers": sb.ledger()}))
    stored = next(e.stored for e in made[1].entries if e.head[0] == sb.IDS)
    data[data.index(stored)] ^= 1
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [bytes(data)], metadata={"layers": sb.ledger()})
    done = exchange.export(moe_trace.open(tmp_path / "t"), tmp_path / "x.parquet")
    assert done.rows == 4 and len(done.problems) == 1 and "3 rows are left out" in done.problems[0]
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 8


def test_a_larger_trace_needs_no_more_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_ROWS", 1 << 10)
    peaks = []
    for blocks in (4, 32):
        trace, _ = exchanged.made(tmp_path / str(blocks), [400] * blocks, blocks=blocks)
        tracemalloc.start()
        exchange.export(trace, tmp_path / f"{blocks}.parquet")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pq.ParquetFile(tmp_path / f"{blocks}.parquet").metadata.num_rows == 800 * blocks
    assert peaks[1] < 2 * peaks[0], peaks


def test_an_empty_selection_is_a_file_without_rows(tmp_path):
    trace, _ = exchanged.made(tmp_path / "t")
    exchange.export(trace.since("2100-01-01"), tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.num_rows == 0 and table.schema.names[0] == "run" and b"moe_trace" in table.schema.metadata
