"""Which KV cache groups are followed, in configurations as vLLM makes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_native.vllm.prefix import BlockOwners, followed


class FullAttentionSpec:
    block_size = 16


class MLAAttentionSpec(FullAttentionSpec):
    block_size = 64


class SlidingWindowSpec:
    block_size = 16


class UniformTypeKVCacheSpecs:
    def __init__(self, *specs: Any, block_size: int) -> None:
        self.kv_cache_specs, self.block_size = dict(enumerate(specs)), block_size


def owners(*specs: Any, caching: bool = True, transfer: Any = None, contexts: int = 1) -> BlockOwners | None:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(decode_context_parallel_size=contexts),
    )
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    return followed(config, SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=groups)))


@pytest.mark.parametrize(
    ("specs", "group", "size"),
    [
        ([FullAttentionSpec()], 0, 16),
        ([SlidingWindowSpec(), MLAAttentionSpec()], 1, 64),
        ([UniformTypeKVCacheSpecs(MLAAttentionSpec(), FullAttentionSpec(), block_size=32)], 0, 32),
    ],
)
def test_the_group_that_keeps_every_position_is_followed(specs: list[Any], group: int, size: int) -> None:
    found = owners(*specs)
    assert found is not None and (found._group, found._size) == (group, size)


def test_without_such_a_group_nothing_is_followed() -> None:
    assert owners(SlidingWindowSpec()) is None
    assert owners(UniformTypeKVCacheSpecs(SlidingWindowSpec(), FullAttentionSpec(), block_size=16)) is None
    assert owners() is None


def test_blocks_that_may_be_filled_by_others_are_not_followed() -> None:
    assert owners(FullAttentionSpec(), caching=False) is None
    assert owners(FullAttentionSpec(), transfer=object()) is None
    assert owners(FullAttentionSpec(), contexts=2) is None


def test_the_names_are_those_of_vllm() -> None:
    vllm = pytest.importorskip("vllm.v1.kv_cache_interface", reason="vLLM is not installed here")
    assert issubclass(vllm.MLAAttentionSpec, vllm.FullAttentionSpec)
    assert not issubclass(vllm.SlidingWindowSpec, vllm.FullAttentionSpec)
    assert not issubclass(vllm.ChunkedLocalAttentionSpec, vllm.FullAttentionSpec)
