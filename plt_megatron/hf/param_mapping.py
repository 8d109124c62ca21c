"""The table that translates weights: every tensor's name here and in Hugging Face files, and how one becomes the other.

A mapping knows both directions and how tensor parallelism cuts our tensor. Names are megatron-core's over the whole
model (layers from 0) on one side, Llama's with PLT's gate on the other. All families we read use the same names: Llama,
Qwen2, Qwen3 and Qwen3-MoE, OLMo-2, our own exports and LoopCoder-v2's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig
from plt_megatron.hf.tensor_mapping import (
    DirectMapping,
    GateUpMapping,
    NegatedMapping,
    QKVMapping,
    Sizes,
    TensorMapping,
)

# "loopcoder": the gate multiplies the global attention, whatever side it has in the model.
Style = Literal["plt", "loopcoder"]
Split = Literal["rows", "columns", "gate_up"]  # over tensor-parallel ranks; None: whole on each


# ---------------------------------------------------------------- the table


EACH = "{expert}"  # in a name: a row of the table for each expert


@dataclass(frozen=True)
class Row:
    """A line of the table: names with the dimensions of their shapes, and the models that have this tensor."""

    megatron: tuple[str, str]
    hf: tuple[tuple[str, str], ...]
    form: TensorMapping = DirectMapping()
    split: Split | None = None
    when: Callable[[ModelConfig], bool] = lambda model: True


def _pre(model: ModelConfig) -> bool:
    return model.norm_placement == "pre"


def _post(model: ModelConfig) -> bool:
    return model.norm_placement == "post"


def _dense(model: ModelConfig) -> bool:
    return model.num_moe_experts is None


def _experts(model: ModelConfig) -> bool:
    return model.num_moe_experts is not None


def _shared_expert(model: ModelConfig) -> bool:
    return model.moe_shared_expert_intermediate_size is not None


def _gate(input_kind: str) -> Callable[[ModelConfig], bool]:
    return lambda model: derived.has_gates(model) and model.gate_input == input_kind


_MODEL = (
    Row(
        ("embedding.word_embeddings.weight", "vocab hidden"),
        (("model.embed_tokens.weight", "vocab hidden"),),
        split="rows",
    ),
    Row(("final_layernorm.weight", "hidden"), (("model.norm.weight", "hidden"),)),
    Row(
        ("output_layer.weight", "vocab hidden"),
        (("lm_head.weight", "vocab hidden"),),
        split="rows",
        when=lambda model: not model.share_embeddings_and_output_weights,
    ),
)
# Below `decoder.layers.{i}.` and `model.layers.{i}.`
_LAYER = (
    Row(("self_attention.linear_qkv.layer_norm_weight", "hidden"), (("input_layernorm.weight", "hidden"),), when=_pre),
    Row(
        ("self_attention.linear_qkv.weight", "qkv hidden"),
        (
            ("self_attn.q_proj.weight", "query hidden"),
            ("self_attn.k_proj.weight", "key_value hidden"),
            ("self_attn.v_proj.weight", "key_value hidden"),
        ),
        form=QKVMapping(),
        split="rows",
    ),
    Row(
        ("self_attention.linear_qkv.bias", "qkv"),
        (
            ("self_attn.q_proj.bias", "query"),
            ("self_attn.k_proj.bias", "key_value"),
            ("self_attn.v_proj.bias", "key_value"),
        ),
        form=QKVMapping(),
        split="rows",
        when=lambda model: model.qkv_bias,
    ),
    Row(
        ("self_attention.q_layernorm.weight", "head_dim"),
        (("self_attn.q_norm.weight", "head_dim"),),
        when=lambda model: model.qk_layernorm and _pre(model),
    ),
    Row(
        ("self_attention.k_layernorm.weight", "head_dim"),
        (("self_attn.k_norm.weight", "head_dim"),),
        when=lambda model: model.qk_layernorm and _pre(model),
    ),
    Row(
        ("self_attention.q_layernorm.weight", "query"),
        (("self_attn.q_norm.weight", "query"),),
        when=lambda model: model.qk_layernorm and _post(model),
    ),
    Row(
        ("self_attention.k_layernorm.weight", "key_value"),
        (("self_attn.k_norm.weight", "key_value"),),
        when=lambda model: model.qk_layernorm and _post(model),
    ),
    Row(
        ("self_attention.core_attention.plt_gate.weight", "heads head_dim"),
        (("self_attn.plt_gate.weight", "heads head_dim"),),
        split="rows",
        when=_gate("query"),
    ),
    Row(
        ("self_attention.core_attention.plt_gate.bias", "heads"),
        (("self_attn.plt_gate.bias", "heads"),),
        split="rows",
        when=_gate("query"),
    ),
    Row(
        ("self_attention.core_attention.plt_gate.weight", "heads hidden"),
        (("self_attn.plt_gate.weight", "heads hidden"),),
        when=_gate("hidden"),
    ),
    Row(
        ("self_attention.core_attention.plt_gate.bias", "heads"),
        (("self_attn.plt_gate.bias", "heads"),),
        when=_gate("hidden"),
    ),
    Row(
        ("self_attention.core_attention.plt_gate.gate_norm.weight", "hidden"),
        (("self_attn.plt_gate.gate_norm.weight", "hidden"),),
        when=_gate("hidden"),
    ),
    Row(
        ("self_attention.linear_proj.weight", "hidden query"),
        (("self_attn.o_proj.weight", "hidden query"),),
        split="columns",
    ),
    Row(
        ("self_attention.output_norm.weight", "hidden"),
        (("post_attention_layernorm.weight", "hidden"),),
        when=_post,
    ),
    Row(
        ("mlp.linear_fc1.layer_norm_weight", "hidden"),
        (("post_attention_layernorm.weight", "hidden"),),
        when=lambda model: _pre(model) and _dense(model),
    ),
    Row(
        ("pre_mlp_layernorm.weight", "hidden"),
        (("post_attention_layernorm.weight", "hidden"),),
        when=lambda model: _pre(model) and _experts(model),
    ),
    Row(
        ("mlp.linear_fc1.weight", "gate_up hidden"),
        (("mlp.gate_proj.weight", "ffn hidden"), ("mlp.up_proj.weight", "ffn hidden")),
        form=GateUpMapping(),
        split="gate_up",
        when=_dense,
    ),
    Row(
        ("mlp.linear_fc2.weight", "hidden ffn"),
        (("mlp.down_proj.weight", "hidden ffn"),),
        split="columns",
        when=_dense,
    ),
    Row(("mlp.router.weight", "experts hidden"), (("mlp.gate.weight", "experts hidden"),), when=_experts),
    Row(
        (f"mlp.experts.{EACH}.linear_fc1.weight", "expert_gate_up hidden"),
        (
            (f"mlp.experts.{EACH}.gate_proj.weight", "expert_ffn hidden"),
            (f"mlp.experts.{EACH}.up_proj.weight", "expert_ffn hidden"),
        ),
        form=GateUpMapping(),
        when=_experts,
    ),
    Row(
        (f"mlp.experts.{EACH}.linear_fc2.weight", "hidden expert_ffn"),
        ((f"mlp.experts.{EACH}.down_proj.weight", "hidden expert_ffn"),),
        when=_experts,
    ),
    Row(
        ("mlp.shared_experts.linear_fc1.weight", "shared_gate_up hidden"),
        (
            ("mlp.shared_expert.gate_proj.weight", "shared_ffn hidden"),
            ("mlp.shared_expert.up_proj.weight", "shared_ffn hidden"),
        ),
        form=GateUpMapping(),
        split="gate_up",
        when=_shared_expert,
    ),
    Row(
        ("mlp.shared_experts.linear_fc2.weight", "hidden shared_ffn"),
        (("mlp.shared_expert.down_proj.weight", "hidden shared_ffn"),),
        split="columns",
        when=_shared_expert,
    ),
    Row(
        ("mlp.output_norm.weight", "hidden"),
        (("post_feedforward_layernorm.weight", "hidden"),),
        when=lambda model: model.ffn_output_norm or _post(model),
    ),
)
# What files hold beside the weights and can be worked out again.
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
EXTRA_STATES = ("._extra_state",)  # Transformer Engine's


# ---------------------------------------------------------------- a mapping of a certain model


@dataclass(frozen=True)
class ParamMapping:
    """One tensor of a model and what it is on the other side.

    Attributes:
        name, shape: ours, over the whole model, without the vocabulary's padding.
        hf: their names and shapes.
        split: how tensor parallelism cuts ours.
    """

    name: str
    shape: tuple[int, ...]
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    form: TensorMapping
    split: Split | None
    sizes: Sizes

    def to_hf(self, ours: Tensor) -> list[Tensor]:
        """Their tensors, in the order of `hf`; views where that is possible."""
        return self.form.to_hf(ours, self.sizes)

    def to_megatron(self, theirs: Sequence[Tensor]) -> Tensor:
        """Our tensor from theirs, in the order of `hf`."""
        return self.form.to_megatron(theirs, self.sizes)

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of our tensor that one of `size` tensor-parallel ranks holds."""
        if self.split is None:
            return whole
        if self.split == "gate_up":
            return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        return whole.chunk(size, dim=1 if self.split == "columns" else 0)[rank]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Our whole tensor from the tensor-parallel ranks' parts, in the order of ranks."""
        if self.split is None:
            return parts[0]
        if self.split == "gate_up":
            halves = [part.chunk(2) for part in parts]
            return torch.cat([half[index] for index in (0, 1) for half in halves])
        return torch.cat(list(parts), dim=1 if self.split == "columns" else 0)


def mappings_for(model: ModelConfig, vocab_size: int, style: Style = "plt") -> list[ParamMapping]:
    """The mappings of every tensor of `model`, in the order in which exports store them."""
    sizes = Sizes.of(model, vocab_size)
    embedding, *head = _MODEL
    rows = [("", "", embedding)]
    layer = [of_expert for row in _LAYER if row.when(model) for of_expert in _for_each_expert(row, sizes.experts)]
    rows += [(f"decoder.layers.{i}.", f"model.layers.{i}.", row) for i in range(model.num_layers) for row in layer]
    rows += [("", "", row) for row in head]
    return [_bind(row, ours, theirs, model, sizes, style) for ours, theirs, row in rows if row.when(model)]


def _for_each_expert(row: Row, experts: int) -> list[Row]:
    if EACH not in row.megatron[0]:
        return [row]

    def named(pair: tuple[str, str], expert: int) -> tuple[str, str]:
        return pair[0].replace(EACH, str(expert)), pair[1]

    return [
        replace(row, megatron=named(row.megatron, expert), hf=tuple(named(pair, expert) for pair in row.hf))
        for expert in range(experts)
    ]


def _bind(row: Row, ours: str, theirs: str, model: ModelConfig, sizes: Sizes, style: Style) -> ParamMapping:
    form = row.form
    name = row.megatron[0]
    if style == "loopcoder" and model.gate_side == "local" and name.endswith(("plt_gate.weight", "plt_gate.bias")):
        form = NegatedMapping()
    return ParamMapping(
        name=ours + name,
        shape=sizes.shape(row.megatron[1].split()),
        hf=tuple((theirs + hf_name, sizes.shape(shape.split())) for hf_name, shape in row.hf),
        form=form,
        split=row.split,
        sizes=sizes,
    )
