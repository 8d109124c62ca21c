"""Converts weights, one tensor at a time, between our names and Hugging Face's. Unknown tensors are errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from plt_megatron.errors import UserError
from plt_megatron.hf.param_mapping import EXTRA_STATES, ParamMapping

Weights = Iterable[tuple[str, Tensor]]


def to_hf(weights: Weights, mappings: Sequence[ParamMapping]) -> Iterator[tuple[str, Tensor]]:
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
    """Raise `UserError` unless `shapes` (their names) are exactly the tensors of `mappings`.

    Args:
        where: start of the message.
    """
    wanted = dict(pair for mapping in mappings for pair in mapping.hf)
    for names, problem in ((wanted.keys() - shapes.keys(), "lacks"), (shapes.keys() - wanted.keys(), "has unknown")):
        if names:
            raise UserError(f"{where}: {problem} {_enumerate(sorted(names))}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise UserError(f"{where}: {name} has shape {shapes[name]}, config.json says {shape}")


def _enumerate(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{'tensors' if len(names) > 1 else 'tensor'} {', '.join(names[:shown])}{more}"
