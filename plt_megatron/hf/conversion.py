"""Convert weights, one tensor at a time, between our names and Hugging Face's. Unknown tensors are errors.

`ParamMapping` maps a tensor between its name here and its names and form in Hugging Face files, from the table in
`model/parameters.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from plt_megatron.model.parameters import EXPERT, LAYER, Parameter, Sizes, tensors_of
from plt_megatron.run_folder.text import first_few

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


def to_hf(weights: Iterable[tuple[str, Tensor]], mappings: Sequence[ParamMapping]) -> Iterator[tuple[str, Tensor]]:
    """Yield (their name, tensor) for everything in `weights`, which has (our name, whole tensor) in any order.

    Raises:
        UserError: at the end of `weights` at the latest, if a tensor is missing, unknown, given twice or has another
            shape than the configuration says.
    """
    left = {mapping.name: mapping for mapping in mappings}
    known = set(left)
    for name, tensor in weights:
        if name.endswith(EXTRA_STATES):
            continue
        if name not in left:
            problem = "appears twice" if name in known else "has no place in an export of this configuration"
            raise UserError(f"the weights' tensor {name} {problem}")
        mapping = left.pop(name)
        if tuple(tensor.shape) != mapping.shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, the configuration says {mapping.shape}")
        for (hf_name, shape), part in zip(mapping.hf, mapping.to_hf(tensor), strict=True):
            assert tuple(part.shape) == shape, (hf_name, part.shape, shape)
            yield hf_name, part
    if left:
        raise UserError(f"the weights lack {_enumerate(left)}")


def to_megatron(read: Callable[[str], Tensor], mappings: Sequence[ParamMapping]) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, whole tensor) for every mapping, from tensors that `read` returns by their name."""
    for mapping in mappings:
        yield mapping.name, mapping.to_megatron([read(name) for name, _ in mapping.hf])


def check_tensors(shapes: dict[str, tuple[int, ...]], mappings: Sequence[ParamMapping], where: str) -> None:
    """Raise `UserError`, which begins with `where`, unless `shapes` are those of the tensors of `mappings`, by name."""
    wanted = dict(pair for mapping in mappings for pair in mapping.hf)
    for names, problem in ((wanted.keys() - shapes.keys(), "lacks"), (shapes.keys() - wanted.keys(), "has unknown")):
        if names:
            raise UserError(f"{where}: {problem} {_enumerate(sorted(names))}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise UserError(f"{where}: {name} has shape {shapes[name]}, config.json says {shape}")


def _enumerate(names: Iterable[str]) -> str:
    names = list(names)
    return f"{'tensors' if len(names) > 1 else 'tensor'} {first_few(names, 3)}"
