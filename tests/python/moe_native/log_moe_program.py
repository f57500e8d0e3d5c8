"""A program with an engine, as `VLLM_LOG_MOE` finds it: python log_moe_program.py JOB ANSWER. It knows nothing of us.

JOB is JSON: `engine` (arguments of LLM), `prompts`, `max_tokens`; with `kill_after` the engine core and its
workers get SIGKILL after so many steps.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    # A global, which is still there when the interpreter ends: nobody shuts the engine down.
    llm = LLM(**job["engine"])
    engine, done, step = llm.llm_engine, {}, 0
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=job["max_tokens"])
    for number, prompt in enumerate(job["prompts"]):
        engine.add_request(str(number), prompt, sampling)
    while engine.has_unfinished_requests():
        if step == job.get("kill_after"):
            (core,) = engine.engine_core.resources.engine_manager.processes
            workers = Path(f"/proc/{core.pid}/task/{core.pid}/children").read_text().split()
            for process in (core.pid, *map(int, workers)):
                os.kill(process, signal.SIGKILL)
            core.join()
            break  # as after an interrupt: vLLM's next step may wait for the dead one for ever
        for output in engine.step():
            done[output.request_id] = output
        step += 1
    requests = {
        name: {"prompt": list(output.prompt_token_ids), "generated": list(output.outputs[0].token_ids)}
        for name, output in done.items()
    }
    Path(sys.argv[2]).write_text(json.dumps({"requests": requests, "steps": step}))
