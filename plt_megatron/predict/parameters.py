"""Parameter counts of a model and its layers, from the table that the model is built from (`model/parameters.py`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, get_args

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.model.parameters import Component, Parameter, Sizes, parameters_of
from plt_megatron.model.trainable import selection, trains

FFN: tuple[Component, ...] = ("ffn", "router", "experts")


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters of each component, over all layers. Loops share them, so they count once."""

    embedding: int  # padded vocabulary x hidden_size
    loop_input: int  # the learned scale of h in the input of loops >= 2
    attention: int  # Q, K, V and output projections, with any biases
    ffn: int  # gate, up and down projections of a dense FFN or of a shared expert
    norms: int  # every RMSNorm of the layers: inputs, Q and K, FFN output
    gates: int  # G-SWA; 0 with a single loop
    final_norm: int
    output_layer: int  # 0 when tied to the embedding
    router: int = 0
    experts: int = 0  # gate, up and down projections of all experts
    active_experts: int = 0  # the part of `experts` that a token uses

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)) - self.active_experts

    @property
    def active(self) -> int:
        """Parameters used in one token's forward pass; all of them in a dense model."""
        return self.total - self.experts + self.active_experts

    @property
    def tables(self) -> int:
        """The embedding table and, if untied, the output layer's."""
        return self.embedding + self.output_layer

    @property
    def non_embedding(self) -> int:
        """All parameters but the embedding table and the output layer."""
        return self.total - self.tables


@dataclass(frozen=True)
class Weights:
    """A model's parameters, or a part of them, such as those that a run trains.

    Attributes:
        vocab_size: rows of the embedding, padding included.
        includes: predicate on parameter names (`model/trainable.py`); None: all are part of it.
    """

    model: ModelConfig
    vocab_size: int = 0
    includes: Callable[[str], bool] | None = None

    @classmethod
    def trained(cls, config: RunConfig, vocab_size: int = 0) -> Self:
        """Return those that a run trains."""
        return cls(config.model, vocab_size, selection(config))

    @property
    def is_whole(self) -> bool:
        """Whether all parameters are part of it."""
        return self.includes is None

    @cached_property
    def table(self) -> list[Parameter]:
        """The model's parameters, whether they are part of it or not, in the order of the table."""
        return parameters_of(self.model)

    def layers(self, parameter: Parameter) -> Sequence[int]:
        """Return the layers whose `parameter` is part of it; `[0]` for one outside the layers."""
        layers = parameter.layers(self.model)
        if self.includes is None:
            return layers
        return [layer for layer in layers if self.includes(parameter.in_layer(layer))]

    def has(self, component: Component) -> bool:
        """Return whether a parameter of this component is part of it."""
        return any(self.layers(each) for each in self.table if each.component == component)

    @property
    def has_head(self) -> bool:
        """Whether the output layer's weight, which may be the embedding's, is part of it."""
        return self.has("embedding" if self.model.share_embeddings_and_output_weights else "output_layer")

    def in_layer(self, layer: int) -> list[Parameter]:
        """Return the parameters that a layer has, whether they are part of it or not."""
        return [each for each in self.table if each.per_layer and layer in each.layers(self.model)]

    def missing_in(self, layer: int) -> frozenset[str]:
        """Return the names in the table of the layer's parameters that are not part of it."""
        if self.includes is None:
            return frozenset()
        return frozenset(each.name for each in self.in_layer(layer) if not self.includes(each.in_layer(layer)))

    def elements(
        self, layers: Iterable[int] | None = None, *components: Component, experts: int | None = None
    ) -> Iterator[tuple[Parameter, int]]:
        """Yield each parameter of the table with its number of elements in `layers`.

        Args:
            layers: each counts as often as it is listed; None: the whole model, including parameters outside layers.
            components: yield only these; none given: all.
            experts: how many experts of a layer count; None: all.
        """
        sizes = Sizes.of(self.model, self.vocab_size)
        experts = derived.num_experts(self.model) if experts is None else experts
        given = None if layers is None else Counter(layers)
        for parameter in self.table:
            if components and parameter.component not in components:
                continue
            own = self.layers(parameter)
            if given is None:
                copies = len(own)
            elif parameter.per_layer:
                copies = sum(times for layer, times in given.items() if layer in own)
            else:
                continue
            yield parameter, copies * parameter.size(sizes) * (experts if parameter.per_expert else 1)

    def by_component(self, layers: Iterable[int] | None = None) -> dict[Component, int]:
        """Count the elements of each component, as `elements` does."""
        counted: dict[Component, int] = dict.fromkeys(get_args(Component), 0)
        for parameter, number in self.elements(layers):
            counted[parameter.component] += number
        return counted

    def matmuls(self, layers: Iterable[int], *components: Component) -> int:
        """Count a token's multiply-adds with the matrices of these components in `layers`, each as often as it is
        listed."""
        counted = self.elements(layers, *components, experts=active_experts(self.model))
        return sum(number for parameter, number in counted if parameter.is_matrix)


def check_trained(config: RunConfig) -> None:
    """Raise `UserError` if a run is to train parameters that its model lacks, as a step of fewer loops may."""
    trains(config)


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
    padded = derived.padded_vocab_size(model, vocab_size, tensor_model_parallel_size)
    counted = Weights(model, padded).by_component()
    used = counted["experts"] // max(1, derived.num_experts(model)) * active_experts(model)
    return ParameterCount(**counted, active_experts=used)


def active_experts(model: ModelConfig) -> int:
    """Return the number of experts per layer that a token is routed to, not counting the shared expert."""
    return 0 if model.moe is None else model.moe.router_topk
