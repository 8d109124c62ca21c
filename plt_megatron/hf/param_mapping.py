"""Maps each tensor of a model between its name here and its names and form in Hugging Face files, from the table in
`model/parameters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from torch import Tensor

from plt_megatron.config.schema import ModelConfig
from plt_megatron.hf.tensor_mapping import MAPPINGS, NegatedMapping, TensorMapping
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
        parameter: its row of the table.
    """

    name: str
    shape: tuple[int, ...]
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    parameter: Parameter
    form: TensorMapping
    sizes: Sizes

    def to_hf(self, ours: Tensor) -> list[Tensor]:
        """Return their tensors, in the order of `hf`, as views where possible."""
        return self.form.to_hf(ours, self.sizes)

    def to_megatron(self, theirs: Sequence[Tensor]) -> Tensor:
        """Return our tensor from theirs, in the order of `hf`."""
        return self.form.to_megatron(theirs, self.sizes)

    def shard(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return the part of our tensor that one of `size` tensor-parallel ranks holds."""
        return self.parameter.part_of_rank(whole, rank, size)


def mappings_for(model: ModelConfig, vocab_size: int, style: Style = "plt") -> list[ParamMapping]:
    """Return the mappings of every tensor of `model`, in the order in which exports store them: layer by layer."""
    sizes = Sizes.of(model, vocab_size)
    mappings = []
    for per_layer, group in groupby(tensors_of(model), key=lambda parameter: parameter.per_layer):
        parameters = list(group)
        for layer in range(model.num_layers if per_layer else 1):
            for parameter in (each for each in parameters if layer in each.layers(model)):
                for expert in range(sizes.experts if parameter.per_expert else 1):
                    mappings.append(_bind(parameter, layer, expert, sizes, _form(parameter, model, style)))
    return mappings


def _form(parameter: Parameter, model: ModelConfig, style: Style) -> TensorMapping:
    if parameter.gate_logit and style == "loopcoder" and model.gate_side == "local":
        return NegatedMapping()
    return MAPPINGS[parameter.form]


def _bind(parameter: Parameter, layer: int, expert: int, sizes: Sizes, form: TensorMapping) -> ParamMapping:
    def named(name: str) -> str:
        return name.replace(LAYER, str(layer)).replace(EXPERT, str(expert))

    shapes = map(sizes.shape, parameter.hf_dims)
    return ParamMapping(
        name=named(parameter.name),
        shape=sizes.shape(parameter.dims),
        hf=tuple(zip(map(named, parameter.hf), shapes, strict=True)),
        parameter=parameter,
        form=form,
        sizes=sizes,
    )
