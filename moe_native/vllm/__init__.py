"""Recording inside vLLM: `plugin` is the entry point, `worker` follows one worker's life, `routers` hooks the model,
`steps` says whose row is whose, `captures` which of them are captured, `symbols` lists what of vLLM is relied on,
`probe` asks whether it is there."""

KEY = "moe_native"  #: our part of vLLM's additional config, and of a request's extra arguments
