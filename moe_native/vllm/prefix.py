"""Where prompt tokens that were not executed come from: vLLM's prefix cache shares the KV blocks of requests that begin
alike, and a shared token has no row of its own.

A block is shared only between requests whose tokens are the same up to its end. So a cached token's row is that of the
same position of the request for which the block was computed, and one owner a block is all there is to remember. The
owner is set when a block is allocated, before a later request of the same step can share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

#: Cached positions and whose rows they share: (first position, count, index of the request or None where unknown).
CachedSpan = tuple[int, int, int | None]

_NOBODY = -1


class BlockOwners:
    """The request for which each KV block was computed.

    Args:
        group: index of the KV cache group whose blocks are followed.
        block_size: positions in one of its blocks.
    """

    def __init__(self, group: int, block_size: int) -> None:
        self._group = group
        self._size = block_size
        self._owner: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # by block id: a request's index

    def allocate(self, block_ids: Sequence[Sequence[int]], computed: int, owner: int | None) -> None:
        """`block_ids`, one list a group, are now a request's. Those that begin at or behind the `computed` positions of
        it are fresh; the others are shared, and keep their owners."""
        self._set(block_ids[self._group][computed // self._size :], _NOBODY if owner is None else owner)

    def forget(self) -> None:
        """Something was missed: what is in the blocks now is nobody's."""
        self._owner[:] = _NOBODY

    def sources(self, block_ids: Sequence[Sequence[int]], computed: int) -> list[CachedSpan]:
        """Whose rows the first `computed` positions of a new request share."""
        spans: list[CachedSpan] = []
        for number, block in enumerate(block_ids[self._group][: -(-computed // self._size)]):
            first = number * self._size
            count = min(self._size, computed - first)
            # A block that is shared in part is a copy that was made for this request.
            owner = int(self._owner[block]) if count == self._size and block < len(self._owner) else _NOBODY
            source = None if owner == _NOBODY else owner
            if spans and spans[-1][2] == source:
                spans[-1] = (spans[-1][0], spans[-1][1] + count, source)
            else:
                spans.append((first, count, source))
        return spans

    def _set(self, blocks: Sequence[int], owner: int) -> None:
        if not blocks:
            return
        most = max(blocks)
        if most >= len(self._owner):
            grown = np.full(max(1024, 2 * len(self._owner), most + 1), _NOBODY, np.int64)
            grown[: len(self._owner)] = self._owner
            self._owner = grown
        self._owner[list(blocks)] = owner


def followed(vllm_config: Any, runner: Any) -> BlockOwners | None:
    """The owners of the blocks of one model runner, once it has its KV cache. None where there is nothing to follow,
    or where it cannot be known whose rows a block has: then cached positions have no source."""
    if not getattr(vllm_config.cache_config, "enable_prefix_caching", False):
        return None
    if getattr(vllm_config, "kv_transfer_config", None) is not None:
        return None  # blocks may come from another process
    parallel = vllm_config.parallel_config
    contexts = ("decode_context_parallel_size", "prefill_context_parallel_size")
    if any(getattr(parallel, name, 1) != 1 for name in contexts):
        return None  # a block then holds other positions than its place in the request says
    groups = getattr(getattr(runner, "kv_cache_config", None), "kv_cache_groups", ())
    for index, group in enumerate(groups):
        # Only a group that keeps every position has a block for each cached one: no window, no state.
        spec = group.kv_cache_spec
        kinds = {type(each) for each in getattr(spec, "kv_cache_specs", {}).values()} or {type(spec)}
        if all(any(base.__name__ == "FullAttentionSpec" for base in kind.__mro__) for kind in kinds):
            return BlockOwners(index, int(spec.block_size))
    return None
