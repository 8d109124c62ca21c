"""Translation of our run configuration into megatron-core's TransformerConfig."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.rules.fp8 import AMAX_HISTORY_LENGTH
from plt_megatron.config.rules.fusions import Fusions
from plt_megatron.config.schema import Fp8Config, ModelConfig, MoeConfig, ParallelConfig
from plt_megatron.errors import UserError
from plt_megatron.runtime.cpu_runtime import is_cpu_runtime

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class PLTTransformerConfig(TransformerConfig):
    """megatron-core's configuration of a layer stack, with PLT's own as `plt`; `backend`: `torch` or `te`.

    `cp_comm_type` is how the global attention communicates under context parallelism, `window_cp_comm_type` how the
    local one does; both apply to Transformer Engine. Attention multiplies queries and keys after RoPE by
    0.1 ln(`yarn_rotary_scaling_factor`) + 1; a scaling factor of 1 means no YaRN.
    `packed_documents`: whether rows are packed with documents that do not see each other.
    """

    plt: ModelConfig = field(default_factory=ModelConfig)
    backend: str = "torch"
    window_cp_comm_type: str = "a2a"
    yarn_rotary_scaling_factor: float = 1.0
    packed_documents: bool = False


def resolve_backend(model: ModelConfig, precision: str) -> str:
    """Return `derived.backend` on this machine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return derived.backend(model, precision, HAVE_TE and not is_cpu_runtime())


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    precision: str = "fp32",
    deterministic: bool = False,
    fp8: Fp8Config | None = None,
    fusions: Fusions | None = None,
    packed_documents: bool = False,
) -> PLTTransformerConfig:
    """Build the layers' configuration.

    It has no virtual pipeline size: a stage holds its layers once, however many loops run through them.

    Raises:
        UserError: `fp8` with a backend other than Transformer Engine.
    """
    backend = resolve_backend(model, precision)
    if fp8 is not None and backend != "te":
        raise UserError("training.fp8 needs Transformer Engine, which cannot be used here; set training.fp8=null")
    if deterministic and backend == "te":
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # TE's attention requires it and chooses kernels by it
    return PLTTransformerConfig(
        plt=model,
        backend=backend,
        packed_documents=packed_documents,
        **_layer_settings(model),
        **_parallel_settings(parallel),
        **({} if fp8 is None else _fp8_settings(fp8)),
        **({} if model.moe is None else _moe_settings(model, model.moe, parallel, backend)),
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        # We initialize ourselves (model/build.py), the same way in every layout.
        perform_initialization=False,
        use_cpu_initialization=is_cpu_runtime(),
        # Average over the global batch's tokens, however they are split into microbatches and ranks.
        calculate_per_token_loss=True,
        deterministic_mode=deterministic,
        masked_softmax_fusion=False,
        bias_activation_fusion=backend == "te",
        bias_dropout_fusion=False,
        **dataclasses.asdict(fusions or Fusions()),
        cross_entropy_fusion_impl="te",
        # megatron-core writes this into the process's environment, so use one value whatever backends a process builds.
        attention_backend=AttnBackend.auto,
    )


def _layer_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": derived.num_query_groups(model),
        "kv_channels": derived.head_dim(model),
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_method_std,
        "yarn_rotary_scaling_factor": derived.yarn_factor(model) or 1.0,
    }


def _parallel_settings(parallel: ParallelConfig) -> dict[str, Any]:
    layout = ParallelLayout.of(parallel)
    granularity = parallel.recompute_granularity
    full = granularity == "full"
    return {
        **layout.megatron_sizes,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
        "sequence_parallel": layout.sequence_parallel,
        "cp_comm_type": parallel.cp_comm_type,
        "window_cp_comm_type": parallel.window_cp_comm_type,
        "recompute_granularity": None if granularity == "none" else granularity,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": parallel.recompute_num_layers if full else None,
        "recompute_modules": list(parallel.recompute_modules),
        # With batched p2p and two stages the interleaved schedule silently mixes up messages between the ranks.
        "batch_p2p_comm": False,
    }


def _moe_settings(model: ModelConfig, moe: MoeConfig, parallel: ParallelConfig, backend: str) -> dict[str, Any]:
    bias = moe.router_bias_update_rate
    balanced = moe.router_load_balancing_type != "none" and moe.aux_loss_coeff > 0
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.router_topk,
        "moe_ffn_hidden_size": derived.expert_ffn_hidden_size(model),
        "moe_shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
        "moe_router_pre_softmax": moe.router_score_function == "pre_softmax",
        "moe_router_score_function": "sigmoid" if moe.router_score_function == "sigmoid" else "softmax",
        "moe_router_enable_expert_bias": bias is not None,
        **({} if bias is None else {"moe_router_bias_update_rate": bias}),
        "moe_router_dtype": "fp32",  # bf16's rounding should not decide between nearly equal experts
        "moe_router_load_balancing_type": moe.router_load_balancing_type if balanced else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coeff if balanced else 0.0,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_expert_capacity_factor": moe.expert_capacity_factor,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "moe_grouped_gemm": backend == "te",
        "expert_tensor_parallel_size": 1,
    }


def _fp8_settings(fp8: Fp8Config) -> dict[str, Any]:
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_dot_product_attention": fp8.attention,
        "first_last_layers_bf16": fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
        # Delayed scaling: loops have different value ranges but share a module's history, so a scale must cover the
        # largest value of many calls. megatron-core's default covers only the last call.
        "fp8_amax_history_len": AMAX_HISTORY_LENGTH,
        "fp8_amax_compute_algo": "max",
    }


def schedule_config(config: PLTTransformerConfig, loop_count: int) -> PLTTransformerConfig:
    """Return the pipeline schedule's copy of the configuration, in which the loops are virtual stages."""
    config = copy.copy(config)
    layout = ParallelLayout(pipeline=config.pipeline_model_parallel_size, loops=loop_count)
    config.virtual_pipeline_model_parallel_size = layout.virtual_stages
    config.overlap_p2p_comm = layout.virtual_stages is not None
    return config
