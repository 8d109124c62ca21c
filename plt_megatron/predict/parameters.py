"""Parameter counts of a model and its layers, from the table that the model is built from (`model/parameters.py`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.parameters import Component, Parameter, Sizes, parameters_of

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


def elements(
    model: ModelConfig,
    layers: Iterable[int] | None = None,
    *components: Component,
    vocab_size: int = 0,
    experts: int | None = None,
    is_trained: Callable[[str], bool] | None = None,
) -> Iterator[tuple[Parameter, int]]:
    """Yield each parameter of the table with its number of elements in `layers`.

    Args:
        layers: each counts as often as it is listed; None: the whole model, including parameters outside layers.
        components: yield only these; none given: all.
        vocab_size: padded.
        experts: how many experts of a layer count; None: all.
        is_trained: predicate on parameter names (`model/trainable.py`): only those it accepts count; None: all.
    """
    sizes = Sizes.of(model, vocab_size)
    experts = derived.num_experts(model) if experts is None else experts
    given = None if layers is None else Counter(layers)
    for parameter in parameters_of(model):
        if components and parameter.component not in components:
            continue
        own: Sequence[int] = parameter.layers(model)
        if is_trained is not None:
            own = [layer for layer in own if is_trained(parameter.in_layer(layer))]
        if given is None:
            copies = len(own)
        elif parameter.per_layer:
            copies = sum(times for layer, times in given.items() if layer in own)
        else:
            continue
        yield parameter, copies * parameter.size(sizes) * (experts if parameter.per_expert else 1)


def count_components(
    model: ModelConfig, layers: Iterable[int] | None = None, *, vocab_size: int = 0
) -> dict[Component, int]:
    """Count the elements of each component, as `elements` does."""
    counted: dict[Component, int] = dict.fromkeys(get_args(Component), 0)
    for parameter, number in elements(model, layers, vocab_size=vocab_size):
        counted[parameter.component] += number
    return counted


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
    counted = count_components(model, vocab_size=padded)
    used = counted["experts"] // max(1, derived.num_experts(model)) * active_experts(model)
    return ParameterCount(**counted, active_experts=used)


def active_experts(model: ModelConfig) -> int:
    """Return the number of experts per layer that a token is routed to, not counting the shared expert."""
    return 0 if model.moe is None else model.moe.router_topk


def matmuls(
    model: ModelConfig,
    layers: Iterable[int],
    *components: Component,
    is_trained: Callable[[str], bool] | None = None,
) -> int:
    """Count a token's multiply-adds with the matrices of these components in `layers`, each as often as it is listed.
    `is_trained`: see `elements`."""
    counted = elements(model, layers, *components, experts=active_experts(model), is_trained=is_trained)
    return sum(number for parameter, number in counted if parameter.is_matrix)
