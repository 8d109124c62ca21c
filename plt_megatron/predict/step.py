"""One optimizer step of a run as its ranks see it: the input of the memory, traffic and time estimates, and its time.

    step = (matrix products + attention + memory-bound operations + recomputation + exposed tensor-parallel traffic)
           * (1 + bubble) + exposed gradient, weight and pipeline traffic + the optimizer

docs/estimates.md explains the shares and how far to trust the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.activations import Activations
from plt_megatron.predict.cards import GPUSpec
from plt_megatron.predict.flops import Flops, Parts, step_flops_per_token
from plt_megatron.predict.held import Stage, share_in_fp8, stages_of
from plt_megatron.predict.layout import Layout, bubble_fraction
from plt_megatron.predict.parameters import FFN, Weights


@dataclass(frozen=True)
class Step:
    """An optimizer step with a certain number of loops, microbatches and tokens per row.

    Attributes:
        config: the run's configuration, with this step's loops and row length.
        layout: the run's layout, with this step's microbatches.
        vocab_size: the tokenizer's.
        stages: parameters that the ranks hold; the step may not use all of them.
    """

    config: RunConfig
    layout: Layout
    vocab_size: int
    stages: Sequence[Stage]

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, vocab_size: int) -> Self:
        """Describe a step of the configuration as it stands, with all loops."""
        return cls(config, layout, vocab_size, stages_of(config, layout, vocab_size))

    @cached_property
    def shapes(self) -> Activations:
        """Sizes of a microbatch on one rank."""
        return Activations.of(self.config, self.layout, self.vocab_size)

    @cached_property
    def largest(self) -> Stage:
        """The stage with the most parameters."""
        return max(self.stages, key=lambda stage: stage.parameters.total)

    @property
    def padded_vocab_size(self) -> int:
        return derived.padded_vocab_size(self.config.model, self.vocab_size, self.layout.tensor)

    def stage_flops(self, stage: Stage) -> Flops:
        """Return the training FLOPs per token of a pipeline stage's layers and, in the last, of the output layer."""
        vocab = self.padded_vocab_size if stage is self.stages[-1] else 0
        return step_flops_per_token(self.config, vocab, self.config.model.loop_count, layers=stage.layers)

    @cached_property
    def slowest(self) -> Stage:
        """The stage with the most FLOPs, which sets the pipeline's pace."""
        return max(self.stages, key=lambda stage: self.stage_flops(stage).total)

    def losses(self, stage: Stage) -> list[int]:
        """Return the loops that end in a loss, hence an output layer, in this stage."""
        last = stage is self.stages[-1]
        return derived.loops_with_loss(self.config, self.config.model.loop_count) if last else []


# Bytes that the optimizer moves per parameter it owns: it reads gradient, main weight and two moments, writes the last
# three and the weight, and reads the gradient once more for its norm.
OPTIMIZER_BYTES_PER_PARAMETER = 4 * 4 + 3 * 4 + 2 + 4
# Memory-bound operations move each saved activation about this often: written and read forward, read backward, and its
# gradient written and read.
PASSES_OVER_ACTIVATIONS = 5
# FP8 products reach this fraction of the share of the peak that BF16 products reach: casts and scales weigh more.
FP8_EFFICIENCY = 0.75
# Bytes/s per device for what is offloaded: achieved PCIe bandwidth, and a device's share of the node's host memory
# bandwidth.
HOST_LINK = 25e9
HOST_MEMORY = 25e9


@dataclass(frozen=True)
class StepTime(Parts):
    """Seconds of the slowest rank's step, by what they are spent on."""

    matmul: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    recompute: float = 0.0
    tensor_parallel: float = 0.0  # includes the experts' exchange of tokens
    bubble: float = 0.0
    other_communication: float = 0.0
    optimizer: float = 0.0


def step_time(step: Step, card: GPUSpec, traffic: dict[str, float], gpus_per_node: int) -> StepTime:
    """Estimate the time of a step that sends `traffic`, from `communication_bytes`."""
    config, layout = step.config, step.layout
    peak = card.flops_per_second(config.training.precision)
    tokens = layout.microbatches * layout.micro_batch_size * config.data.sequence_length / layout.context
    share = tokens / layout.tensor  # per rank
    own = step.stage_flops(step.slowest)
    attention_flops = own.global_attention + own.local_attention

    def seconds(purpose: str, ranks: int) -> float:  # among neighboring ranks: over the network, unless a node has them
        link = card.link_bandwidth if ranks <= gpus_per_node else card.network_bandwidth
        return traffic.get(purpose, 0.0) / (link * card.link_efficiency)

    matmul = share * _matmul_seconds(config, card, own, step.slowest.layers)
    attention = share * attention_flops / (peak * card.attention_efficiency)
    memory_bound = _memory_bound(step, card)
    recompute = _recompute(step, matmul, attention, memory_bound, own)
    ring = seconds("context parallel", layout.tensor * layout.context)
    tensor_parallel = seconds("tensor parallel", layout.tensor)
    tensor_parallel += max(0.0, ring - attention)  # the ring overlaps with the attention
    tensor_parallel += seconds("expert parallel", layout.expert)
    work = matmul + attention + memory_bound + recompute + tensor_parallel
    return StepTime(
        matmul=matmul,
        attention=attention,
        memory_bound=memory_bound,
        recompute=recompute,
        tensor_parallel=tensor_parallel,
        bubble=work * bubble_fraction(layout.pipeline, config.model.loop_count, layout.microbatches),
        other_communication=_other_communication(layout, traffic, work, seconds),
        optimizer=_optimizer(step, card) + seconds("matrix updates", layout.tensor),
    )


def _matmul_seconds(config: RunConfig, card: GPUSpec, flops: Flops, layers: Sequence[int]) -> float:
    """Return the seconds of matrix products per token in these layers. Linear layers may run in FP8, which reaches less
    of its peak."""
    peak = card.flops_per_second(config.training.precision) * card.matmul_efficiency
    linear = flops.projections + flops.ffn
    seconds = flops.matmuls / peak
    if config.training.fp8 is None:
        return seconds
    linear *= share_in_fp8(config, layers)
    fp8_peak = card.flops_per_second(config.training.precision, fp8=True) * card.matmul_efficiency * FP8_EFFICIENCY
    return seconds - linear / peak + linear / fp8_peak


def _memory_bound(step: Step, card: GPUSpec) -> float:
    shapes = dataclasses.replace(step.shapes, recomputed=())  # activations that are not saved are moved too
    model, own = step.config.model, step.slowest.layers
    saved = derived.count_looped(model, own) * shapes.first_loop_kv()
    saved += sum(shapes.layers_in_loop(own, loop) for loop in range(1, model.loop_count + 1))
    saved += len(step.losses(step.slowest)) * (shapes.softmax() + shapes.head_backward())
    moved = PASSES_OVER_ACTIVATIONS * saved * step.layout.microbatches
    return moved / (card.memory_bandwidth * card.memory_efficiency)


def _recompute(step: Step, matmul: float, attention: float, memory_bound: float, flops: Flops) -> float:
    """Return the seconds of another forward pass, a third of a step, over the recomputed part."""
    layout, products = step.layout, flops.matmuls
    if layout.recompute == "none":
        return 0.0
    if layout.recompute == "selective":
        parts = attention if "core_attn" in layout.recompute_modules else 0.0
        model, layers = step.config.model, step.slowest.layers
        weights = Weights(model)
        again = 0
        if "mlp" in layout.recompute_modules:
            again += weights.matmuls([layer for layer in layers if layer in derived.dense_layers(model)], *FFN)
        if "shared_experts" in layout.recompute_modules:
            again += weights.matmuls([layer for layer in layers if layer in derived.expert_layers(model)], "ffn")
        parts += matmul * flops.ffn / products * again / (weights.matmuls(layers, *FFN) or 1)
        return parts / 3
    recomputed = matmul * (products - flops.output) / products + attention
    return recomputed / 3 + memory_bound * flops.looped / flops.total * 2 / PASSES_OVER_ACTIVATIONS


def _other_communication(
    layout: Layout, traffic: dict[str, float], work: float, seconds: Callable[[str, int], float]
) -> float:
    """Return the seconds of data-parallel and pipeline traffic that does not overlap with computation.

    Overlapped reduction starts in the last microbatch's backward pass, two thirds of a microbatch, which hides it; the
    forward third hides overlapped gathering. Pipeline messages are sent while the next pass computes; only the first of
    each kind is waited for.
    """
    spread = layout.world_size if layout.shards > 1 else 1
    reduction, gathering = seconds("gradient reduction", spread), seconds("weight gathering", spread)
    if layout.overlap_grad_reduce:
        reduction = max(reduction * 0.05, reduction - work / layout.microbatches * 2 / 3)
    if layout.overlap_param_gather:
        gathering = max(gathering * 0.05, gathering - work / layout.microbatches / 3)
    pipeline = seconds("pipeline", layout.tensor * layout.pipeline)
    tied = seconds("tied embeddings", layout.tensor * layout.pipeline)
    offloading = traffic.get("host transfers", 0.0) / HOST_LINK
    return reduction + gathering + offloading + max(pipeline / layout.microbatches, pipeline - 0.8 * work) + tied


def _optimizer(step: Step, card: GPUSpec) -> float:
    """Return the seconds of the update, with one moment of matrices too many, and of Newton-Schulz iterations on the
    busiest rank."""
    config, layout = step.config, step.layout
    offloaded = layout.offload_optimizer and not layout.on_cpu
    bandwidth = HOST_MEMORY if offloaded else card.memory_bandwidth * card.memory_efficiency
    peak = card.flops_per_second(config.training.precision) * card.matmul_efficiency

    def seconds(stage: Stage) -> float:
        owned = stage.trained.dense / (layout.shards if layout.zero_stage >= 1 else 1)
        owned += stage.trained.experts / layout.expert_shards
        flops = sum(held.busiest(lambda matrix: matrix.flops) for held in stage.held)
        return OPTIMIZER_BYTES_PER_PARAMETER * owned / bandwidth + config.optimizer.muon_num_ns_steps * flops / peak

    return max(map(seconds, step.stages))
