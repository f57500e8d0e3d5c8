"""What a probe accepts, and what it says of what is lacking."""

from __future__ import annotations

from typing import Any

import pytest

from moe_native.vllm.probe import UnknownVLLM, require
from moe_native.vllm.symbols import Symbols

SYMBOLS = Symbols("vllm.some:Owner", ("run(batch, state)", "new | old", "field"), by="steps", why="an example")


class Known:
    field = None
    old = 1

    def run(self, batch: Any, state: Any, *more: Any) -> None: ...


def test_what_has_everything_is_accepted() -> None:
    require(Known(), SYMBOLS)


class KeywordsOnly(Known):
    def run(self, *, batch: Any, state: Any) -> None: ...  # type: ignore[override]


class OtherOrder(Known):
    def run(self, state: Any, batch: Any) -> None: ...  # type: ignore[override]


class Fewer(Known):
    def run(self, batch: Any) -> None: ...  # type: ignore[override]


class NotCallable(Known):
    run = 5  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [KeywordsOnly, OtherOrder, Fewer, NotCallable])
def test_a_function_with_other_parameters_is_not(kind: type) -> None:
    with pytest.raises(UnknownVLLM, match=rf"this vLLM's {kind.__name__} is not a Owner .* no run\(batch, state\) \("):
        require(kind(), SYMBOLS)


def test_everything_that_is_lacking_is_named_with_what_it_is_for() -> None:
    with pytest.raises(UnknownVLLM, match=r"it has no run\(batch, state\), new \| old, field \(an example\)"):
        require(object(), SYMBOLS)
