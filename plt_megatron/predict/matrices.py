"""Hidden matrices of an optimizer that updates them as wholes: where each is, and what an update takes.

As megatron-core's layer-wise layout has it: the matrices of a gradient bucket are given out to the data-parallel ranks,
largest first, each to the rank that has least so far, and every rank's part is padded to the fullest one's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.optimizers import optimizer_spec
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.model.parameters import Parameter, Sizes, parameters_of
from plt_megatron.predict.layout import Layout

_ALIGNMENT = 64  # elements
_FULL = 0.9  # a bucket is large enough for all ranks to hold its largest matrix, but for so much


@dataclass(frozen=True)
class RankMatrix:
    """A rank's part of a hidden matrix.

    Attributes:
        size: elements.
        split: whether tensor-parallel ranks hold a part each.
        wholes: (rows, columns) of the matrices that are orthogonalized each, over all tensor-parallel ranks.
    """

    size: int
    split: bool
    wholes: tuple[tuple[int, int], ...]

    @property
    def flops(self) -> int:
        """FLOPs of one Newton-Schulz iteration: X X^T, its square, and their product with X."""
        sides = [(min(shape), max(shape)) for shape in self.wholes]
        return sum(2 * short * short * (2 * long + short) for short, long in sides)


@dataclass(frozen=True)
class StageMatrices:
    """Those that a rank of a pipeline stage holds, and where they are updated.

    Attributes:
        ranks: what each data-parallel rank updates.
        padded: elements of a rank's part of the buffers, the same for all.
    """

    ranks: tuple[tuple[RankMatrix, ...], ...]
    padded: int

    @property
    def size(self) -> int:
        """Elements of all."""
        return sum(matrix.size for rank in self.ranks for matrix in rank)

    @property
    def padding(self) -> int:
        """Elements of the buffers that are no matrix's."""
        return len(self.ranks) * self.padded - self.size

    @property
    def most(self) -> int:
        """Elements of the rank with most."""
        return max(sum(matrix.size for matrix in rank) for rank in self.ranks)

    @property
    def flops(self) -> int:
        """FLOPs of one iteration on the busiest rank. All tensor-parallel ranks do the same."""
        return max(sum(matrix.flops for matrix in rank) for rank in self.ranks)

    def gathered(self, tensor: int) -> int:
        """Elements of the momentum that a tensor-parallel rank gathers in an update, where most are."""
        return max(sum(matrix.size * tensor for matrix in rank if matrix.split) for rank in self.ranks)


NONE = StageMatrices(((),), 0)


def stage_matrices(config: RunConfig, layout: Layout, stage: int, *, experts: bool = False) -> StageMatrices:
    """The dense matrices of a stage's rank, or its experts': none where the optimizer has no use for wholes."""
    if optimizer_spec(config.optimizer).matrix_state is None:
        return NONE
    model, ranks = config.model, layout.expert_shards if experts else layout.shards
    matrices = [
        matrix
        for layer in layout.stage_layers(model.num_layers)[stage]
        for matrix in _layer_matrices(model, layout, layer, experts=experts)
    ]
    buckets = layout.overlap_grad_reduce and stage == 0
    return given_out(matrices, ranks, derived.bucket_elements(layout.shards) if buckets else None)


def matrix_parameters(model: ModelConfig) -> int:
    """The elements of all hidden matrices of a model."""
    sizes = Sizes.of(model, 0)
    copies = {False: 1, True: derived.num_experts(model)}
    own = (each for each in parameters_of(model) if each.is_hidden_matrix)
    return sum(len(each.layers(model)) * each.size(sizes) * copies[each.per_expert] for each in own)


def _layer_matrices(model: ModelConfig, layout: ParallelLayout, layer: int, *, experts: bool) -> list[RankMatrix]:
    sizes = Sizes.of(model, 0)
    copies = derived.num_experts(model) // layout.expert if experts else 1
    matrices = [each for each in parameters_of(model) if each.is_hidden_matrix and layer in each.layers(model)]
    own = [each for each in matrices if each.per_expert == experts]
    return [_rank_matrix(parameter, sizes, layout.tensor) for _ in range(copies) for parameter in own]


def _rank_matrix(parameter: Parameter, sizes: Sizes, tensor: int) -> RankMatrix:
    split = parameter.split is not None and tensor > 1
    wholes = tuple((rows, columns) for rows, columns in map(sizes.shape, parameter.hf_dims))
    return RankMatrix(parameter.size(sizes) // (tensor if split else 1), split, wholes)


def given_out(matrices: Sequence[RankMatrix], ranks: int, bucket: int | None) -> StageMatrices:
    """Who updates which of the matrices, in the model's order. `bucket`: elements of one; None: there is one."""
    shares: list[list[RankMatrix]] = [[] for _ in range(ranks)]
    padded = 0
    chunk: list[RankMatrix] = []
    for matrix in reversed(matrices):
        chunk.append(matrix)
        largest = max(each.size for each in chunk)
        if bucket is not None and sum(each.size for each in chunk) >= max(bucket, int(ranks * largest * _FULL)):
            padded += _give_out(chunk, shares)
            chunk = []
    padded += _give_out(chunk, shares)
    return StageMatrices(tuple(map(tuple, shares)), padded)


def _give_out(chunk: Sequence[RankMatrix], shares: list[list[RankMatrix]]) -> int:
    """Add a bucket's matrices to the shares; the elements of a rank's part of it."""
    ends = [0] * len(shares)
    for matrix in sorted(chunk, key=lambda each: -each.size):
        rank = min(range(len(shares)), key=lambda each: ends[each])
        shares[rank].append(matrix)
        ends[rank] = _padded(ends[rank], _ALIGNMENT) + matrix.size
    return _padded(max(ends), math.lcm(_ALIGNMENT, math.lcm(len(shares), 128) // len(shares)))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
