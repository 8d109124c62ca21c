"""Whether ranks agree on what several of them hold, of which a checkpoint has one.

That is what each tensor-parallel rank has whole, and a tied embedding, which a pipeline's first and last stage have.
Data-parallel ranks get their weights from one another in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from plt_megatron.model.parameters import Parameter, find_in_any
from plt_megatron.train.checkpoint.collective import first_of_all_ranks
from plt_megatron.train.checkpoint.state import sharded_tensors
from plt_megatron.train.engine import Engine

Place = tuple[str, tuple[int, ...]]  # a tensor's key, and where it begins in the whole one
_AT_ONCE = 1 << 22  # elements that are read as integers, 8 bytes each
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by an element's bytes


def difference(engine: Engine, saved: dict[str, Any]) -> str | None:
    """Which ranks hold different copies of which tensor, in one line; None: none do. Collective.

    Args:
        saved: what the engine is about to save: the sharded tensors of `model` and `optimizer`.
    """
    groups, tied = engine.groups, engine.config.model.share_embeddings_and_output_weights
    if groups.tp.size() == groups.pp.size() == 1:
        return None
    state, found = {name: saved[name] for name in ("model", "optimizer")}, None
    # Groups that training uses too. Stages between the first and the last are in none of the embedding's.
    for group, is_held in ((groups.tp, _is_whole), (groups.embd if tied else None, _is_in_two_stages)):
        if group is not None and group.size() > 1:
            found = _difference(dict(_checksums(state, is_held)), group) or found
    return first_of_all_ranks(found)


def _is_whole(parameter: Parameter) -> bool:
    """On each tensor-parallel rank. Experts are some ranks' own, which are each other's data-parallel ranks."""
    return parameter.split is None and not parameter.per_expert


def _is_in_two_stages(parameter: Parameter) -> bool:
    return parameter.component == "embedding"


def _checksums(state: dict[str, Any], is_held: Callable[[Parameter], bool]) -> Iterator[tuple[Place, int]]:
    """Checksums of these parameters' entries in the state."""
    held: list[ShardedTensor] = [tensor for tensor in sharded_tensors(state) if is_held(find_in_any(tensor.key))]
    if held:
        sums = torch.stack([_checksum(tensor.data) for tensor in held]).tolist()
        yield from zip(((tensor.key, tuple(tensor.global_offset)) for tensor in held), sums, strict=True)


def _checksum(tensor: Tensor) -> Tensor:
    """int64: the sum of its bits, taken for integers. Any single change changes it."""
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_AT_ONCE)]).sum()


def _difference(own: dict[Place, int], group: dist.ProcessGroup) -> str | None:
    everyones: list[dict[Place, int]] = [{}] * group.size()
    dist.all_gather_object(everyones, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    for number, checksums in enumerate(everyones):
        for place in sorted(checksums.keys() & everyones[0].keys()):
            if checksums[place] != everyones[0][place]:
                return f"ranks {ranks[0]} and {ranks[number]} hold different copies of {place[0]}"
    return None
