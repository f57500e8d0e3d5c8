"""Prints the tables of moe_native/vllm/ARCHITECTURES.md: python architecture_table.py"""

from __future__ import annotations

from collections.abc import Iterator

from architectures_foreign import HOLES, THROUGH_TRANSFORMERS, WITHOUT_TRANSFORMERS
from architectures_native import NATIVE
from architectures_not_run import NOT_RUN

RUN = [*NATIVE, *WITHOUT_TRANSFORMERS, *THROUGH_TRANSFORMERS]


def run() -> Iterator[str]:
    """The lines of the table of what is run."""
    yield "| family | class of vLLM | what was run | routing | judged by | exact | remark |"
    yield "|---|---|---|---|---|---|---|"
    for it in RUN:
        assert it.routing is not None
        what = f"layers {', '.join(map(str, it.layers))} of {it.of}; {it.experts} experts, top-{it.routing.k}"
        judges = ["vLLM"]
        judges += ["formula"] if it.sees_logits else []
        judges += [] if it.transformers is None else ["transformers"]
        exact = "ids, weights, logits" if it.sees_logits else "ids, weights"
        how = it.routing if it.sees_logits else "transformers' own"
        yield f"| {it.family} | `{it.vllm}` | {what} | {how} | {', '.join(judges)} | {exact} | {it.remark} |"


def holes() -> Iterator[str]:
    """The lines of the table of what is run and not captured."""
    yield "| family | class of vLLM | what the trace says | remark |"
    yield "|---|---|---|---|"
    for it in HOLES:
        yield f"| {it.family} | `{it.vllm}` | {it.hole} | {it.remark} |"


def not_run() -> Iterator[str]:
    """The lines of the table of what is not."""
    yield "| family | class of vLLM | what vLLM says | remark |"
    yield "|---|---|---|---|"
    for it in NOT_RUN:
        yield f"| {it.family} | `{it.vllm}` | `{it.error}` | {it.remark} |"


if __name__ == "__main__":
    print("\n".join([*run(), "", *holes(), "", *not_run()]))
