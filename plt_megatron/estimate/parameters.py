"""Parameters of a model by component: exactly those of the model that `plt_megatron.model` builds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of each component, over all layers. Loops share them, so they count once."""

    embedding: int  # padded vocabulary x hidden_size
    attention: int  # Q, K, V and output projections, and biases where there are some
    ffn: int  # gate, up and down projections of a dense FFN or of a shared expert
    norms: int  # every RMSNorm of the layers: inputs, Q and K, FFN output
    gates: int  # G-SWA: none in a model of one loop
    final_norm: int
    output_layer: int  # 0 when tied to the embedding
    router: int = 0
    experts: int = 0  # gate, up and down projections of all of them
    active_experts: int = 0  # of those that a token uses: part of `experts`

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)) - self.active_experts

    @property
    def active(self) -> int:
        """Parameters that take part in one token's forward pass; a dense model uses all."""
        return self.total - self.experts + self.active_experts

    @property
    def tables(self) -> int:
        """The embedding table and, where it is another, the output layer's."""
        return self.embedding + self.output_layer

    @property
    def non_embedding(self) -> int:
        """Without the embedding table and the output layer."""
        return self.total - self.embedding - self.output_layer


def count_parameters(
    model: ModelConfig, vocab_size: int | None = None, tensor_model_parallel_size: int = 1
) -> ParameterCount:
    """Count the parameters of `model`.

    `vocab_size` is the tokenizer's; None: `model.vocab_size`, which must then be given.
    The vocabulary is padded to a multiple that depends on `tensor_model_parallel_size`.
    """
    vocab_size = model.vocab_size if vocab_size is None else vocab_size
    if vocab_size is None:
        raise ValueError("vocab_size is neither an argument nor in the model configuration")
    layers, hidden = model.num_layers, model.hidden_size
    table = derived.padded_vocab_size(model, vocab_size, tensor_model_parallel_size) * hidden
    return ParameterCount(
        embedding=table,
        attention=layers * (qkv_parameters(model) + _qkv_biases(model) + projection_parameters(model)),
        ffn=layers * 3 * hidden * whole_ffn_width(model),
        norms=layers * _layer_norms(model),
        gates=layers * _layer_gate(model),
        final_norm=hidden,
        output_layer=0 if model.share_embeddings_and_output_weights else table,
        router=layers * router_parameters(model),
        experts=layers * (model.num_moe_experts or 0) * expert_parameters(model),
        active_experts=layers * active_experts(model) * expert_parameters(model),
    )


@dataclass(frozen=True)
class RankParameters:
    """Number of parameters that one rank of a pipeline stage holds: its slices, and whole what is not sliced."""

    layers: int  # without experts
    embedding: int
    final_norm: int
    output_layer: int  # a pipeline's last stage holds a copy of a tied embedding
    experts: int = 0  # this rank's, all layers

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def dense(self) -> int:
        """All but experts, which are shared out over other ranks."""
        return self.total - self.experts


def count_rank_parameters(
    model: ModelConfig,
    vocab_size: int,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    stage: int = 0,
) -> RankParameters:
    """Count what a rank of pipeline stage `stage` holds. Every tensor-parallel rank holds equally many."""
    tensor, pipeline = tensor_model_parallel_size, pipeline_model_parallel_size
    first, last = stage == 0, stage == pipeline - 1
    table = derived.padded_vocab_size(model, vocab_size, tensor) // tensor * model.hidden_size
    shared = model.share_embeddings_and_output_weights and first
    return RankParameters(
        layers=model.num_layers // pipeline * _rank_layer(model, tensor),
        embedding=table if first else 0,
        final_norm=model.hidden_size if last else 0,
        output_layer=table if last and not shared else 0,
        experts=model.num_layers
        // pipeline
        * ((model.num_moe_experts or 0) // expert_model_parallel_size)
        * expert_parameters(model),
    )


def _rank_layer(model: ModelConfig, tensor: int) -> int:
    """One layer on one tensor-parallel rank, without experts: linear layers and a query gate are divided, norms and a
    router are not."""
    divided = qkv_parameters(model) + _qkv_biases(model) + projection_parameters(model)
    divided += 3 * model.hidden_size * whole_ffn_width(model)
    whole, gate = _layer_norms(model) + router_parameters(model), _layer_gate(model)
    if model.gate_input == "query":
        return (divided + gate) // tensor + whole
    return divided // tensor + whole + gate


def qkv_parameters(model: ModelConfig) -> int:
    """One layer's fused Q, K and V projection, without biases."""
    return model.hidden_size * _qkv_width(model)


def projection_parameters(model: ModelConfig) -> int:
    """One layer's attention output projection."""
    return model.num_attention_heads * derived.head_dim(model) * model.hidden_size


def whole_ffn_width(model: ModelConfig) -> int:
    """Width of the FFN that every token uses: a dense model's, or a shared expert's."""
    return derived.split_ffn(model)[1]


def active_experts(model: ModelConfig) -> int:
    """Experts of a layer that a token is sent to, the shared one not counted."""
    return model.moe_router_topk if model.num_moe_experts else 0


def active_ffn_width(model: ModelConfig) -> int:
    """Width of all that one token uses of a layer's FFN."""
    return whole_ffn_width(model) + active_experts(model) * derived.expert_ffn_hidden_size(model)


def active_ffn_parameters(model: ModelConfig) -> int:
    """Weights of one layer's FFN that a token meets, a router's among them: its multiply-adds."""
    return 3 * model.hidden_size * active_ffn_width(model) + router_parameters(model)


def expert_parameters(model: ModelConfig) -> int:
    """One expert."""
    return 3 * model.hidden_size * derived.expert_ffn_hidden_size(model)


def router_parameters(model: ModelConfig) -> int:
    """One layer's router."""
    return model.hidden_size * (model.num_moe_experts or 0)


def gate_input_size(model: ModelConfig) -> int:
    """Width of what one head's gate reads: the head's query, or the layer's input."""
    return derived.head_dim(model) if model.gate_input == "query" else model.hidden_size


def _qkv_width(model: ModelConfig) -> int:
    heads_out = model.num_attention_heads + 2 * derived.num_query_groups(model)
    return heads_out * derived.head_dim(model)


def _qkv_biases(model: ModelConfig) -> int:
    return _qkv_width(model) if model.qkv_bias else 0


def _layer_norms(model: ModelConfig) -> int:
    norms = 2 * model.hidden_size  # attention's and the FFN's, on inputs or outputs
    if model.qk_layernorm:
        heads = 2
        if model.norm_placement == "post":
            heads = model.num_attention_heads + derived.num_query_groups(model)
        norms += heads * derived.head_dim(model)
    if model.ffn_output_norm:
        norms += model.hidden_size
    return norms


def _layer_gate(model: ModelConfig) -> int:
    """One weight row and one bias per head; a gate that reads the layer's input norms it first."""
    if not derived.has_gates(model):
        return 0
    gate = model.num_attention_heads * (gate_input_size(model) + 1)
    return gate + (model.hidden_size if model.gate_input == "hidden" else 0)
