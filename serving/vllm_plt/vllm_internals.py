"""Everything that this plugin uses of vLLM, and the only place that touches its internal interfaces.

Public names are re-exported here too, so that a new vLLM version can be checked line by line.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm import envs
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import _encode_layer_name
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.utils import customize_attention_spec

from vllm_plt.version import problem

if _message := problem():
    raise ImportError(_message)


def register_cache_spec(spec: type, manager: type) -> None:
    """Register a KV cache spec whose layers form their own groups."""
    # The registry adds vLLM's own specs only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def register_layer(name: str, layer: AttentionLayerBase, vllm_config: VllmConfig) -> None:
    """Register `layer` under this name, with one number in it, so that the runner gives it a KV cache."""
    known = vllm_config.compilation_config.static_forward_context
    if name in known:
        raise ValueError(f"two layers are called {name}")
    known[name] = layer


def metadata_of(layer_name: str):
    """Return this step's attention metadata of a layer; None in a dry run."""
    metadata = get_forward_context().attn_metadata
    return None if metadata is None else metadata[layer_name]


def leave_piecewise_graphs() -> None:
    """Run the rest of this step without CUDA graphs, if it was to use piecewise ones.

    A piecewise graph is replayed with the addresses of its capture, but a pass's inputs are new tensors.
    """
    context = get_forward_context()
    if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE


@contextmanager
def padding_of_rows(loops: int, tokens: int) -> Iterator[None]:
    """Mark padding by row l * T + t instead of by token t, of the first T, within this context.

    vLLM's router skips the rows that the step's mask calls padding, and reads the mask when it runs, which is not when
    torch.compile traces it. A CUDA graph of the step holds this copy of the mask too, so that a replay sees its values.
    """
    context = get_forward_context()
    of_tokens = context.is_padding
    if of_tokens is not None:
        context.is_padding = of_tokens[:tokens].repeat(loops)
    try:
        yield
    finally:
        context.is_padding = of_tokens


def attention_page_bytes(attention: Attention, vllm_config: VllmConfig) -> int:
    """Return the size of one block of an attention layer, in bytes."""
    spec = attention.get_kv_cache_spec(vllm_config)
    return customize_attention_spec(attention.get_attn_backend(), spec).page_size_bytes


def what_ends_windows(vllm_config: VllmConfig) -> str | None:
    """Return the option without which vLLM would have its hybrid KV cache manager; None if it has."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector and not KVConnectorFactory.supports_hma_config(transfer):
        return f"the KV connector {transfer.kv_connector}"
    return "--disable-hybrid-kv-cache-manager" if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager else None


def check_block_size(attention: Attention, vllm_config: VllmConfig) -> None:
    """Raise a `ValueError` for a --block-size with which vLLM would give the windows' layers a different block size."""
    cache, backend = vllm_config.cache_config, attention.attn_backend
    if cache.user_specified_block_size and not backend.supports_block_size(cache.block_size):
        known = ", ".join(str(size) for size in backend.get_supported_kernel_block_sizes())
        raise ValueError(f"--block-size {cache.block_size} is none that {backend.get_name()} takes: {known}")


def can_fold(attention: Attention) -> bool:
    """Return True if `attend_folded` works with this layer's backend. The reader has no scales of a quantized cache."""
    plain = not is_quantized_kv_cache(attention.kv_cache_dtype) and attention.query_quant is None
    return plain and not attention.attn_backend.forward_includes_kv_cache_update


def attend_folded(owner: Attention, reader: Attention, query, key, value) -> torch.Tensor:
    """Store key and value [T, K, D] in `owner`'s cache, then attend to it with `reader`'s query [T, H, D].

    The write's result is an argument of the read, which keeps them in order under torch.compile.
    """
    done = torch.ops.vllm.unified_kv_cache_update(key, value, _encode_layer_name(owner.layer_name))
    output = torch.empty_like(query)
    torch.ops.vllm.unified_attention_with_output(
        query, key, value, output, _encode_layer_name(reader.layer_name), kv_cache_dummy_dep=done
    )
    return output


__all__ = [
    "MODELS_CONFIG_MAP",
    "Attention",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AutoWeightsLoader",
    "BaseLinearLayerWithLoRA",
    "CUDAGraphMode",
    "CommonAttentionMetadata",
    "FusedMoEFactory",
    "LogitsProcessor",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RMSNorm",
    "ReplicatedLinear",
    "RowParallelLinear",
    "SlidingWindowManager",
    "SlidingWindowSpec",
    "SupportsLoRA",
    "SupportsQuant",
    "VerifyAndUpdateConfig",
    "VllmConfig",
    "VocabParallelEmbedding",
    "WeightsMapper",
    "attend_folded",
    "attention_page_bytes",
    "can_fold",
    "check_block_size",
    "envs",
    "get_act_and_mul_fn",
    "get_forward_context",
    "get_rope",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "init_logger",
    "leave_piecewise_graphs",
    "maybe_prefix",
    "metadata_of",
    "padding_of_rows",
    "register_cache_spec",
    "register_layer",
    "set_model_tag",
    "support_torch_compile",
    "tensor_model_parallel_all_reduce",
    "what_ends_windows",
]
