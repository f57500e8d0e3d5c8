"""SGLang's counts, written by and read with torch, against counts of numpy."""

from __future__ import annotations

import exchanged
import numpy as np
import pytest
import segment_bytes as sb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_trace
from moe_trace import exchange, summary

torch = pytest.importorskip("torch", reason="needs torch, whose files these are")


def counts_of(steps, layers, experts, depth):
    found = np.zeros((len(steps), depth, experts), np.int64)
    for i, step in enumerate(steps):
        for layer in layers:
            for expert in step.layers[layer]["ids"].ravel().tolist():
                found[i, layer, expert] += 1
    return found


def read(path):
    content = torch.load(path, weights_only=True)
    assert list(content) == ["logical_count"] and content["logical_count"].dtype == torch.int32
    return content["logical_count"].numpy()


def save(path, counts, **more):
    torch.save({"logical_count": torch.as_tensor(counts), **more}, path)
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(made=exchanged.traces())
def test_round_trip(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("sglang")
    trace, steps = exchanged.made(path / "t", **made)
    layers, k = made["layers"], made["k"]
    expected = counts_of(steps, layers, made["experts"], layers[-1] + 1)
    exchange.export(trace, path / "sum.pt")
    assert np.array_equal(read(path / "sum.pt"), expected.sum(axis=0))
    done = exchange.export(trace, path / "steps.pt", per_step=True)
    assert np.array_equal(read(path / "steps.pt"), expected) and done.rows == len(steps)
    loaded = exchange.load([path / "steps.pt"], path / "back", top_k=k)
    back = moe_trace.open(path / "back")
    assert np.array_equal(back.counts(), trace.counts()) and back.layers == layers
    assert back.executed_rows == loaded.rows == sum(made["sizes"]) and back.stored_rows == 0 and back.complete
    for i in range(len(steps)):
        assert np.array_equal(back.steps(i, i + 1).counts(), expected[i][list(layers)])
    exchange.export(back, path / "again.pt")
    assert np.array_equal(read(path / "again.pt"), expected.sum(axis=0))


def test_a_selection_says_what_it_reads_as_unused(tmp_path):
    steps, notes = sb.make_steps([6, 3], layers=(1, 2))
    missed = {**sb.ledger((5,))[0], "status": "missed", "detail": "a fused kernel"}
    meta = {"layers": [*sb.ledger((1, 2)), missed]}
    trace = moe_trace.open(exchanged.put(tmp_path / "t", steps, notes, meta=meta))
    done = exchange.export(trace.layer(2).decode(), tmp_path / "x.pt")
    assert done.problems == [
        "layer 1 was not selected, and read as unused", "layer 5 was not recorded, and read as unused"
    ]  # fmt: skip
    decode = sb.per_row(steps, "class") & 3 == 2
    found = read(tmp_path / "x.pt")
    assert found.shape == (6, 60) and not found[[0, 1, 3, 4, 5]].any()
    assert np.array_equal(found[2], np.bincount(sb.of_rows(steps, 2)[decode].ravel(), minlength=60))


def test_an_invalid_id_counts_nowhere(tmp_path):
    steps, notes = sb.make_steps([3], layers=(0,))
    steps[0].layers[0]["ids"][1, 1] = 255
    trace = moe_trace.open(exchanged.put(tmp_path / "t", steps, notes))
    for per_step in (False, True):
        exchange.export(trace, tmp_path / "x.pt", per_step=per_step)
        assert read(tmp_path / "x.pt").sum() == 11


def test_what_cannot_be_exported(tmp_path):
    steps, notes = sb.make_steps([4, 3, 2])
    data = sb.segment([sb.sampled_block(steps, (0,), notes=notes)], {"layers": sb.ledger()})
    sb.write_rank(tmp_path / "t" / "run-1" / "rank-0", [data], metadata={"layers": sb.ledger()})
    trace = moe_trace.open(tmp_path / "t")
    with pytest.raises(moe_trace.TraceError, match="steps cannot be told apart: export the sum"):
        exchange.export(trace, tmp_path / "x.pt", per_step=True)
    exchange.export(trace, tmp_path / "x.pt")
    assert np.array_equal(read(tmp_path / "x.pt"), counts_of(steps, (0, 3), 60, 4).sum(axis=0)), "all that was executed"
    whole, _ = exchanged.made(tmp_path / "u")
    for per_step, why in ((False, "no row is counted"), (True, "has no rows")):
        with pytest.raises(moe_trace.TraceError, match=f"nothing to export: .*{why}"):
            exchange.export(whole.since("2100-01-01"), tmp_path / "y.pt", per_step=per_step)
    assert not (tmp_path / "y.pt").exists()


def test_counts_without_k_count_choices_and_say_so(tmp_path):
    counts = np.zeros((3, 4, 8), np.int32)
    counts[0, 1], counts[2, 1, 3], counts[2, 3, 0] = 2, 5, 4
    done = exchange.load([save(tmp_path / "c.pt", counts, rank=0)], tmp_path / "t", model="m")
    assert (done.lines, done.layers, done.rows) == (2, (1, 3), 21)
    assert done.notes == [
        "counts do not say whose rows they are, their phase, their modality, and when they were executed",
        "counts do not say how many experts a token chose (top_k does): each choice counts as a row",
        "layers 0, 2 have no counts, as dense layers, and no rows",
        "1 step without counts are left out: SGLang's buffer has places that were never filled",
    ]
    trace = moe_trace.open(tmp_path / "t")
    assert np.array_equal(trace.counts(), counts.sum(axis=0)[[1, 3]]) and trace.first_time is None
    assert trace.metadata["imported"]["notes"] == done.notes and trace.metadata["fields"] == ["counts"]
    of, _ = summary.summarize(trace, trace, {})
    layer = of["layers"][0]
    assert (of["model"], layer["top_k"], layer["rows"], layer["assignments"], layer["experts"]) == (
        "m",
        None,
        21,
        21,
        8,
    )
    assert of["kinds"] == [{"phase": "unknown", "modality": "unknown", "recomputed": False, "draft": False, "rows": 21}]
    assert not trace.requests and trace.complete


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=30)
def test_files_one_after_the_other(tmp_path_factory, steps, layers, experts, data):
    path = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    parts = [rng.integers(0, 5, (steps, layers, experts)) for _ in range(2)]
    parts[0][0, 0, 0] = 1 << 33  # more than int32
    files = [save(path / f"{i}.pt", part) for i, part in enumerate(parts)]
    exchange.load(files, path / "t")
    trace = moe_trace.open(path / "t")
    assert np.array_equal(trace.counts(), np.concatenate(parts).sum(axis=0)[list(trace.layers)])
    exchange.export(trace, path / "x.pt")
    assert torch.load(path / "x.pt")["logical_count"].dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            {"records": []},
            "of SGLang's mode per_pass or per_token, which has physical experts: record",
        ),
        ({"counts": 1}, "has no logical_count"),
        ([1], "has no logical_count"),
        ({"logical_count": torch.zeros(2, 3)}, "is no tensor of integers"),
        ({"logical_count": 7}, "is no tensor of integers"),
        ({"logical_count": torch.zeros(3, dtype=torch.int32)}, r"has the shape \[3\]: it should be"),
        ({"logical_count": torch.zeros(1, 0, 3, dtype=torch.int32)}, r"has the shape \[1, 0, 3\]"),
        ({"logical_count": torch.tensor([[1, -1]])}, "has negative counts"),
        ({"logical_count": torch.zeros(2, 3, dtype=torch.int32)}, "all counts are zero, so there is nothing"),
    ],
)
def test_files_that_are_no_counts(tmp_path, content, why):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=why) as error:
        exchange.load([tmp_path / "x.pt"], tmp_path / "t")
    assert "x.pt" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_more_that_does_not_fit(tmp_path):
    (tmp_path / "text.pt").write_text("no file of torch\nat all")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as a file of torch") as error:
        exchange.load([tmp_path / "text.pt"], tmp_path / "t")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        exchange.load([tmp_path / "nowhere.pt"], tmp_path / "t")
    a, b = (save(tmp_path / f"{n}.pt", np.ones((2, n), int)) for n in (3, 4))
    with pytest.raises(ValueError, match="not of one model: 2 layers of 3 experts and 2 layers of 4 experts"):
        exchange.load([a, b], tmp_path / "t")
    with pytest.raises(ValueError, match="has counts of 3 experts, not of 60"):
        exchange.load([a], tmp_path / "t", experts=60)
    with pytest.raises(ValueError, match="not those of 2 experts a token: 2 does not divide them"):
        exchange.load([a], tmp_path / "t", top_k=2)
    assert not (tmp_path / "t").exists()
