"""Maps each tensor of a model between its name here and its names and form in Hugging Face files, from the table in
`model/parameters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.parameters import EXPERT, LAYER, Parameter, Sizes, tensors_of

# "loopcoder": the gate multiplies the global attention, whatever its side in the model.
Style = Literal["plt", "loopcoder"]
# Tensors in files that can be computed from the configuration.
DERIVED_BUFFERS = ("rotary_emb.inv_freq",)
EXTRA_STATES = ("._extra_state",)  # Transformer Engine's


@dataclass(frozen=True)
class ParamMapping:
    """One tensor of a model and its counterpart.

    Attributes:
        name, shape: our name and shape in the whole model, without the vocabulary's padding.
        hf: their names and shapes.
        parameter: its row of the table, whose `form` says how the two differ.
        negated: whether theirs is the gate of the other side, 1 - sigmoid(x) = sigmoid(-x).
    """

    name: str
    shape: tuple[int, ...]
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    parameter: Parameter
    sizes: Sizes
    negated: bool

    def to_hf(self, ours: Tensor) -> list[Tensor]:
        """Return their tensors, in the order of `hf`, as views where possible."""
        if self.parameter.form == "qkv":  # rows by query group: the group's queries, its key, its value
            queries = self.sizes.heads // self.sizes.groups
            grouped = ours.unflatten(0, (self.sizes.groups, queries + 2, self.sizes.head_dim))
            return [part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1)]
        if self.parameter.form == "gate_up":  # SwiGLU's gate rows, then its up rows
            return list(ours.chunk(2))
        return [-ours if self.negated else ours]

    def to_megatron(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return our tensor from theirs, in the order of `hf`."""
        if self.parameter.form == "qkv":
            grouped = [part.unflatten(0, (self.sizes.groups, -1, self.sizes.head_dim)) for part in theirs]
            return torch.cat(grouped, dim=1).flatten(0, 2)
        if self.parameter.form == "gate_up":
            return torch.cat(list(theirs))
        return -theirs[0] if self.negated else theirs[0]


def mappings_for(model: ModelConfig, vocab_size: int, style: Style = "plt") -> list[ParamMapping]:
    """Return the mappings of every tensor of `model`, in the order in which exports store them: layer by layer."""
    sizes = Sizes.of(model, vocab_size)
    other_side = style == "loopcoder" and model.gate_side == "local"
    mappings = []
    for per_layer, group in groupby(tensors_of(model), key=lambda parameter: parameter.per_layer):
        parameters = list(group)
        for layer in range(model.num_layers if per_layer else 1):
            for parameter in (each for each in parameters if layer in each.layers(model)):
                for expert in range(sizes.experts if parameter.per_expert else 1):
                    mappings.append(_bind(parameter, layer, expert, sizes, other_side and parameter.gate_logit))
    return mappings


def _bind(parameter: Parameter, layer: int, expert: int, sizes: Sizes, negated: bool) -> ParamMapping:
    def named(name: str) -> str:
        return name.replace(LAYER, str(layer)).replace(EXPERT, str(expert))

    shapes = map(sizes.shape, parameter.hf_dims)
    return ParamMapping(
        name=named(parameter.name),
        shape=sizes.shape(parameter.dims),
        hf=tuple(zip(map(named, parameter.hf), shapes, strict=True)),
        parameter=parameter,
        sizes=sizes,
        negated=negated,
    )
