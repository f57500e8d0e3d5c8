"""Small traces with everything in them that can go wrong, and what accumulators found in a form that compares."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import segment_bytes as sb

import moe_trace
from moe_trace import analysis
from moe_trace.analysis import one_pass

LAYERS, EXPERTS, K = (0, 3, 4), 7, 2
NAMES = ("a", "b", "c")


def messy_steps(seed, steps, *, layers=LAYERS, first=0):
    """Steps in which requests skip positions, start over, have drafts rejected, and rows of nobody and nowhere; with
    invalid ids."""
    rng = np.random.default_rng(seed)
    position = [0] * len(NAMES)
    found = []
    for number in range(first, first + steps):
        runs = []
        for request in range(len(NAMES)):
            event, count = rng.random(), int(rng.integers(1, 4))
            flags = 0
            if event < 0.2:
                continue
            if event < 0.3:
                position[request] += 2  # cached, or lost
            elif event < 0.4:
                position[request] = max(position[request] - 3, 0)  # preempted, or executed again
                flags = 1
            runs.append((request, position[request], count, sb.cls(int(rng.integers(0, 3)), 1), flags))
            position[request] += count
            if event > 0.8:
                runs.append((request, position[request], 1, sb.DECODE, int(rng.choice([2, 8, 16]))))
        if rng.random() < 0.3:
            runs.append((sb.NOBODY, sb.NOBODY, 2, sb.cls(attributed=False), 0))
        if rng.random() < 0.3:
            runs.append((0, sb.NOBODY, 1, sb.DECODE, 0))
        rows = sum(run[2] for run in runs)
        of_layers = {}
        for layer in layers:
            ids = np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :K].astype(np.uint8)
            ids[rng.random(ids.shape) < 0.05] = 255
            of_layers[layer] = {
                "ids": ids,
                "weights": rng.random((rows, K)).astype(np.float16),
                "logits": rng.standard_normal((rows, EXPERTS)).astype(np.float32),
            }
        found.append(sb.Step(number, runs, of_layers))
    return found


def notes():
    return [{"type": "request", "index": i, "id": name, "prompt_len": 5} for i, name in enumerate(NAMES)]


def blocks_of(steps, per_block, *, without=None):
    """Blocks of so many steps each; every second one lacks layer `without`, and every third one logits."""
    blocks = []
    for number, at in enumerate(range(0, len(steps), per_block)):
        of = steps[at : at + per_block]
        if without is not None and number % 2:
            of = [replace(s, layers={n: c for n, c in s.layers.items() if n != without}) for s in of]
        if without is not None and number % 3 == 2:
            less = [{n: {f: a for f, a in c.items() if f != "logits"} for n, c in s.layers.items()} for s in of]
            of = [replace(s, layers=layers) for s, layers in zip(of, less, strict=True)]
        blocks.append(sb.rows_block(of, number, notes=notes() if number == 0 else ()))
    return blocks


def write_rank(directory, blocks, layers=LAYERS, **metadata):
    metadata |= {"layers": sb.ledger(layers, K, EXPERTS)}
    sb.write_rank(directory, [sb.segment(blocks, metadata)], metadata=metadata)


def accumulators():
    return [
        analysis.Coactivation(),
        analysis.Coactivation(adjacent=True),
        analysis.Transitions(),
        analysis.Transitions(((4, 0),), first=True),
        analysis.Repetition(),
        analysis.UsageOverTime(2.0, most=3),
        analysis.RequestCounts(),
        analysis.PhaseCounts(),
        analysis.PhaseCounts(4),
        analysis.DistinctExperts(),
        analysis.RouterScores(10),
    ]


def found_by(*of):
    """What accumulators found, to be compared by `np.testing.assert_equal`."""
    found = []
    for one in of:
        match one:
            case analysis.Coactivation() | analysis.Transitions():
                found.append((one.counts, one.rows))
            case analysis.Repetition():
                sums = {
                    (layer, choice): one.sums(layer, choice) for layer in one.experts for choice in ("any", "first")
                }
                found.append((one.requests, sums, one.left_out, one.experts))
            case analysis.UsageOverTime():
                found.append((one.width_ns, one.rows, one.counts))
            case analysis.RequestCounts():
                counts = {layer: one.counts(layer) for layer in one._counts}
                found.append((one.requests, one.rows, counts, one.nobodys))
            case analysis.PhaseCounts():
                found.append({layer: one.counts(layer) for layer in LAYERS})
            case analysis.DistinctExperts():
                found.append((one.totals, one.experts, one.k))
            case analysis.RouterScores():
                found.append((one.histograms, one.unknown, one.without, one._sums))
    return found


def opened(tmp_path, seed, steps, per_block, *, without=None):
    """A trace of two engines, each of one rank, of one run."""
    for rank in range(2):
        blocks = blocks_of(messy_steps(seed + rank, steps), per_block + rank, without=without)
        place = {"data_parallel_rank": rank, "data_parallel_size": 2}
        write_rank(tmp_path / "run-1" / f"rank-{rank}-dp{rank}", blocks, parallel=place)
    return moe_trace.open(tmp_path)


def in_turn(selection, shares, empty, progress):
    """As several processes would, one after the other."""
    return [one_pass._fill_share(selection, share, empty, progress) for share in shares]


def filled(selection, jobs=1):
    found = accumulators()
    with mock.patch.object(one_pass, "_in_processes", in_turn):
        analysis.fill(selection, *found, jobs=jobs)
    return found


def pipeline(path, steps, per_block=(3, 2), lost=()):
    """Two stages, with layers 0 and 3, and 4; the second lost some steps, and its blocks are others."""
    for stage, layers in enumerate(((0, 3), (4,))):
        kept = [step for step in steps if not (stage and step.number in lost)]
        kept = [replace(step, layers={n: step.layers[n] for n in layers}) for step in kept]
        place = {"pipeline_parallel_rank": stage, "pipeline_parallel_size": 2}
        blocks = blocks_of(kept, per_block[stage])
        write_rank(path / "run-1" / f"rank-{stage}-pp{stage}", blocks, layers, parallel=place)
    return moe_trace.open(path)


def sums_of(found):
    """As `found_by`. Only the sum of floats is another where blocks are."""
    compared = found_by(*found)
    *rest, sums = compared[-1]
    return [*compared[:-1], rest, {key: pytest.approx(float(value)) for key, value in sums.items()}]
