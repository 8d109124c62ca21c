"""From LoopedGPT's parameters to the plain model's, and random values where ours start at zero or one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.build import global_names, global_tensors
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import is_buffer

_LAYER_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm",
    "self_attention.q_layernorm.weight": "q_norm",
    "self_attention.k_layernorm.weight": "k_norm",
    "self_attention.key_shift.key": "key_shift.key",
    "self_attention.key_shift.value": "key_shift.value",
    "self_attention.linear_proj.weight": "o",
    "self_attention.core_attention.plt_gate.weight": "gate.weight",
    "self_attention.core_attention.plt_gate.bias": "gate.bias",
    "self_attention.core_attention.plt_gate.gate_norm.weight": "gate.norm",
    "mlp.linear_fc1.layer_norm_weight": "ffn_norm",
    "mlp.output_norm.weight": "ffn_output_norm",
    "pre_mlp_layernorm.weight": "ffn_norm",
    "mlp.router.weight": "router",
    "mlp.router.expert_bias": "router_bias",
}
_NAMES = {
    "embedding.word_embeddings.weight": "embedding",
    "output_layer.weight": "head",
    "final_layernorm.weight": "final_norm",
    "loop_input.hidden_scale": "hidden_scale",
}


def to_plain(config: ModelConfig, tensors: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Rename, split and regroup LoopedGPT's unsharded tensors for PlainPLT; float64, on the CPU.

    It is linear in the tensors, so gradients map as weights do. A name that it does not know is a KeyError.
    """
    plain: dict[str, Tensor] = {}
    for name, original in tensors.items():
        tensor = original.detach().cpu().double()
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match is None:
            plain[_NAMES[name]] = tensor[:vocab_size] if tensor.dim() == 2 else tensor
            continue
        prefix = f"layers.{match[1]}."
        if match[2] in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            suffix = "_bias" if tensor.dim() == 1 else ""
            for kind, part in zip("qkv", _split_qkv(config, tensor), strict=True):
                plain[prefix + kind + suffix] = part
        elif ffn := re.fullmatch(r"mlp\.(?:(experts\.\d+\.)|(shared)_experts(\.))?linear_fc([12])\.weight", match[2]):
            owner = prefix + (ffn[1] or (ffn[2] or "") + (ffn[3] or ""))
            names = ("gate_proj", "up_proj") if ffn[4] == "1" else ("down_proj",)
            plain |= {owner + kind: part for kind, part in zip(names, tensor.chunk(len(names)), strict=True)}
        else:
            plain[prefix + _LAYER_NAMES[match[2]]] = tensor
    return plain


def _split_qkv(config: ModelConfig, tensor: Tensor) -> list[Tensor]:
    """megatron-core's rows are, group by group, the queries of the group's heads, its key and its value."""
    groups = config.num_query_groups or config.num_attention_heads
    per_group = config.num_attention_heads // groups
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    by_group = tensor.view(groups, (per_group + 2) * head_dim, *tensor.shape[1:])
    return [part.flatten(0, 1) for part in by_group.split([per_group * head_dim, head_dim, head_dim], dim=1)]


def randomize_gates_and_norms(stage: LoopedGPT, zero_gates: bool = False) -> None:
    """Gates ~ N(0, 1), norms and biases ~ 1 + N(0, 0.3): as built they are zero and one, which would hide mistakes.

    Drawn by the parameters' names in the whole model, so that they are equal in every layout.
    """
    group = stage.pg_collection.tp
    for name, parameter in global_names(stage):
        gate = ".plt_gate." in name and ".gate_norm." not in name
        if not (gate or parameter.dim() == 1) or (gate and zero_gates):
            continue
        shape = list(parameter.shape)
        split = getattr(parameter, "tensor_model_parallel", False)
        if split:
            shape[0] *= group.size()
        values = torch.empty(shape).normal_(generator=draw_by_name(name))
        if not gate:
            values = 1 + 0.3 * values
        if split:
            values = values.chunk(group.size())[group.rank()]
        with torch.no_grad():
            parameter.copy_(values)


def randomize_biases(stage: LoopedGPT) -> None:
    """Biases of experts ~ 0.15 N(0, 1), drawn by their names in the whole model: sigmoid scores are as wide apart."""
    for name, buffer in global_tensors(stage):
        if is_buffer(name):
            buffer.copy_(0.15 * torch.randn(buffer.shape, generator=draw_by_name(name)))


def draw_by_name(name: str) -> torch.Generator:
    """Seed a generator by a tensor's name in the whole model."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
