"""Everything of vLLM that this package relies on: the one table.

It is checked three times. At run time `probe` asks the objects themselves, before anything of them is used: what is
not there is not recorded, and said. In the tests, and by `make contract` for each version from 0.26 to 0.33,
`tests/contract` looks the symbols up in vLLM's sources and names those that moved.

A place is `module:Class` or `module`; ` | ` stands between places of which one is enough, and between members of which
one is enough. A member is

    name                    an attribute, a field, a method or a function
    name(a, b)              a function whose first parameters, `self` left out, have these names
    name: text              a function or constant in whose source this text stands: a format or a call that we need
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Symbols:
    """Members of one class or module of vLLM.

    Attributes:
        place: where they are.
        members: what they are.
        by: the files that rely on them, from this directory.
        why: what for.
    """

    place: str
    members: tuple[str, ...]
    by: str
    why: str

    @property
    def places(self) -> list[str]:
        return self.place.split(" | ")

    @property
    def owner(self) -> str:
        """The name of the class or module, without the way to it."""
        return self.places[0].rpartition(":")[2].rpartition(".")[2]


@dataclass(frozen=True)
class Member:
    """One reading of a member of the table: see the module's docstring."""

    name: str
    parameters: tuple[str, ...] = ()
    text: str = ""

    @classmethod
    def readings(cls, written: str) -> list[Member]:
        """Those of a member as it is written in the table; one of them is enough."""
        return [cls._read(alternative) for alternative in written.split(" | ")]

    @classmethod
    def _read(cls, written: str) -> Member:
        head, _, text = written.partition(": ")
        name, _, parameters = head.partition("(")
        return cls(name, tuple(parameters.rstrip(")").split(", ")) if parameters else (), text)


# A worker's life.

PLUGINS = Symbols(
    "vllm.plugins",
    ("load_general_plugins: DEFAULT_PLUGINS_GROUP", 'DEFAULT_PLUGINS_GROUP: "vllm.general_plugins"'),
    by="plugin",
    why="calls `register` in every process, before it makes a worker",
)
WORKER = Symbols(
    "vllm.v1.worker.worker_base:WorkerBase",
    (
        "load_model",
        "compile_or_warm_up_model",
        "execute_model(scheduler_output)",
        "sample_tokens",
        "shutdown",
        "vllm_config",
        "rank",
    ),
    by="plugin, worker",
    why="what is wrapped: binding comes after the model is loaded, recording after the warm-up",
)
LOADED_WORKER = Symbols(
    "vllm.v1.worker.worker_base:WorkerBase",
    (
        "model_runner",
        "device",
        "model_config",
        "scheduler_config",
        "parallel_config",
        "cache_config",
        "compilation_config",
        "device_config",
    ),
    by="worker, metadata",
    why="what ran, and the model that is bound",
)
CPU_WORKER = Symbols(
    "vllm.v1.worker.cpu_worker:CPUWorker",
    ("load_model", "compile_or_warm_up_model", "execute_model(scheduler_output)", "sample_tokens", "shutdown"),
    by="worker",
    why="the worker of the CPU build has what its base class promises",
)
WARM_UP = Symbols(
    "vllm.v1.worker.gpu_worker:Worker",
    ("compile_or_warm_up_model: warmup_kernels( | _compile_or_warm_up_model: warmup_kernels(",),
    by="worker",
    why="the newer runner's warm-up executes made-up requests inside this method, where no step is opened",
)

# What names the compile cache.

VLLM_CONFIG = Symbols(
    "vllm.config.vllm:VllmConfig | vllm.config:VllmConfig",
    ("additional_config", "compute_hash: additional_config"),
    by="plugin, worker",
    why="our settings come in here, and the compile cache is marked here",
)

# The model's routers.

ROUTER = Symbols(
    "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter",
    ("_compute_routing(hidden_states, router_logits)",),
    by="routers",
    why="the hook: weights, logical expert ids and logits in one place",
)
ROUTER_CALL = Symbols(
    "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter",
    (
        "_select_experts: topk_weights, topk_ids = self._compute_routing( | "
        "select_experts: topk_weights, topk_ids = self._compute_routing(",
        "top_k",
        "global_num_experts",
        "select_experts",
    ),
    by="routers",
    why="weights come before ids; before the load balancer maps the ids",
)
RUNNER_OF_EXPERTS = Symbols(
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner",
    ("layer_name", "router", "moe_config", "routed_experts"),
    by="routers",
    why="which router belongs to which layer",
)
ROUTED_EXPERTS = Symbols(
    "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts",
    ("quant_method", "expert_map_manager"),
    by="routers",
    why="the kernel's method, and how many shared experts are fused",
)
EXPERT_MAP = Symbols(
    "vllm.model_executor.layers.fused_moe.expert_map_manager:ExpertMapManager",
    ("num_fused_shared_experts",),
    by="routers",
    why="fused shared experts are legal ids",
)
MOE_CONFIG = Symbols(
    "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig",
    ("num_logical_experts", "experts_per_token"),
    by="routers",
    why="the layer's geometry",
)
KERNEL_METHOD = Symbols(
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase",
    ("is_monolithic", "moe_kernel"),
    by="routers",
    why="a monolithic kernel routes by itself: its layers are missed",
)
KERNEL = Symbols(
    "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernel",
    ("impl",),
    by="routers",
    why="the name of a monolithic kernel, for the reason",
)
KERNEL_IMPL = Symbols(
    "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernelMonolithicImpl",
    ("fused_experts",),
    by="routers",
    why="the name of a monolithic kernel, for the reason",
)
ZERO_EXPERTS = Symbols(
    "vllm.model_executor.layers.fused_moe.router.zero_expert_router:ZeroExpertRouter",
    ("zero_expert_type",),
    by="routers",
    why="such a router rewrites ids before they can be seen: its layers are missed",
)

# Whose rows a step has.

SCHEDULER_OUTPUT = Symbols(
    "vllm.v1.core.sched.output:SchedulerOutput",
    ("scheduled_new_reqs", "finished_req_ids", "num_scheduled_tokens", "total_num_scheduled_tokens"),
    by="steps",
    why="how many rows a step has of each request; requests that begin and end",
)
DRAFTS = Symbols(
    "vllm.v1.core.sched.output:SchedulerOutput",
    ("scheduled_spec_decode_tokens",),
    by="steps",
    why="which rows are drafts",
)
NEW_REQUEST = Symbols(
    "vllm.v1.core.sched.output:NewRequestData",
    ("req_id", "prompt_len | prompt_token_ids", "mm_features"),
    by="steps",
    why="a request's name, its prompt's length, and what is not text in it",
)
SAMPLED = Symbols(
    "vllm.v1.outputs:ModelRunnerOutput",
    ("req_ids", "sampled_token_ids"),
    by="drafts",
    why="which drafts were accepted",
)
SAMPLED_LATER = Symbols(
    "vllm.v1.outputs:AsyncModelRunnerOutput",
    ("get_output",),
    by="drafts",
    why="which drafts were accepted, when that comes from the device later",
)
FEATURE = Symbols(
    "vllm.multimodal.inputs:MultiModalFeatureSpec", ("modality", "mm_position"), by="media", why="the modality of rows"
)
PLACEHOLDER = Symbols(
    "vllm.multimodal.inputs:PlaceholderRange",
    ("offset", "length", "is_embed"),
    by="media",
    why="the modality of rows",
)
REQUEST_ID = Symbols(
    "vllm.v1.engine.input_processor:InputProcessor",
    (
        "assign_request_id: {request.external_req_id}-{random_uuid():.8}",
        "assign_request_id: VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
    ),
    by="steps",
    why="the id that the user knows is the worker's without its suffix",
)
RUNNER = Symbols(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    ("get_model", "input_batch", "positions", "input_ids"),
    by="worker, steps",
    why="the older model runner: its batch, and where its rows' positions and tokens are",
)
BATCH = Symbols(
    "vllm.v1.worker.gpu_input_batch:InputBatch",
    ("req_ids", "num_reqs"),
    by="steps",
    why="the order of the requests in the older runner's rows",
)
NEWER_RUNNER = Symbols(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    ("get_model", "execute_model_state"),
    by="worker, steps",
    why="the newer model runner: it keeps its batch here until it samples",
)
NEWER_STATE = Symbols(
    "vllm.v1.worker.gpu.model_runner:ExecuteModelState",
    ("input_batch",),
    by="steps",
    why="the newer runner's batch",
)
NEWER_BATCH = Symbols(
    "vllm.v1.worker.gpu.input_batch:InputBatch",
    ("req_ids", "num_reqs", "positions", "input_ids"),
    by="steps",
    why="the order of the requests in the newer runner's rows, and their positions and tokens",
)

# Whose rows cached tokens share.

CACHED = Symbols(
    "vllm.v1.core.sched.output:NewRequestData",
    ("num_computed_tokens", "block_ids"),
    by="steps",
    why="which positions of a new request are cached, and its KV blocks",
)
LATER_BLOCKS = Symbols(
    "vllm.v1.core.sched.output:SchedulerOutput",
    ("scheduled_cached_reqs",),
    by="steps",
    why="the KV blocks that requests get later",
)
LATER_BLOCKS_OF = Symbols(
    "vllm.v1.core.sched.output:CachedRequestData",
    ("req_ids", "new_block_ids", "num_computed_tokens", "resumed_req_ids"),
    by="steps",
    why="the KV blocks that requests get later",
)
KV_CACHE = Symbols(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    ("kv_cache_config",),
    by="prefix",
    why="how the KV blocks are grouped, in the older runner",
)
NEWER_KV_CACHE = Symbols(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    ("kv_cache_config",),
    by="prefix",
    why="how the KV blocks are grouped, in the newer runner",
)
KV_CACHE_CONFIG = Symbols(
    "vllm.v1.kv_cache_interface:KVCacheConfig",
    ("kv_cache_groups",),
    by="prefix",
    why="how the KV blocks are grouped",
)
KV_CACHE_GROUP = Symbols(
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
    ("kv_cache_spec",),
    by="prefix",
    why="how the KV blocks are grouped",
)
KV_CACHE_SPECS = Symbols(
    "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
    ("kv_cache_specs",),
    by="prefix",
    why="which groups keep every position",
)
KV_CACHE_SPEC = Symbols(
    "vllm.v1.kv_cache_interface:FullAttentionSpec",
    ("block_size",),
    by="prefix",
    why="positions in a KV block",
)
FULL_ATTENTION = Symbols(
    "vllm.v1.kv_cache_interface",
    ("FullAttentionSpec",),
    by="prefix",
    why="which groups keep every position",
)
BLOCKS_FROM_ELSEWHERE = Symbols(
    "vllm.config.vllm:VllmConfig | vllm.config:VllmConfig",
    ("kv_transfer_config", "cache_config", "parallel_config"),
    by="prefix",
    why="where blocks may come from another process",
)
CONTEXT_PARALLEL = Symbols(
    "vllm.config.parallel:ParallelConfig | vllm.config:ParallelConfig",
    ("decode_context_parallel_size", "prefill_context_parallel_size"),
    by="prefix",
    why="where a block holds other positions than its place says",
)

# Which worker it is, and what ran.

GROUPS = Symbols(
    "vllm.distributed.parallel_state",
    ("get_tp_group", "get_pp_group"),
    by="metadata",
    why="the worker's rank in its parallel groups: tensor-parallel ranks record once",
)
GROUP = Symbols(
    "vllm.distributed.parallel_state:GroupCoordinator",
    ("rank_in_group",),
    by="metadata",
    why="the worker's rank in its parallel groups",
)
PARALLEL_CONFIG = Symbols(
    "vllm.config.parallel:ParallelConfig | vllm.config:ParallelConfig",
    (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "data_parallel_rank",
        "prefill_context_parallel_size",
        "use_sequence_parallel_moe",
        "use_ubatching",
        "num_ubatches",
        "enable_expert_parallel",
        "world_size",
    ),
    by="metadata",
    why="the parallel layout",
)
INSTANCE = Symbols(
    "vllm.config.vllm:VllmConfig | vllm.config:VllmConfig",
    ("instance_id",),
    by="metadata",
    why="what all workers of one engine know, and no other engine's: their run",
)
DRAFT_MODEL = Symbols(
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    ("drafter",),
    by="routers",
    why="a draft model's own MoE layers, which are not recorded, and said",
)
NEWER_DRAFT_MODEL = Symbols(
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    ("speculator",),
    by="routers",
    why="a draft model's own MoE layers",
)

# Captures: how a caller marks its requests, and reaches the workers.

MARKS = Symbols(
    "vllm.sampling_params:SamplingParams",
    ("extra_args", "skip_reading_prefix_cache", "clone", "n", "max_tokens"),
    by="captures, ../captures/engine",
    why="a caller marks its requests, and has each of their positions executed",
)
MARKED = Symbols(
    "vllm.v1.core.sched.output:NewRequestData",
    ("sampling_params",),
    by="captures",
    why="the worker sees the mark",
)
SAMPLINGS = Symbols(
    "vllm.v1.engine.parallel_sampling:ParentRequest",
    ('get_child_info: f"{index}_{self.request_id}"',),
    by="captures",
    why="which of the samplings of a prompt a request is",
)
CALLER = Symbols(
    "vllm.entrypoints.llm:LLM",
    (
        "collective_rpc(method, timeout, args, kwargs)",
        "generate(prompts, sampling_params)",
        "get_default_sampling_params",
    ),
    by="../captures/call",
    why="how a caller reaches the workers, and generates",
)
ASYNC_CALLER = Symbols(
    "vllm.v1.engine.async_llm:AsyncLLM",
    ("collective_rpc(method, timeout, args, kwargs)", "generate(prompt, sampling_params, request_id)"),
    by="../captures/call",
    why="how a caller reaches the workers, and generates",
)

# Where rows lie in the routers' tensors, under data parallelism, sequence parallelism and dual-batch overlap.

FORWARD_CONTEXT = Symbols(
    "vllm.forward_context",
    ("get_forward_context",),
    by="forward",
    why="how many rows each data-parallel rank has in a step",
)
CONTEXT = Symbols(
    "vllm.forward_context:ForwardContext",
    ("dp_metadata",),
    by="forward",
    why="how many rows each data-parallel rank has in a step",
)
DATA_PARALLEL_METADATA = Symbols(
    "vllm.forward_context:DPMetadata",
    ("num_tokens_across_dp_cpu",),
    by="forward",
    why="how many rows each data-parallel rank has in a step",
)
MICROBATCHES = Symbols(
    "vllm.v1.worker.ubatching",
    ("dbo_enabled", "dbo_current_ubatch_id", "_CURRENT_CONTEXTS", "_NUM_UBATCHES"),
    by="forward",
    why="which microbatch of a step runs in this thread",
)
MICROBATCH = Symbols(
    "vllm.v1.worker.ubatching:UBatchContext",
    ("forward_context",),
    by="forward",
    why="how many rows each data-parallel rank has in a microbatch",
)

# What ran.

MODEL_CONFIG = Symbols(
    "vllm.config.model:ModelConfig | vllm.config:ModelConfig",
    ("model", "dtype", "seed", "enforce_eager", "max_model_len"),
    by="metadata",
    why="what ran",
)
SCHEDULER_CONFIG = Symbols(
    "vllm.config.scheduler:SchedulerConfig | vllm.config:SchedulerConfig",
    ("max_num_batched_tokens", "max_num_seqs"),
    by="metadata",
    why="what ran",
)
CACHE_CONFIG = Symbols(
    "vllm.config.cache:CacheConfig | vllm.config:CacheConfig",
    ("enable_prefix_caching",),
    by="metadata, prefix",
    why="whether tokens may be cached",
)
COMPILATION_CONFIG = Symbols(
    "vllm.config.compilation:CompilationConfig | vllm.config:CompilationConfig",
    ("mode",),
    by="metadata",
    why="what ran",
)

TABLE = tuple(entry for entry in dict(globals()).values() if isinstance(entry, Symbols))
