"""Comparisons against loops over rows, against scipy, and by how often chance passes them."""

from __future__ import annotations

from collections import defaultdict
from unittest import mock

import numpy as np
import pytest
import segment_bytes as sb
from analysis_traces import EXPERTS, LAYERS, K, in_turn, opened
from scipy import stats

import moe_trace
from moe_trace import metrics
from moe_trace.analysis import one_pass
from moe_trace.compare import compare
from moe_trace.compare.loads import _figures, difference
from moe_trace.errors import TraceError

NAMES = tuple(f"r{i}" for i in range(24))


def put(path, steps, notes, *, layers=(0, 3), k=4, experts=60, **metadata):
    write_metadata = {"layers": sb.ledger(layers, k, experts), "fields": ["ids", "weights"], **metadata}
    sb.write_rank(path / "run-1" / "rank-0", [sb.segment([sb.rows_block(steps, notes=notes)], write_metadata)])
    return moe_trace.open(path)


def rows_by_place(selection):
    """(name, which of that name, position), ids, phase and logits of each row that counts: from arrays, row by row."""
    found, order = [], defaultdict(list)
    for batch in selection.current().batches():
        ids, logits = batch.ids, batch.logits if batch.column(3, LAYERS[0]) is not None else None
        numbers = zip(batch.request_ids, batch.request_numbers, batch.positions, batch.phases, strict=True)
        for at, (name, number, position, phase) in enumerate(numbers):
            if name is None:
                continue
            whose = batch.rank, int(number)
            if whose not in order[name]:
                order[name].append(whose)
            if position >= 0:
                key = name, order[name].index(whose), int(position)
                found.append((key, ids[at], int(phase), None if logits is None else logits[at]))
    return found


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """Two traces of two engines: the same requests, other routing, and positions that only one of them has."""
    of = tmp_path_factory.mktemp("compared")
    return opened(of / "a", 0, 30, 4), opened(of / "b", 7, 26, 5)


def test_flips_are_those_of_a_loop_over_rows(messy):
    a, b = messy
    here = {key: ids for key, ids, *_ in rows_by_place(a)}  # of a position that has several rows, the last
    both = [row for row in rows_by_place(b) if row[0] in here]
    assert len(both) > 50
    found = compare(a, b)
    of_tokens = {"all": [], "prefill": [], "decode": []}
    for key, ours, phase, _ in both:
        unknown = (ours == 255).any(axis=1) | (here[key] == 255).any(axis=1)
        differs = [not unknown[i] and set(ours[i]) != set(here[key][i]) for i in range(len(LAYERS))]
        if any(differs) or not unknown.any():
            of_tokens["all"].append(any(differs))
            if phase:
                of_tokens[("", "prefill", "decode")[phase]].append(any(differs))
    for name, flags in of_tokens.items():
        tokens = found["aligned"]["tokens"][name]
        assert (tokens["rows"], tokens["changed"]) == (len(flags), sum(flags))
    for axis, layer in enumerate(found["layers"]):
        rows = changed = lost = near = real = 0
        for key, of_layers, _, of_logits in both:
            theirs, ours = here[key][axis], of_layers[axis]
            if 255 in theirs or 255 in ours:
                continue
            rows += 1
            new, gone = set(ours.tolist()) - set(theirs.tolist()), set(theirs.tolist()) - set(ours.tolist())
            changed, lost = changed + bool(new), lost + len(new)
            logits = of_logits[axis]
            if new and min(logits[list(new)]) >= max(logits[list(gone)]):
                ahead = max(logits[list(new)]) - min(logits[list(gone)])
                near, real = near + (ahead <= 0.05), real + (ahead > 0.05)
        flips = layer["flips"]["all"]
        assert (flips["rows"], flips["changed"]) == (rows, changed) and changed > 20
        assert flips["rate"] == pytest.approx(lost / rows / K)
        assert (flips["near"], flips["real"], flips["unknown"]) == (near, real, changed - near - real)
        phases = [layer["flips"][name]["rows"] for name in ("prefill", "decode")]
        assert sum(phases) < rows and all(phases)  # some rows are of no known phase


def test_processes_find_the_same(messy):
    with mock.patch.object(one_pass, "_in_processes", in_turn):
        assert compare(*messy, jobs=3) == compare(*messy)


def test_a_trace_against_itself_has_no_difference(tmp_path):
    trace = put(tmp_path, *sb.make_steps([40, 5, 9, 30]))
    found = compare(trace, trace)
    assert found["paired"] and found["aligned"]["tokens"]["all"]["changed"] == 0
    for layer in found["layers"]:
        assert layer["distance"]["difference"] == layer["normalized_entropy"]["difference"] == 0
        assert layer["changed_experts"] == 0 and layer["top"] == [] and layer["flips"]["all"]["rate"] == 0
        assert layer["distance"]["p"] == 1


def test_loads_are_those_of_the_rows_that_count(messy):
    found = compare(*messy)
    for axis, layer in enumerate(found["layers"]):
        for side, trace in zip("ab", messy, strict=True):
            rows = [ids[axis] for ids, _, _ in all_rows(trace)]
            counts = np.bincount(np.concatenate(rows), minlength=256)[:EXPERTS]
            assert layer["normalized_entropy"][side] == pytest.approx(float(metrics.normalized_entropy(counts)))
            assert layer["imbalance"][side] == pytest.approx(counts.max() / counts.mean())


def all_rows(trace):
    for batch in trace.current().batches():
        yield from (
            (ids, name, None) for ids, name in zip(batch.ids, batch.request_ids, strict=True) if name is not None
        )


def ties_of(tmp_path, logits, a, b, **options):
    """What is said of rows of one layer: logits and ids of b, and ids of a."""
    runs = [(0, 0, len(a), sb.PREFILL, 0)]
    notes = [{"type": "request", "index": 0, "id": "x", "prompt_len": len(a)}]
    sides = []
    for name, ids, more in (("a", a, {}), ("b", b, {"logits": np.array(logits, np.float32)})):
        step = sb.Step(0, runs, {0: {"ids": np.array(ids, np.uint8), **more}})
        fields = ["ids", *more]
        sides.append(put(tmp_path / name, [step], notes, layers=[0], k=2, experts=4, fields=fields))
    return [compare(*order, **options)["layers"][0]["flips"]["all"] for order in (sides, sides[::-1])]


def test_near_ties_are_told_from_others(tmp_path):
    logits = [
        [3.0, 2.0, 1.98, 0.0],  # 1 for 2: near
        [3.0, 2.0, 1.0, 0.0],  # 1 for 2: not near
        [3.0, 2.0, 1.98, 0.0],  # chosen against its own logits
        [3.0, 2.0, np.nan, 0.0],
        [1.0, 1.01, 1.02, 1.03],  # both for both, all near
        [1.0, 1.01, 1.02, 1.09],  # the first is near, but for the last
        [3.0, 2.0, 1.0, 0.0],  # no difference
    ]
    a = [[0, 2], [0, 2], [0, 1], [0, 2], [0, 1], [0, 1], [1, 0]]
    b = [[0, 1], [0, 1], [0, 2], [0, 1], [2, 3], [2, 3], [0, 1]]
    for found in ties_of(tmp_path / "t", logits, a, b):  # whichever of the two has the logits
        assert (found["rows"], found["changed"]) == (7, 6)
        assert (found["near"], found["real"], found["unknown"]) == (2, 2, 2)
    assert ties_of(tmp_path / "u", logits, a, b, near=2.0)[0]["near"] == 4


def test_without_logits_nothing_is_said_of_ties(tmp_path):
    sides = [put(tmp_path / str(seed), *sb.make_steps([9, 9], seed=seed)) for seed in (0, 1)]
    flips = compare(*sides)["layers"][0]["flips"]["all"]
    assert flips["changed"] > 0 and flips["near"] is flips["real"] is flips["unknown"] is None


def test_rows_are_aligned_up_to_the_first_token_that_differs(tmp_path):
    """b has another token at position 3 of the first request: from there on it is another text."""
    ids = np.array([[0, 1]] * 6, np.uint8)
    runs = [(0, 0, 6, sb.PREFILL, 0), (1, 0, 6, sb.PREFILL, 0)]
    notes = [{"type": "request", "index": i, "id": name, "prompt_len": 6} for i, name in enumerate("xy")]
    sides = []
    for name, changed in (("a", 5), ("b", 6)):
        tokens = np.arange(12, dtype=np.uint32)
        tokens[3] = changed
        tokens[7] = 2**32 - 1  # not known: no difference
        of = {0: {"ids": np.concatenate([ids, ids]) + (np.arange(12) >= 3)[:, None] * np.uint8(name == "b")}}
        step = sb.Step(0, runs, of, tokens)
        fields = ["ids", "tokens"]
        sides.append(put(tmp_path / name, [step], notes, layers=[0], k=2, experts=4, fields=fields))
    found = compare(*sides)
    assert (found["aligned"]["parted"], found["aligned"]["rows"]) == (1, 3 + 6)
    assert found["layers"][0]["flips"]["all"]["changed"] == 6  # of the second request alone
    assert any("differ from some position on" in note for note in found["notes"])


def test_requests_of_one_name_are_paired_in_their_order(tmp_path):
    """Two requests named x, of other lengths and routing; in b they were noted in the other order of numbers."""
    sides = []
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        runs = [(order[0], 0, 2, sb.PREFILL, 0), (order[1], 0, 3, sb.PREFILL, 0)]
        notes = [{"type": "request", "index": i, "id": "x", "prompt_len": 3} for i in range(2)]
        ids = np.array([[0, 1], [0, 1], [2, 3], [2, 3], [2, 3]], np.uint8)
        sides.append(put(tmp_path / name, [sb.Step(0, runs, {0: {"ids": ids}})], notes, layers=[0], k=2, experts=4))
    found = compare(*sides)
    assert (found["aligned"]["rows"], found["layers"][0]["flips"]["all"]["changed"]) == (5, 0)
    assert any("requests of one name" in note for note in found["notes"])


def test_what_is_not_in_both(tmp_path):
    a = put(tmp_path / "a", *sb.make_steps([8, 8], requests=("a", "b")))
    b = put(tmp_path / "b", *sb.make_steps([8, 8], layers=(3, 5), requests=("c",)), layers=(3, 5))
    found = compare(a, b)
    assert (found["only_a"], found["only_b"], found["aligned"], found["paired"]) == ([0], [5], None, False)
    assert found["layers"][0]["layer"] == 3 and found["layers"][0]["flips"] is None
    assert any("no request of one name" in note for note in found["notes"])
    assert any("1 group of requests only" in note for note in found["notes"])
    assert found["layers"][0]["imbalance"]["low"] is None and found["layers"][0]["distance"]["p"] is None
    with pytest.raises(TraceError, match=r"no layer is in both: .*has layer 0; .*has layers? 5"):
        compare(a.layer(0), b.layer(5))
    with pytest.raises(TraceError, match="there are no rows in this selection"):
        compare(a, b.between(None, 0))
    with pytest.raises(ValueError, match="near is a difference of logits"):
        compare(a, b, near=-1)


def test_counts_without_rows_cannot_be_compared(tmp_path):
    steps, _ = sb.make_steps([6] * 3, layers=[0])
    sb.write_rank(
        tmp_path / "a" / "run-1" / "rank-0", [sb.segment([sb.sampled_block(steps, set())], {"layers": sb.ledger([0])})]
    )
    a = moe_trace.open(tmp_path / "a")
    with pytest.raises(TraceError, match=r"has counts only and no rows.*moe-native plot"):
        compare(a, a)


def test_another_number_of_choices_is_not_aligned(tmp_path):
    a = put(tmp_path / "a", *sb.make_steps([8, 8], layers=[0], k=4), layers=[0])
    b = put(tmp_path / "b", *sb.make_steps([8, 8], layers=[0], k=2), layers=[0], k=2)
    for sides in ((a, b), (b, a)):
        found = compare(*sides)
        assert found["layers"][0]["flips"] is None
        assert any("different numbers of choices" in note for note in found["notes"])


def requests(seed, number=40, experts=6, tilt=0.0):
    """Counts of requests, `[number, experts]`, that differ among each other more than tokens would."""
    rng = np.random.default_rng(seed)
    favour = np.arange(1, experts + 1) + tilt * np.arange(experts)
    return np.stack([rng.multinomial(50, rng.dirichlet(3 * favour)) for _ in range(number)])


@pytest.mark.parametrize("paired", [True, False])
def test_chance_passes_as_often_as_p_says(paired):
    """200 pairs without any difference: p is below 0.1 about 20 times. 37 is beyond 4 sigma, and so is 5."""
    passed = sum(
        difference(requests(2 * i), requests(2 * i + 1), paired=paired, resamples=2)["distance"]["p"] < 0.1
        for i in range(200)
    )
    assert 5 < passed < 37


@pytest.mark.parametrize("paired", [True, False])
def test_a_difference_is_found(paired):
    found = difference(requests(0), requests(1, tilt=2.0), paired=paired)
    assert found["distance"]["p"] < 0.01 and found["distance"]["difference"] > 2 * found["distance"]["chance"]
    assert found["normalized_entropy"]["high"] < 0 < found["imbalance"]["low"] and found["changed_experts"] >= 2


def test_intervals_are_scipys():
    a, b = requests(0), requests(1, tilt=1.0)
    found = difference(a, b, paired=True, resamples=20_000)
    for figure, at in (("normalized_entropy", 0), ("imbalance", 1)):

        def statistic(rows, axis=-1, at=at):
            return np.moveaxis(_figures(a[rows].sum(axis=-2), b[rows].sum(axis=-2)), -1, 0)[at]

        theirs = stats.bootstrap(
            (np.arange(len(a)),), statistic, n_resamples=20_000, method="basic", vectorized=True,
            random_state=np.random.default_rng(1),
        ).confidence_interval  # fmt: skip
        ours = found[figure]
        width = theirs.high - theirs.low
        assert abs(ours["low"] - theirs.low) < 0.06 * width and abs(ours["high"] - theirs.high) < 0.06 * width
