"""Parameters that a rank of a pipeline stage holds, and which rank updates the matrices that an optimizer needs whole.

Such an optimizer uses megatron-core's layer-wise layout: the hidden matrices of a gradient bucket are assigned to the
data-parallel ranks, largest first, each to the rank with the fewest elements so far, and every rank's part is padded to
the size of the fullest one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.rules.optimizer import optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.model.parameters import Component, Parameter, Sizes
from plt_megatron.predict.layout import Layout
from plt_megatron.predict.parameters import Weights

_ALIGNMENT = 64  # elements
_ENDS: tuple[Component, ...] = ("embedding", "loop_input", "final_norm", "output_layer")  # outside the layers
_FULL = 0.9  # a bucket may close at this share of ranks x its largest matrix


@dataclass(frozen=True)
class RankParameters:
    """Number of parameters that one rank of a pipeline stage holds: slices of split tensors, all others whole."""

    layers: int  # without experts
    embedding: int  # includes the loop input
    final_norm: int
    output_layer: int  # a pipeline's last stage holds a copy of a tied embedding
    experts: int = 0  # this rank's experts in all layers

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def dense(self) -> int:
        """Everything but experts, which are distributed over a different set of ranks."""
        return self.total - self.experts


def count_rank_parameters(weights: Weights, layout: ParallelLayout, stage: int = 0) -> RankParameters:
    """Count which of these weights a rank of pipeline stage `stage` holds. All tensor-parallel ranks hold equally
    many."""
    model, first, last = weights.model, stage == 0, stage == layout.pipeline - 1
    ends = Counter(
        {
            parameter.component: number // (layout.tensor if parameter.split else 1)
            for parameter, number in weights.elements(None, *_ENDS)
        }
    )
    if model.share_embeddings_and_output_weights and not first:
        ends["output_layer"] = ends["embedding"]  # its copy
    in_layers: Counter[str] = Counter()
    for parameter, number in weights.elements(layout.stage_layers(model.num_layers)[stage], experts=1):
        in_layers["expert" if parameter.per_expert else "split" if parameter.split else "whole"] += number
    return RankParameters(
        layers=in_layers["split"] // layout.tensor + in_layers["whole"],
        embedding=ends["embedding"] + ends["loop_input"] if first else 0,
        final_norm=ends["final_norm"] if last else 0,
        output_layer=ends["output_layer"] if last else 0,
        experts=derived.num_experts(model) // layout.expert * in_layers["expert"],
    )


@dataclass(frozen=True)
class RankMatrix:
    """A rank's part of a hidden matrix.

    Attributes:
        size: elements.
        split: whether it is split over tensor-parallel ranks.
        wholes: (rows, columns) of each separately orthogonalized matrix, complete over all tensor-parallel ranks.
        interleaved: whether rows of one such matrix are between those of others, so that each is copied first.
    """

    size: int
    split: bool
    wholes: tuple[tuple[int, int], ...]
    interleaved: bool = False

    @property
    def gathered(self) -> int:
        """Momentum elements that tensor-parallel ranks gather in an update."""
        return sum(rows * columns for rows, columns in self.wholes) if self.split else 0

    @property
    def flops(self) -> int:
        """FLOPs of one Newton-Schulz iteration: X X^T, its square, and their product with X."""
        sides = [(min(shape), max(shape)) for shape in self.wholes]
        return sum(2 * short * short * (2 * long + short) for short, long in sides)


@dataclass(frozen=True)
class Held:
    """A rank's parameters that one group of data-parallel ranks shares: the dense ones, or the experts.

    Attributes:
        size: elements.
        shards: ranks in that group.
        matrices: the matrices that each of these ranks updates whole; everything else is divided evenly.
        padded: elements in one rank's part of the matrices' buffers, padding included; equal on all ranks.
        frozen: elements that are not trained: each rank holds them whole, without gradients or optimizer state.
    """

    size: int
    shards: int
    matrices: tuple[tuple[RankMatrix, ...], ...] = ((),)
    padded: int = 0
    frozen: int = 0

    @property
    def in_matrices(self) -> int:
        return sum(matrix.size for rank in self.matrices for matrix in rank)

    @property
    def divided(self) -> int:
        """Trained elements outside matrices, which these ranks divide evenly if they divide any."""
        return self.size - self.in_matrices - self.frozen

    @property
    def part(self) -> int:
        """A rank's share of `divided`."""
        return self.divided // self.shards

    @property
    def reduced(self) -> float:
        """Elements that a rank sends to reduce gradients, or to gather weights, once; includes padding."""
        return (self.shards - 1) / self.shards * (self.divided + self.shards * self.padded)

    def busiest(self, measure: Callable[[RankMatrix], int]) -> int:
        """Return the largest sum of `measure` over one rank's matrices; equal on all tensor-parallel ranks."""
        return max(sum(map(measure, rank)) for rank in self.matrices)

    @property
    def most(self) -> int:
        """Matrix elements on the rank that has the most."""
        return self.busiest(lambda matrix: matrix.size)


@dataclass(frozen=True)
class Stage:
    """Parameters that a rank of a pipeline stage holds.

    Attributes:
        index: the stage, from 0.
        layers: indices in the whole model.
        parameters: counts by component.
        trained: counts of the trained parameters.
        dense, experts: the same parameters by the group of data-parallel ranks that shares them.
    """

    index: int
    layers: range
    parameters: RankParameters
    trained: RankParameters
    dense: Held
    experts: Held

    @property
    def held(self) -> tuple[Held, Held]:
        return self.dense, self.experts


def stages_of(config: RunConfig, layout: Layout, vocab_size: int) -> list[Stage]:
    """Count the parameters that a rank of each pipeline stage holds."""
    padded = derived.padded_vocab_size(config.model, vocab_size, layout.tensor)
    whole, trained = Weights(config.model, padded), Weights.trained(config, padded)
    found = []
    for index, layers in enumerate(layout.stage_layers(config.model.num_layers)):
        counted = count_rank_parameters(whole, layout, index)
        learned = counted if trained.is_whole else count_rank_parameters(trained, layout, index)
        dense = Held(counted.dense, layout.shards, frozen=counted.dense - learned.dense)
        experts = Held(counted.experts, layout.expert_shards, frozen=counted.experts - learned.experts)
        if optimizer_spec(config.optimizer).matrix_state is not None:
            bucket = derived.bucket_elements(layout.shards) if layout.overlap_grad_reduce and index == 0 else None
            # Experts that are divided among no ranks are in the buffers of the others.
            both = layout.expert == layout.tensor == 1
            if both:
                dense = Held(counted.total, layout.shards, frozen=counted.total - learned.total)
                experts = Held(0, layout.expert_shards)
            dense = _with_matrices(dense, _matrices(trained, layout, layers, {False, both}), bucket)
            experts = _with_matrices(experts, [] if both else _matrices(trained, layout, layers, {True}), bucket)
        found.append(Stage(index, layers, counted, learned, dense, experts))
    return found


def _with_matrices(held: Held, matrices: Sequence[RankMatrix], bucket: int | None) -> Held:
    shares, padded = given_out(matrices, held.shards, bucket)
    return dataclasses.replace(held, matrices=shares, padded=padded)


def _matrices(trained: Weights, layout: Layout, layers: range, per_expert: set[bool]) -> list[RankMatrix]:
    """List the hidden matrices of these layers that a rank trains, dense or its experts' or both, in the model's
    order."""
    sizes, copies = Sizes.of(trained.model, 0), derived.num_experts(trained.model) // layout.expert
    hidden = [each for each in trained.table if each.is_hidden_matrix and each.per_expert in per_expert]
    having = [(each.per_expert, _rank_matrix(each, sizes, layout.tensor), trained.layers(each)) for each in hidden]
    found: list[RankMatrix] = []
    for layer in layers:
        for is_expert, group in itertools.groupby(having, key=lambda each: each[0]):
            found += (copies if is_expert else 1) * [matrix for _, matrix, owners in group if layer in owners]
    return found


def _rank_matrix(parameter: Parameter, sizes: Sizes, tensor: int) -> RankMatrix:
    split = parameter.split is not None and tensor > 1
    wholes = tuple((rows, columns) for rows, columns in map(sizes.shape, parameter.hf_dims))
    interleaved = parameter.form == "qkv" and sizes.groups > (tensor if split else 1)
    return RankMatrix(parameter.size(sizes) // (tensor if split else 1), split, wholes, interleaved)


def given_out(
    matrices: Sequence[RankMatrix], ranks: int, bucket: int | None
) -> tuple[tuple[tuple[RankMatrix, ...], ...], int]:
    """Assign matrices, in the model's order, to ranks: return each rank's matrices, and the elements in one rank's part
    of the buffers. `bucket`: minimum elements of a bucket; None: a single bucket."""
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
    return tuple(map(tuple, shares)), padded


def _give_out(chunk: Sequence[RankMatrix], shares: list[list[RankMatrix]]) -> int:
    """Add a bucket's matrices to the shares and return the elements in one rank's part of the bucket."""
    ends = [0] * len(shares)
    for matrix in sorted(chunk, key=lambda each: -each.size):
        rank = min(range(len(shares)), key=lambda each: ends[each])
        shares[rank].append(matrix)
        ends[rank] = _padded(ends[rank], _ALIGNMENT) + matrix.size
    return _padded(max(ends), math.lcm(_ALIGNMENT, math.lcm(len(shares), 128) // len(shares)))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def share_in_fp8(config: RunConfig, layers: Sequence[int]) -> float:
    """Return the share of these layers whose linear layers run in FP8."""
    fp8, last = config.training.fp8, config.model.num_layers
    assert fp8 is not None, "the caller asks"
    if fp8.num_layers_at_start_in_bf16 == fp8.num_layers_at_end_in_bf16 == 0:
        return 1.0
    if not layers:
        return 0.0
    in_fp8 = range(fp8.num_layers_at_start_in_bf16, last - fp8.num_layers_at_end_in_bf16)
    return sum(layer in in_fp8 for layer in layers) / len(layers)
