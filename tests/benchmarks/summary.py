"""How long the summary of a large trace takes: it is made from the statistics in footers, and reads no row.

    python tests/benchmarks/summary.py [--rows 10000000] [--layers 24] [--directory /where/there/is/room]

The trace is written by `moe_trace.writer` in blocks and segments of about the recorder's sizes, ids only, and deleted
afterwards. Each measurement is a process of its own, so nothing that was read before is kept; the files are in the page
cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from medians import median

from moe_trace import format as fmt
from moe_trace.writer import SegmentWriter

EXPERTS, K = 60, 4
BLOCK_BYTES, SEGMENT_BYTES = 4 << 20, 64 << 20
ROWS_PER_STEP = 256

MEASURED = """
import sys, time
began = time.perf_counter()
import moe_trace
from moe_trace import summary
imported = time.perf_counter()
trace = moe_trace.open(sys.argv[1])
whole, _ = summary.summarize(trace, trace, {})
print(imported - began, time.perf_counter() - imported, whole["executed_rows"], whole["all"]["assignments"])
"""


def write(directory: Path, rows: int, layers: int) -> int:
    """A rank of `rows` tokens; returns the number of its blocks. Rows repeat from block to block, which no reader
    notices."""
    rng = np.random.default_rng(0)
    per_block = max(BLOCK_BYTES // (layers * K) // ROWS_PER_STEP, 1) * ROWS_PER_STEP
    share = rng.dirichlet(np.full(EXPERTS, 2.0), layers)  # some experts are chosen more often than others
    keys = rng.random((per_block, EXPERTS))
    ids = {
        (fmt.IDS, layer): np.argsort(np.log(keys) / share[layer], axis=1)[:, -K:].astype(np.uint8)
        for layer in range(layers)
    }
    ledger = [
        {"layer": n, "name": f"layers.{n}", "experts": EXPERTS, "top_k": K, "status": "exact", "detail": ""}
        for n in range(layers)
    ]
    metadata = {"model": "benchmark", "layers": ledger}
    directory.mkdir(parents=True)
    blocks_per_segment = SEGMENT_BYTES // BLOCK_BYTES
    writer, number, blocks, step = None, 0, 0, 0
    for first in range(0, rows, per_block):
        here = min(per_block, rows - first)
        if writer is None:
            writer = SegmentWriter(directory, number, metadata=metadata)
        sizes = np.diff(np.append(np.arange(0, here, ROWS_PER_STEP), here))
        steps = np.zeros(len(sizes), fmt.TABLES[fmt.STEPS])
        steps["step"], steps["rows"], steps["runs"] = np.arange(step, step + len(sizes)), sizes, 1
        steps["time_ns"] = steps["step"].astype(np.int64) * 20_000_000
        runs = np.zeros(len(sizes), fmt.TABLES[fmt.RUNS])
        runs["count"], runs["position"] = sizes, first + np.cumsum(sizes) - sizes
        runs["cls"] = np.where(np.arange(len(sizes)) % 8 == 0, 1, 2) | 1 << 2 | 1 << 6
        notes = [{"type": "request", "index": 0, "id": "r", "prompt_len": 1}] if first == 0 else []
        writer.add({key: column[:here] for key, column in ids.items()}, steps, runs, notes=notes)
        step, blocks = step + len(sizes), blocks + 1
        if blocks % blocks_per_segment == 0:
            writer.close()
            writer, number = None, number + 1
    if writer is not None:
        writer.close()
    rank = {"format": "moe-native rank", "version": 1, "rank": directory.name, "run_id": "0" * 32, "closed": True}
    (directory / "rank.json").write_text(json.dumps(rank | {"metadata": metadata}))
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="tokens (10,000,000)")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--directory", help="where to write the trace (the system's temporary directory)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
        began = time.perf_counter()
        blocks = write(Path(directory) / "run-1" / "rank-0", asked.rows, asked.layers)
        written = time.perf_counter() - began
        files = list(Path(directory).rglob("*.moe"))
        size = sum(path.stat().st_size for path in files)
        found = [
            subprocess.run(
                [sys.executable, "-c", MEASURED, directory], capture_output=True, text=True, check=True
            ).stdout.split()
            for _ in range(asked.repeats)
        ]
        commands = []
        for _ in range(asked.repeats):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "moe_trace", "summary", directory], capture_output=True, check=True)
            commands.append(time.perf_counter() - began)
    if {(int(rows), int(n)) for _, _, rows, n in found} != {(asked.rows, asked.rows * asked.layers * K)}:
        raise SystemExit("the summary is wrong: its counts are not those that were written")
    print(
        f"\n{asked.rows:,} tokens x {asked.layers} layers, top-{K} of {EXPERTS}: {size / 1e9:.2f} GB, {blocks:,} blocks"
    )
    print(f"of {len(files)} segments (written in {written:.0f} s). Seconds, median [90 % interval] of {asked.repeats}:")
    imports, opens = ([float(one[n]) for one in found] for n in (0, 1))
    for what, values in (
        ("open and summarize", opens),
        ("import moe_trace", imports),
        ("moe-native summary, the whole command", commands),
    ):
        middle, low, high = median(values)
        print(f"  {what:<40}{middle:7.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
