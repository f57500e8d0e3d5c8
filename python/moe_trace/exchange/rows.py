"""The rows of a selection as exports want them: part by part, with the same layers in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moe_trace import format as fmt
from moe_trace.batch import OTHER_ROWS, Batch
from moe_trace.errors import TraceError
from moe_trace.joined import Joined

if TYPE_CHECKING:
    from moe_trace.select import Selection


def parts(selection: Selection) -> Iterator[tuple[str, Batch | Joined]]:
    """(run, rows) in the order of `selection.ids`: one block at a time or, where ranks are joined, one group of ranks.

    Raises:
        TraceError: not all parts have the same layers.
    """
    layers = selection.layers
    for run in selection._trace.runs:
        for part in selection.run(run.name)._parts():
            if part.layers != layers:
                raise TraceError(OTHER_ROWS)
            yield run.name, part


def lacking(selection: Selection, field: int) -> tuple[int, ...]:
    """The selected layers of which some rows have no `field`."""
    found: set[int] = set()
    for batch in selection.batches():
        found.update(layer for layer in batch.layers if not batch.has(field, layer))
    return tuple(sorted(found))


class Names:
    """Names by number, in the order in which they are first met: how exports store the requests of rows."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def numbers(self, names: npt.NDArray[np.object_]) -> npt.NDArray[np.int32]:
        """`[rows]` names to their numbers, -1 for None and for an empty name."""
        known = self._numbers
        found = [known.setdefault(name, len(known)) if name else -1 for name in names]
        return np.array(found, np.int32).reshape(len(names))

    @property
    def names(self) -> list[str]:
        """The names by number."""
        return [str(name) for name in self._numbers]


FIELDS = {name: field for field, name in fmt.FIELD_NAMES.items()}
