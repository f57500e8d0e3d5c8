"""A selection as a Parquet file, one row for each token and layer, the layers of a token together. It needs pyarrow.

| column | type |
|---|---|
| `run` | string |
| `request` | string; null for a row that is nobody's |
| `step` | int64: number of the step in its run |
| `time` | timestamp, nanoseconds, UTC: start of the step; null where unknown |
| `position` | int64: position in the request; null where unknown |
| `phase` | string: `prefill`, `decode` or `unknown` |
| `modality` | string: `text`, `image`, `video`, `audio` or `unknown` |
| `flags` | uint16: what became of the row, as in `Selection.flags`; only rows with 0 or 1 are sure to count |
| `layer` | uint16: the model's own index |
| `ids` | list of uint16, in the router's order; null for one that was no expert's |
| `weights` | list of float32 beside them (float16 widened, which is exact); null where they were not recorded |

Compressed with zstd and written row group by row group: in memory there are one block of the trace and one row group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import Batch
from moe_trace.errors import DamagedTrace
from moe_trace.exchange.made import Advance, Exported, ignore, package, whole_file

if TYPE_CHECKING:
    from moe_trace.select import Selection

GROUP_ROWS = 1 << 17  # rows of a row group
_NAT = np.datetime64("NaT", "ns")


def write(selection: Selection, path: Path, advance: Advance = ignore) -> Exported:
    """Write a selection; `exchange.export` says what can go wrong. Damaged blocks are left out, which is said."""
    pa, pq = package("pyarrow", "Parquet"), package("pyarrow.parquet", "Parquet")
    done = Exported(path)
    about = {key: selection._trace.metadata.get(key) for key in ("model", "versions", "device", "seed")}
    schema = _schema(pa).with_metadata({"moe_trace": json.dumps(about)})
    waiting: list[Any] = []
    with whole_file(path) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for batch in selection.batches(done.problems):
            try:
                for table in _tables(pa, schema, batch):
                    waiting.append(table)
                    if sum(map(len, waiting)) >= GROUP_ROWS:
                        writer.write_table(pa.concat_tables(waiting), row_group_size=GROUP_ROWS)
                        waiting.clear()
            except DamagedTrace as error:
                done.problems.append(f"{batch.rows:,} rows are left out, their block is damaged: {error}")
                continue
            done.rows += batch.rows
            advance(batch.rows)
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=GROUP_ROWS)
    return done


def _schema(pa: Any) -> Any:
    return pa.schema(
        [
            ("run", pa.string()), ("request", pa.string()), ("step", pa.int64()), ("time", pa.timestamp("ns", "UTC")),
            ("position", pa.int64()), ("phase", pa.string()), ("modality", pa.string()), ("flags", pa.uint16()),
            ("layer", pa.uint16()), ("ids", pa.list_(pa.uint16())), ("weights", pa.list_(pa.float32())),
        ]
    )  # fmt: skip


def _tables(pa: Any, schema: Any, batch: Batch) -> Iterator[Any]:
    """A batch, at most a row group at a time."""
    layers = batch.layers
    # All that can be damaged is read first: a batch is written whole or not at all.
    ids = [_ids(batch, layer) for layer in layers]
    weights = [_weights(batch, layer) for layer in layers]
    names, positions, steps, times, flags = (
        batch.request_ids, batch.positions, batch.step_numbers, batch.times, batch.flags,
    )  # fmt: skip
    phases, modalities = batch.phases, batch.modalities
    tokens = max(1, GROUP_ROWS // len(layers))
    for first in range(0, batch.rows, tokens):
        part = slice(first, first + tokens)
        rows = len(positions[part])

        def each(values: npt.NDArray[Any], part: slice = part) -> npt.NDArray[Any]:
            return np.repeat(values[part], len(layers))

        position, time = each(positions), each(times)
        columns = [
            pa.array([batch.run]).take(pa.array(np.zeros(rows * len(layers), np.int32))),
            _texts(pa, names[part], len(layers)),
            pa.array(each(steps)),
            pa.array(time.view(np.int64), pa.int64(), mask=time == _NAT).cast(schema.field("time").type),
            pa.array(position, mask=position < 0),
            pa.array(fmt.PHASES).take(pa.array(each(phases))),
            pa.array(fmt.MODALITIES).take(pa.array(each(modalities))),
            pa.array(each(flags)),
            pa.array(np.tile(np.array(layers, np.uint16), rows)),
            _lists(pa, [(values[part], wrong[part]) for values, wrong in ids], rows, pa.uint16()),
            _lists(pa, [None if w is None else (w[part], None) for w in weights], rows, pa.float32()),
        ]
        yield pa.Table.from_arrays(columns, schema=schema)


def _ids(batch: Batch, layer: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Ids as uint16, and which of them are no expert's."""
    column = batch.column(fmt.IDS, layer)
    assert column is not None  # a layer of a batch has ids
    return column.astype(np.uint16), column == np.iinfo(column.dtype).max


def _weights(batch: Batch, layer: int) -> npt.NDArray[np.float32] | None:
    column = batch.column(fmt.WEIGHTS, layer)
    return None if column is None else column.astype(np.float32)


def _texts(pa: Any, names: npt.NDArray[np.object_], layers: int) -> Any:
    """Names, each `layers` times; None is null."""
    numbers: dict[str | None, int] = {}
    of_rows = np.array([numbers.setdefault(name or None, len(numbers)) for name in names], np.int32)
    return pa.array(list(numbers), pa.string()).take(pa.array(np.repeat(of_rows, layers)))


def _lists(
    pa: Any, columns: list[tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None] | None], rows: int, dtype: Any
) -> Any:
    """The rows of the layers' columns in turn, as lists; null where a layer has no column. A column is `[rows, k]` and
    which of its values are null.
    """
    widths = np.array([0 if column is None else column[0].shape[1] for column in columns], np.int32)
    there = [column for column in columns if column is not None]
    values = np.concatenate([c[0] for c in there], axis=1).reshape(-1) if there else np.zeros(0, np.float32)
    wrong = None
    if any(mask is not None and mask.any() for _, mask in there):
        wrong = np.concatenate([mask for _, mask in there if mask is not None], axis=1).reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(np.tile(widths, rows))]).astype(np.int32)
    missing = np.tile(np.array([column is None for column in columns]), rows)
    mask = pa.array(missing) if missing.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, dtype, mask=wrong), mask=mask)
