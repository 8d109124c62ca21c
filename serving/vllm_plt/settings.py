"""The plugin's settings, and a check of the server's options that PLT models do not support.

--additional-config '{"plt": {"loop_mode": "serial", "loop_count": 1}}'
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vllm_plt.configuration_plt import PLTConfig
from vllm_plt.rope import most_positions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "plt"
_DRAFTS_WITHOUT_A_MODEL = ("ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True)
class Settings:
    """Settings of a model's loops.

    Attributes:
        loop_mode: how a decode step runs its loops: "parallel" (as rows of one batch) or "serial" (one by one).
        loop_count: L, at most the model's own.
    """

    loop_mode: str
    loop_count: int

    @property
    def parallel(self) -> bool:
        return self.loop_mode == "parallel" and self.loop_count > 1


def read_settings(vllm_config: "VllmConfig") -> Settings:
    """Return the model's settings, with defaults for those not given.

    Raises:
        ValueError: an unknown key or value, in one line.
    """
    config = vllm_config.model_config.hf_config
    given = _given(vllm_config)
    known = [field.name for field in fields(Settings)]
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"additional_config {KEY}.{unknown[0]} is not known: {KEY} takes {' and '.join(known)}")
    count = given.get("loop_count", config.loop_count)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= config.loop_count:
        raise ValueError(
            f"additional_config {KEY}.loop_count must be from 1 to this model's {config.loop_count}, not {count!r}"
        )
    fits = config.cross_loop_parallel and _adapters_fit(vllm_config)
    mode = given.get("loop_mode", "parallel" if fits else "serial")
    if mode not in ("parallel", "serial"):
        raise ValueError(f'additional_config {KEY}.loop_mode must be "parallel" or "serial", not {mode!r}')
    if mode == "parallel" and not fits and count > 1:
        reason = (
            "LoRA on experts or --fully-sharded-loras"
            if config.cross_loop_parallel
            else "this model (no cross_loop_parallel: each loop needs the last)"
        )
        raise ValueError(f'additional_config {KEY}.loop_mode "parallel" is not possible with {reason}: use "serial"')
    return Settings(mode, count)


def _adapters_fit(vllm_config: "VllmConfig") -> bool:
    """Return True unless LoRA is on in a form that loops as rows do not support: `vllm_plt.lora` handles the kernels of
    linear layers only."""
    lora = vllm_config.lora_config
    return lora is None or (vllm_config.model_config.hf_config.num_experts is None and not lora.fully_sharded_loras)


def _given(vllm_config: "VllmConfig") -> dict:
    everything = vllm_config.additional_config
    given = everything.get(KEY, {}) if isinstance(everything, dict) else {}
    if not isinstance(given, dict):
        raise ValueError(f"additional_config {KEY} must be an object, not {given!r}")
    return given


def check(vllm_config: "VllmConfig") -> None:
    """Raise a one-line `ValueError` if the server's options need something that PLT models do not support."""
    parallel, config = vllm_config.parallel_config, vllm_config.model_config.hf_config
    if config.loop_order != "stack":
        raise ValueError(f"PLT models of loop_order {config.loop_order} cannot be served yet: use transformers")
    if config.num_experts is not None and config.scoring_func != "softmax":
        raise ValueError(
            f"PLT models whose experts have {config.scoring_func} scores cannot be served yet: use transformers"
        )
    if config.num_experts is not None and config.first_k_dense_replace > 0:
        raise ValueError(
            f"PLT models whose first layers have no experts (first_k_dense_replace {config.first_k_dense_replace}) "
            "cannot be served yet: use transformers"
        )
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "PLT models cannot be served with pipeline parallelism, as loops start over: use tensor parallelism"
        )
    if parallel.use_ubatching:
        raise ValueError("PLT models cannot be served in microbatches (--enable-dbo): a carry is of the whole step")
    if parallel.enable_eplb:
        raise ValueError("PLT models cannot be served with --enable-eplb: vLLM's balancer does not know their experts")
    if vllm_config.aux_output_config.enable_return_routed_experts and read_settings(vllm_config).loop_count > 1:
        raise ValueError(
            "PLT models cannot be served with --enable-return-routed-experts: it has one choice of experts a token and "
            "layer, and each loop chooses anew"
        )
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        raise ValueError(
            "PLT models cannot be served with weights in the CPU's memory (--cpu-offload-gb, --offload-group-size), as "
            "loops reach each layer again: use tensor parallelism or quantization"
        )
    if parallel.data_parallel_size > 1 and config.num_experts is not None:
        raise ValueError(
            "PLT models with experts cannot be served with --data-parallel-size: ranks must reach the experts equally "
            "often, and a step runs its loops at once or one by one; start servers of their own"
        )
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in _DRAFTS_WITHOUT_A_MODEL:
        raise ValueError(
            f"PLT models cannot be served with drafts by another model (speculative method {speculation.method}): use "
            f"{' or '.join(_DRAFTS_WITHOUT_A_MODEL)}"
        )
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise ValueError("PLT models cannot be served with context parallelism: their windows are not split")
    sizes, requests = vllm_config.compilation_config.compile_sizes or (), vllm_config.scheduler_config.max_num_seqs
    if config.key_shift != "none" and any(isinstance(size, str) or size > requests for size in sizes):
        raise ValueError(  # vLLM would take the number of requests, which is another than that of tokens, for the size
            f"PLT models with key_shift take compile_sizes as numbers up to --max-num-seqs {requests}, not {sizes}"
        )
    longest, most = vllm_config.model_config.max_model_len, most_positions(config)
    if most is not None and longest > most:
        raise ValueError(
            f"vLLM has rope_type yarn's angles of factor x original_max_position_embeddings = {most} positions, not of "
            f"{longest}: give --max-model-len {most}"
        )
    if has_carry(config, read_settings(vllm_config).loop_count):
        check_cache_manager(vllm_config)


def has_carry(config: PLTConfig, loops: int) -> bool:
    """Return True if each token hands a state on to the next (see `vllm_plt.carry`)."""
    return (config.cross_loop_parallel and loops > 1) or config.key_shift != "none"


def check_cache_manager(vllm_config: "VllmConfig") -> None:
    """Raise a one-line `ValueError` if vLLM will give each layer a cache of the whole context, which no carry has, or
    batch-invariant kernels, which the carry's backend would have to promise: a step runs its loops at once or, beside a
    prompt, one by one."""
    from vllm_plt.vllm_internals import envs, what_ends_windows

    if envs.VLLM_BATCH_INVARIANT:
        raise ValueError(
            "PLT models with cross-loop parallelism or key_shift cannot be served with VLLM_BATCH_INVARIANT=1, as "
            "their loops run at once or one by one: unset it"
        )
    if option := what_ends_windows(vllm_config):
        raise ValueError(
            "PLT models with cross-loop parallelism or key_shift need vLLM's hybrid KV cache manager, which "
            f"{option} switches off"
        )


def fit_passes(vllm_config: "VllmConfig") -> None:
    """Switch off the one fusion whose limit is in tokens, of which a decode step has L rows each.

    vLLM picks it by the step's tokens, and it asserts at run time that there are no more rows than that.

    Raises:
        ValueError: it was asked for, in one line.
    """
    if not read_settings(vllm_config).parallel:
        return
    passes = vllm_config.compilation_config.pass_config
    if passes.fuse_allreduce_rms and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise ValueError(
            "PLT models cannot be served with pass_config.fuse_allreduce_rms, whose limit is in tokens while a decode "
            'step has a row for each loop of a token: leave it, or use loop_mode "serial"'
        )
    passes.fuse_allreduce_rms = False


def register_check(architecture: str) -> None:
    """Have vLLM call `check` for this architecture while it builds its configuration."""
    from vllm_plt.vllm_internals import MODELS_CONFIG_MAP, CUDAGraphMode, VerifyAndUpdateConfig

    class PLTServingConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: "VllmConfig") -> None:
            check(vllm_config)
            fit_passes(vllm_config)
            compilation = vllm_config.compilation_config
            # A fast cold start assumes that each expert layer runs once per step.
            compilation.fast_moe_cold_start = False
            # A decode step is one graph. Other steps have inputs whose addresses change (see leave_piecewise_graphs),
            # and run other passes than the one that a graph of a mixed batch would capture.
            unset = compilation.cudagraph_mode is None and vllm_config.optimization_level > 0
            if unset or compilation.cudagraph_mode:
                compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY

    MODELS_CONFIG_MAP[architecture] = PLTServingConfig
