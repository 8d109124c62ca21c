"""Estimate a whole run: size, work, memory, traffic, time and storage. Does not import torch."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.loop_schedule import LoopSchedule, with_equal_steps
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.predict.cards import GPUSpec, find_gpu_spec
from plt_megatron.predict.flops import Flops, run_flops_per_token
from plt_megatron.predict.layout import Layout, bubble_fraction, estimate_layout
from plt_megatron.predict.memory import MemoryEstimate, checkpoint_bytes, estimate_memory, saving_bytes
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.predict.step import Step, StepTime, step_time
from plt_megatron.predict.traffic import communication_bytes

# The rest is left for CUDA's context, NCCL's buffers and fragmentation.
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class RunEstimate:
    """The size and cost of a run. Costs per step are means over the run's steps, whose loops and batches follow
    `training.loop_schedule` and `training.batch_schedule`. Memory is that of the largest step, with all loops.

    Attributes:
        parameters_embedding: of the table and, if untied, the output layer.
        tokens, total_flops: over the run.
        flops_per_token: training FLOPs of the model, by `flops.run_flops_per_token`; `flops` has the parts.
        memory: the worst rank of each pipeline stage; `peak_memory_bytes`: the worst one's peak.
        fits: whether the peak leaves 8 % of the card free (`USABLE_SHARE`).
        bubble_fraction: pipeline idle time over working time.
        communication: bytes sent per step and rank, by purpose.
        step_seconds, total_seconds, gpu_hours: from the card's peaks and achievable shares, without validation and
            checkpoints; `times` has the parts.
        saving_bytes: extra host memory a rank needs while it writes its part of a checkpoint.
        gpu: the card's short name.
    """

    parameters_total: int
    parameters_active: int
    parameters_embedding: int
    tokens: int
    flops_per_token: float
    flops: Flops
    total_flops: float
    memory: list[MemoryEstimate]
    peak_memory_bytes: int
    device_memory_bytes: int
    fits: bool
    bubble_fraction: float
    communication: dict[str, float]
    step_seconds: float
    times: StepTime
    total_seconds: float
    gpu_hours: float
    checkpoint_bytes: int
    saving_bytes: int
    world_size: int
    layout: Layout
    gpu: str


def estimate_run(
    config: RunConfig,
    *,
    gpu: str = "h100",
    world_size: int | None = None,
    gpus_per_node: int = 8,
    vocab_size: int | None = None,
) -> RunEstimate:
    """Estimate a validated configuration on `world_size` ranks (None: as many as its layout asks for).

    `vocab_size`: the tokenizer's; None: `model.vocab_size`. `gpu` is one of `cards.card_names()`. Raises `UserError` if
    it is not, or if the vocabulary size is unknown.
    """
    vocab_size = vocab_size or known_vocab_size(config)
    layout = estimate_layout(config, world_size, on_cpu=gpu == "cpu")
    card = find_gpu_spec(gpu, min(gpus_per_node, layout.world_size))
    counted = count_parameters(config.model, vocab_size, layout.tensor)
    step = Step.of(config, layout, vocab_size)
    flops = run_flops_per_token(config, step.padded_vocab_size)
    traffic, times, bubble = _mean_step_costs(step, card, gpus_per_node)
    largest = _with_batch(layout, max(BatchSchedule(config).sizes))
    memory = estimate_memory(dataclasses.replace(step, layout=largest))
    peak = max(stage.total_bytes for stage in memory)
    steps = derived.train_iters(config)
    tokens = derived.run_tokens(config)
    return RunEstimate(
        parameters_total=counted.total,
        parameters_active=counted.active,
        parameters_embedding=counted.tables,
        tokens=tokens,
        flops_per_token=flops.total,
        flops=flops,
        total_flops=flops.total * tokens,
        memory=memory,
        peak_memory_bytes=peak,
        device_memory_bytes=card.memory_bytes,
        fits=peak <= USABLE_SHARE * card.memory_bytes,
        bubble_fraction=bubble,
        communication=traffic,
        step_seconds=times.total,
        times=times,
        total_seconds=steps * times.total,
        gpu_hours=steps * times.total * layout.world_size / 3600,
        checkpoint_bytes=checkpoint_bytes(config, vocab_size, layout.tensor),
        saving_bytes=saving_bytes(step),
        world_size=layout.world_size,
        layout=layout,
        gpu=gpu,
    )


def _mean_step_costs(largest: Step, card: GPUSpec, gpus_per_node: int) -> tuple[dict[str, float], StepTime, float]:
    """Return means over the run's steps: bytes that a rank sends, by purpose; the step's time; its bubble."""
    config, layout = largest.config, largest.layout
    traffic, times, bubble = defaultdict[str, float](float), StepTime(), 0.0
    for kind, share in LoopSchedule(config).step_shares().items():
        alike, loops = with_equal_steps(config, kind), kind.loop_count
        own = _with_batch(layout, kind.global_batch_size)
        own = dataclasses.replace(own, loops=loops, micro_batch_size=alike.training.micro_batch_size)
        step = dataclasses.replace(largest, config=alike, layout=own)
        sent = communication_bytes(step)
        times += step_time(step, card, sent, gpus_per_node).times(share)
        bubble += share * bubble_fraction(own.pipeline, loops, own.microbatches)
        for purpose, amount in sent.items():
            traffic[purpose] += share * amount
    return dict(traffic), times, bubble


def _with_batch(layout: Layout, global_batch_size: int) -> Layout:
    microbatches = max(1, layout.num_microbatches(global_batch_size, layout.micro_batch_size))
    return dataclasses.replace(layout, microbatches=microbatches)


def known_vocab_size(config: RunConfig, tokenizer_size: Callable[[str], int] | None = None) -> int:
    """Return the configuration's vocabulary size, else that of its tokenizer file, which `tokenizer_size` reads.

    Raises `UserError` if neither is known."""
    vocab_size, tokenizer = config.model.vocab_size, config.data.tokenizer
    if vocab_size is None and tokenizer_size is not None and tokenizer is not None and Path(tokenizer).exists():
        vocab_size = tokenizer_size(tokenizer)
    if vocab_size is None:
        missing = f"the tokenizer {tokenizer} does not exist" if tokenizer else "there is no data.tokenizer"
        raise UserError(
            f"the vocabulary is unknown: {missing}; create the tokenizer, or set the size it will have, as in "
            "model.vocab_size=32000"
        )
    return vocab_size
