"""Does this vLLM have what is relied on? Asked of the objects at hand, not concluded from a version.

vLLM's internals move. What is not as the table (`symbols`) says is not recorded, rather than recorded wrongly.
"""

from __future__ import annotations

import inspect
from typing import Any

from moe_native.vllm.symbols import Member, Symbols


class UnknownVLLM(Exception):
    """This vLLM lacks something that is relied on."""


def require(thing: Any, symbols: Symbols) -> None:
    """
    Raises:
        UnknownVLLM: `thing` lacks one of the members; says which, and what they are needed for.
    """
    lacking = [written for written in symbols.members if not any(_has(thing, m) for m in Member.readings(written))]
    if lacking:
        raise UnknownVLLM(
            f"this vLLM's {type(thing).__name__} is not a {symbols.owner} as it is known here: it has no "
            f"{', '.join(lacking)} ({symbols.why})"
        )


def _has(thing: Any, member: Member) -> bool:
    if not hasattr(thing, member.name):
        return False
    if not member.parameters:
        return True
    try:
        parameters = list(inspect.signature(getattr(thing, member.name)).parameters.values())
    except (TypeError, ValueError):
        return False
    first = parameters[: len(member.parameters)]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in first) == member.parameters and all(p.kind in positional for p in first)
