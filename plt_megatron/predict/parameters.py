"""Parameters of a model by component: exactly those of the model that `plt_megatron.model` builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import get_args

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.parameters import Component, Parameter, Sizes, parameters_of


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of each component, over all layers. Loops share them, so they count once."""

    embedding: int  # padded vocabulary x hidden_size
    loop_input: int  # the learned scale of h in the input of loops >= 2
    attention: int  # Q, K, V and output projections, with any biases
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
    sizes = Sizes.of(model, derived.padded_vocab_size(model, vocab_size, tensor_model_parallel_size))
    counted = dict.fromkeys(get_args(Component), 0)
    for parameter in parameters_of(model):
        counted[parameter.component] += parameter.size(sizes) * _copies(parameter, model)
    used = counted["experts"] // max(1, derived.num_experts(model)) * active_experts(model)
    return ParameterCount(**counted, active_experts=used)


def _copies(parameter: Parameter, model: ModelConfig) -> int:
    """How many of one line of the table there are: layers, experts."""
    return len(parameter.layers(model)) * _copies_in_layer(parameter, model)


def _copies_in_layer(parameter: Parameter, model: ModelConfig) -> int:
    return derived.num_experts(model) if parameter.per_expert else 1


@dataclass(frozen=True)
class RankParameters:
    """Number of parameters that one rank of a pipeline stage holds: slices of split tensors, all others whole."""

    layers: int  # without experts
    embedding: int  # and the loops' input, beside it
    final_norm: int
    output_layer: int  # a pipeline's last stage holds a copy of a tied embedding
    experts: int = 0  # this rank's, all layers

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def dense(self) -> int:
        """All but experts, which are distributed over other ranks."""
        return self.total - self.experts


def count_rank_parameters(
    model: ModelConfig, vocab_size: int, layout: ParallelLayout, stage: int = 0
) -> RankParameters:
    """Count what a rank of pipeline stage `stage` holds. Every tensor-parallel rank holds equally many."""
    tensor = layout.tensor
    first, last = stage == 0, stage == layout.pipeline - 1
    table = derived.padded_vocab_size(model, vocab_size, tensor) // tensor * model.hidden_size
    shared = model.share_embeddings_and_output_weights and first
    split, whole, expert = _in_layers(model, layout.stage_layers(model.num_layers)[stage])
    experts = derived.num_experts(model) // layout.expert
    return RankParameters(
        layers=split // tensor + whole,
        embedding=table + _loop_input(model) if first else 0,
        final_norm=model.hidden_size if last else 0,
        output_layer=table if last and not shared else 0,
        experts=experts * expert,
    )


def _loop_input(model: ModelConfig) -> int:
    sizes = Sizes.of(model, 0)
    return sum(parameter.size(sizes) for parameter in parameters_of(model) if parameter.component == "loop_input")


def _in_layers(model: ModelConfig, layers: range) -> tuple[int, int, int]:
    """Parameters of these layers: (split over tensor-parallel ranks, whole on each, those of one expert a layer)."""
    sizes = Sizes.of(model, 0)
    split = whole = expert = 0
    for parameter in (each for each in parameters_of(model) if each.per_layer):
        own = parameter.size(sizes) * len(set(layers).intersection(parameter.layers(model)))
        if parameter.per_expert:
            expert += own
        elif parameter.split:
            split += own
        else:
            whole += own
    return split, whole, expert


def undivided_parameters(model: ModelConfig, layers: range) -> int:
    """Parameters of these layers that every tensor-parallel rank holds whole, experts not counted."""
    return _in_layers(model, layers)[1]


def active_experts(model: ModelConfig) -> int:
    """Experts of a layer that a token is sent to, the shared one not counted."""
    return 0 if model.moe is None else model.moe.router_topk


def layer_matmuls(model: ModelConfig, *components: Component) -> int:
    """Weights of one layer's components that one token is multiplied with in one loop: its multiply-adds. Components
    that all layers have, or all that loop."""
    return sum(_multiplied(model, components).values())


def matmuls_in_layers(model: ModelConfig, layers: Iterable[int], *components: Component) -> int:
    """The same of these layers, each counted as often as it is given."""
    counted, layers = _multiplied(model, components), list(layers)
    return sum(size * _occurrences(parameter, model, layers) for parameter, size in counted.items())


def ffn_matmuls(model: ModelConfig, layers: Iterable[int]) -> int:
    """The same of their FFNs, with what a token uses of experts."""
    return matmuls_in_layers(model, layers, "ffn", "router", "experts")


def _multiplied(model: ModelConfig, components: Collection[Component]) -> dict[Parameter, int]:
    sizes = Sizes.of(model, 0)
    return {
        parameter: parameter.size(sizes) * (active_experts(model) if parameter.per_expert else 1)
        for parameter in parameters_of(model)
        if parameter.is_matrix and parameter.component in components
    }


def _occurrences(parameter: Parameter, model: ModelConfig, layers: list[int]) -> int:
    """How many of these layers have the parameter, each counted as often as it is given."""
    owners = parameter.layers(model)
    return sum(layer in owners for layer in layers)


def count_layers(model: ModelConfig, layers: Iterable[int]) -> dict[Component, int]:
    """Parameters of these layers, by component."""
    sizes, counted, layers = Sizes.of(model, 0), dict.fromkeys(get_args(Component), 0), list(layers)
    for parameter in (each for each in parameters_of(model) if each.per_layer):
        copies = _occurrences(parameter, model, layers)
        counted[parameter.component] += copies * parameter.size(sizes) * _copies_in_layer(parameter, model)
    return counted
