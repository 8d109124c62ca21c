"""The time of an optimizer step, from a card's rates and the achievable shares of them.

    step = (matrix products + attention + memory-bound operations + exposed tensor-parallel traffic) * (1 + bubble)
           + exposed gradient and weight traffic + the optimizer

docs/estimates.md explains the shares, and how far to trust the figure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.predict.activations import Activations
from plt_megatron.predict.flops import Flops
from plt_megatron.predict.gpu_specs import GPUSpec
from plt_megatron.predict.layout import Layout
from plt_megatron.predict.matrices import stage_matrices
from plt_megatron.predict.parameters import RankParameters, ffn_matmuls
from plt_megatron.predict.schedule import bubble_fraction

# Reads and writes of the optimizer per parameter it owns: gradient, main weight and two moments in, the last three
# and the weight out, and the norm's pass over the gradient.
OPTIMIZER_BYTES_PER_PARAMETER = 4 * 4 + 3 * 4 + 2 + 4
# Memory-bound operations move each saved activation about this often: written and read forward, read backward, and its
# gradient written and read.
PASSES_OVER_ACTIVATIONS = 5
# Of what matrix products reach of the BF16 peak, in terms of FP8's: casts and scales cost more next to them.
FP8_EFFICIENCY = 0.75
# Bytes/s of one device's share of its host, for what is offloaded: PCIe as it is achieved, and the host's memory, which
# a node's devices share.
HOST_LINK = 25e9
HOST_MEMORY = 25e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank, by what they are spent on."""

    matmul: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    recompute: float = 0.0
    tensor_parallel: float = 0.0  # and the experts' exchange of tokens
    bubble: float = 0.0
    other_communication: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def times(self, factor: float) -> StepTime:
        return StepTime(*(factor * part for part in dataclasses.astuple(self)))

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def step_time(
    config: RunConfig,
    layout: Layout,
    shapes: Activations,
    card: GPUSpec,
    training_flops: Flops,
    traffic: dict[str, float],
    parameters: RankParameters,
    gpus_per_node: int,
    stage: int = 0,
) -> StepTime:
    """Estimate a step. `training_flops`: model FLOPs per token; `traffic`: of `communication_bytes`; `parameters`: of
    the stage with most, which is `stage`."""
    peak = card.flops_per_second(config.training.precision)
    tokens = layout.microbatches * layout.micro_batch_size * config.data.sequence_length / layout.context
    share = tokens / layout.tensor  # of one rank
    slowest = slowest_stage(layout, config.model, training_flops)
    own = stage_flops(layout, config.model, training_flops, slowest)
    attention_flops = own.global_attention + own.local_attention
    matmul = share * _matmul_seconds(config, card, own)
    attention = share * attention_flops / (peak * card.attention_efficiency)
    memory_bound = _memory_bound(config, layout, shapes, card, slowest)
    recompute = _recompute(config, layout, matmul, attention, memory_bound, own, slowest)
    tensor_parallel = traffic.get("tensor parallel", 0.0) / _bandwidth(card, layout.tensor, gpus_per_node)
    context_spread = layout.tensor * layout.context
    ring = traffic.get("context parallel", 0.0) / _bandwidth(card, context_spread, gpus_per_node)
    tensor_parallel += max(0.0, ring - attention)  # the ring overlaps with the attention
    tensor_parallel += traffic.get("expert parallel", 0.0) / _bandwidth(card, layout.expert, gpus_per_node)
    work = matmul + attention + memory_bound + recompute + tensor_parallel
    bubble = work * bubble_fraction(layout.pipeline, config.model.loop_count, layout.microbatches)
    return StepTime(
        matmul=matmul,
        attention=attention,
        memory_bound=memory_bound,
        recompute=recompute,
        tensor_parallel=tensor_parallel,
        bubble=bubble,
        other_communication=_other_communication(layout, card, traffic, work, gpus_per_node),
        optimizer=_optimizer(layout, card, parameters)
        + _matrix_updates(config, layout, card, stage)
        + traffic.get("matrix updates", 0.0) / _bandwidth(card, layout.tensor, gpus_per_node),
    )


def stage_flops(layout: ParallelLayout, model: ModelConfig, flops: Flops, stage: int) -> Flops:
    """What a pipeline stage has of a token's FLOPs: those of its layers and, the last, the output layer's."""
    layers = layout.stage_layers(model.num_layers)[stage]
    own = flops.times(len(layers) / model.num_layers)
    ffn = flops.ffn * ffn_matmuls(model, layers) / ffn_matmuls(model, range(model.num_layers))
    return dataclasses.replace(own, ffn=ffn, output=flops.output if stage == layout.pipeline - 1 else 0.0)


def slowest_stage(layout: ParallelLayout, model: ModelConfig, flops: Flops) -> int:
    """The stage with most FLOPs, at whose pace a pipeline runs."""
    return max(range(layout.pipeline), key=lambda stage: stage_flops(layout, model, flops, stage).total)


def _matmul_seconds(config: RunConfig, card: GPUSpec, flops: Flops) -> float:
    """Seconds of matrix products per token. Layers' linear parts may run in FP8, which reaches less of its peak."""
    peak = card.flops_per_second(config.training.precision) * card.matmul_efficiency
    linear = flops.projections + flops.ffn
    seconds = (flops.total - flops.global_attention - flops.local_attention) / peak
    if config.training.fp8 is None:
        return seconds
    fp8_peak = card.flops_per_second(config.training.precision, fp8=True) * card.matmul_efficiency * FP8_EFFICIENCY
    return seconds - linear / peak + linear / fp8_peak


def _memory_bound(config: RunConfig, layout: Layout, shapes: Activations, card: GPUSpec, stage: int) -> float:
    shapes = dataclasses.replace(shapes, recomputed=())  # activations that are not kept are moved too
    model, own = config.model, layout.stage_layers(config.model.num_layers)[stage]
    looped = derived.looped_among(model, own)
    saved: float = len(looped) * shapes.first_loop_kv()
    for loop in range(1, model.loop_count + 1):
        kinds = shapes.by_kind(model, own if loop == 1 else looped)
        saved += sum(count * kind.layer(loop) for kind, count in kinds)
    heads = len(derived.loops_with_loss(config, config.model.loop_count)) if stage == layout.pipeline - 1 else 0
    saved += heads * (shapes.softmax() + shapes.head_backward())
    moved = PASSES_OVER_ACTIVATIONS * saved * layout.microbatches
    return moved / (card.memory_bandwidth * card.memory_efficiency)


def _recompute(
    config: RunConfig, layout: Layout, matmul: float, attention: float, memory_bound: float, flops: Flops, stage: int
) -> float:
    """Another forward pass, a third of a step, over the recomputed part."""
    if layout.recompute == "none":
        return 0.0
    if layout.recompute == "selective":
        parts = attention if "core_attn" in layout.recompute_modules else 0.0
        if "mlp" in layout.recompute_modules:
            model, layers = config.model, layout.stage_layers(config.model.num_layers)[stage]
            dense = [layer for layer in layers if layer in derived.dense_layers(model)]
            share = ffn_matmuls(model, dense) / (ffn_matmuls(model, layers) or 1)
            parts += matmul * flops.ffn / flops.total * share
        return parts / 3
    looped = flops.looped / flops.total
    return (matmul * looped + attention) / 3 + memory_bound * looped * 2 / PASSES_OVER_ACTIVATIONS


def _bandwidth(card: GPUSpec, ranks: int, gpus_per_node: int) -> float:
    """Bandwidth of a collective over neighboring ranks: the network's once they do not fit on a node."""
    link = card.link_bandwidth if ranks <= gpus_per_node else card.network_bandwidth
    return link * card.link_efficiency


def _other_communication(
    layout: Layout, card: GPUSpec, traffic: dict[str, float], work: float, gpus_per_node: int
) -> float:
    """Data-parallel and pipeline traffic that does not overlap with computation.

    With overlapped reduction all but the last microbatch's backward pass is over when it starts: two thirds of one
    microbatch hide it, and the forward third of one hides overlapped gathering. Pipeline messages are sent while the
    next pass computes; the first of each is waited for.
    """
    spread = layout.world_size if layout.shards > 1 else 1
    bandwidth = _bandwidth(card, spread, gpus_per_node)
    reduction = traffic.get("gradient reduction", 0.0) / bandwidth
    if layout.overlap_grad_reduce:
        reduction = max(reduction * 0.05, reduction - work / layout.microbatches * 2 / 3)
    gathering = traffic.get("weight gathering", 0.0) / bandwidth
    if layout.overlap_param_gather:
        gathering = max(gathering * 0.05, gathering - work / layout.microbatches / 3)
    pipeline = traffic.get("pipeline", 0.0) / _bandwidth(card, layout.tensor * layout.pipeline, gpus_per_node)
    tied = traffic.get("tied embeddings", 0.0) / _bandwidth(card, layout.tensor * layout.pipeline, gpus_per_node)
    offloading = traffic.get("host transfers", 0.0) / HOST_LINK
    return reduction + gathering + offloading + max(pipeline / layout.microbatches, pipeline - 0.8 * work) + tied


def _optimizer(layout: Layout, card: GPUSpec, parameters: RankParameters) -> float:
    owned = parameters.dense / (layout.shards if layout.zero_stage >= 1 else 1)
    owned += parameters.experts / layout.expert_shards
    offloaded = layout.offload_optimizer and not layout.on_cpu
    bandwidth = HOST_MEMORY if offloaded else card.memory_bandwidth * card.memory_efficiency
    return OPTIMIZER_BYTES_PER_PARAMETER * owned / bandwidth


def _matrix_updates(config: RunConfig, layout: Layout, card: GPUSpec, stage: int) -> float:
    """Newton-Schulz iterations, on the rank with most. `_optimizer` counts all else, with a moment too many."""
    peak = card.flops_per_second(config.training.precision) * card.matmul_efficiency
    flops = sum(stage_matrices(config, layout, stage, experts=which).flops for which in (False, True))
    return config.optimizer.muon_num_ns_steps * flops / peak
