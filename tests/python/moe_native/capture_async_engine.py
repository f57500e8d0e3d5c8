"""Two captures of one AsyncLLM at a time, beside a request of its own: python capture_async_engine.py JOB ANSWER

JOB is `[arguments of AsyncEngineArgs, prompts]`. ANSWER is as of `capture_engine.py`: the samples of both captures, the
other request's tokens, and the error of a capture that cannot be.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch
from capture_engine import samples_of


async def run(build: dict[str, Any], prompts: list[str]) -> list[Any]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    import moe_native
    import moe_native.hidden_states  # arms the engine

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**build))
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=10)

    async def alone() -> list[int]:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=20)
        return [output async for output in llm.generate(prompts[0], params, "3_alone")][-1].outputs[0].token_ids

    async def impossible() -> Any:
        try:
            await moe_native.acapture(llm, prompts, layers=[99])
        except Exception as error:
            return [type(error).__name__, str(error)]

    first, second, other, problem = await asyncio.gather(
        moe_native.acapture(llm, prompts, sampling),
        moe_native.acapture(llm, list(reversed(prompts)), sampling, layers="2"),
        alone(),
        impossible(),
    )
    given = [samples_of(first), samples_of(second), list(other), problem]
    llm.shutdown()
    return given


def main() -> None:
    build, prompts = json.loads(sys.argv[1])
    given = asyncio.run(run(build, prompts))
    torch.save(given, sys.argv[2] + ".pt")
    Path(sys.argv[2]).write_text("[]")


if __name__ == "__main__":
    main()
