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
    ffn: int  # gate, up and down projections
    norms: int  # every RMSNorm of the layers: inputs, Q and K, FFN output
    gates: int  # G-SWA: none in a model of one loop
    final_norm: int
    output_layer: int  # 0 when tied to the embedding

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def active(self) -> int:
        """Parameters that take part in one token's forward pass; a dense model uses all."""
        return self.total

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
        ffn=layers * 3 * hidden * model.ffn_hidden_size,
        norms=layers * _layer_norms(model),
        gates=layers * _layer_gate(model),
        final_norm=hidden,
        output_layer=0 if model.share_embeddings_and_output_weights else table,
    )


@dataclass(frozen=True)
class RankParameters:
    """Number of parameters that one rank of a pipeline stage holds: its slices, and whole what is not sliced."""

    layers: int
    embedding: int
    final_norm: int
    output_layer: int  # a pipeline's last stage holds a copy of a tied embedding

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def count_rank_parameters(
    model: ModelConfig,
    vocab_size: int,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
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
    )


def _rank_layer(model: ModelConfig, tensor: int) -> int:
    """One layer on one tensor-parallel rank: linear layers and a query gate are divided, norms are not."""
    divided = qkv_parameters(model) + _qkv_biases(model) + projection_parameters(model)
    divided += 3 * model.hidden_size * model.ffn_hidden_size
    whole, gate = _layer_norms(model), _layer_gate(model)
    if model.gate_input == "query":
        return (divided + gate) // tensor + whole
    return divided // tensor + whole + gate


def qkv_parameters(model: ModelConfig) -> int:
    """One layer's fused Q, K and V projection, without biases."""
    return model.hidden_size * _qkv_width(model)


def projection_parameters(model: ModelConfig) -> int:
    """One layer's attention output projection."""
    return model.num_attention_heads * derived.head_dim(model) * model.hidden_size


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
