"""How a run is laid out over ranks, and in which order a rank runs its microbatches. Every estimate of a rank's memory,
time and traffic depends on both.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.layout import DIMENSIONS, ParallelLayout, layout_of, num_microbatches
from plt_megatron.config.rules.deepspeed import deepspeed_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError

BYTES = {"fp32": 4, "bf16": 2}
MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's own default


def problems_on(config: RunConfig, world_size: int | None, capability: tuple[int, int] | None) -> list[str]:
    """List why a run does not fit `world_size` ranks on cards of a compute capability, or without any (None).

    Where there are cards, Transformer Engine is taken to be there too.
    """
    te = capability is not None
    return find_problems(config, world_size=world_size, check_files=False, have_te=te, capability=capability)


@dataclass(frozen=True)
class Layout(ParallelLayout):
    """A parallel layout, and how one rank runs its microbatches.

    Attributes:
        zero_stage: 0: every data-parallel rank has all optimizer state; 1: optimizer state is sharded (megatron-core's
            distributed optimizer); 2: gradients too; 3: weights too.
        recompute: `none`, `selective` (`recompute_modules`) or `full` (units of `recompute_num_layers` layers).
        recompute_modules: parts of layers that are recomputed separately.
        microbatches: number per optimizer step and data-parallel rank.
        deepspeed: whether DeepSpeed trains, with its own buffers.
        offload_optimizer, offload_weights: kept in host memory (DeepSpeed).
        reduce_bucket: number of parameters whose gradients are reduced together (DeepSpeed).
        max_live_parameters: how many parameters may be gathered at a time (stage 3).
        backend: `torch` or `te`.
        on_cpu: whether ranks use gloo and torch's CPU kernels.
    """

    zero_stage: int = 1
    recompute: str = "none"
    recompute_num_layers: int = 1
    recompute_modules: tuple[str, ...] = ()
    micro_batch_size: int = 1
    microbatches: int = 1
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    reduce_bucket: int = 0
    max_live_parameters: int = MAX_LIVE_PARAMETERS
    backend: str = "torch"
    on_cpu: bool = False

    def __str__(self) -> str:
        words = [super().__str__()]
        if self.deepspeed:
            words.append(f"ZeRO{self.zero_stage}")
            words += ["offload"] * self.offload_optimizer + ["offload-weights"] * self.offload_weights
        return " ".join(words)


def estimate_layout(config: RunConfig, world_size: int | None = None, *, on_cpu: bool = False) -> Layout:
    """Return the layout of a validated configuration on `world_size` ranks (None: as many as it asks for).

    A GPU is taken to have Transformer Engine.
    """
    parallel, deepspeed = config.parallel, config.deepspeed
    zero = deepspeed_config(config)["zero_optimization"] if deepspeed else {}
    return Layout(
        **dataclasses.asdict(layout_of(config, world_size)),
        zero_stage=deepspeed.zero_stage if deepspeed else 1,  # 1: megatron-core's distributed optimizer, always on
        deepspeed=deepspeed is not None,
        offload_optimizer=deepspeed is not None and deepspeed.offload_optimizer == "cpu",
        offload_weights=deepspeed is not None and deepspeed.offload_param == "cpu",
        reduce_bucket=zero.get("reduce_bucket_size", 0),
        max_live_parameters=zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS),
        recompute=parallel.recompute_granularity,
        recompute_num_layers=parallel.recompute_num_layers,
        recompute_modules=tuple(parallel.recompute_modules) if parallel.recompute_granularity == "selective" else (),
        micro_batch_size=config.training.micro_batch_size,
        microbatches=max(1, num_microbatches(config, world_size)),
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=derived.overlap_param_gather(config),
        backend=derived.backend(config.model, config.training.precision, have_te=not on_cpu),
        on_cpu=on_cpu,
    )


_SIZES = {word: f"parallel.{setting}" for word, (_, setting) in DIMENSIONS.items()} | {
    "MB": "training.micro_batch_size",
    "ZERO": "deepspeed.zero_stage",
}
RECOMPUTE = ("none", "selective", "full")


def layout_overrides(text: str) -> list[str]:
    """Translate a layout as reports print it, `TP2 SP PP4 DP8`, into settings. Blanks or commas separate words.

    TP, PP and CP default to 1, and sequence parallelism is off without SP; anything else left out stays as configured.
    More words: `MB2` (micro batch size), `none`, `selective` or `full` (recomputation), and with DeepSpeed `ZeRO2` and
    `offload` (of the optimizer), `offload-weights`. Raises `UserError` on an unknown word or a setting given twice.
    """
    words = [word.upper() for word in re.split(r"[\s,]+", text) if word]
    settings: dict[str, str] = {}
    for word in words:
        for key, value in _meaning(word).items():
            if key in settings:
                raise UserError(f"--layout {text}: {word} sets {key} a second time")
            settings[key] = value
    for name in ("TP", "PP", "CP"):
        settings.setdefault(_SIZES[name], "1")
    settings.setdefault("parallel.sequence_parallel", "false")
    return [f"{key}={value}" for key, value in settings.items()]


def _meaning(word: str) -> dict[str, str]:
    sized = re.fullmatch(r"([A-Z]+?)(\d+)", word)
    if sized and sized[1] in _SIZES:
        return {_SIZES[sized[1]]: sized[2]}
    if word == "SP":
        return {"parallel.sequence_parallel": "true"}
    if word == "OFFLOAD":
        return {"deepspeed.offload_optimizer": "cpu"}
    if word == "OFFLOAD-WEIGHTS":
        return {"deepspeed.offload_param": "cpu"}
    if word.lower() in RECOMPUTE:
        return {"parallel.recompute_granularity": word.lower()}
    raise UserError(
        f"--layout: {word} is not known; write it as in 'TP2 SP PP4 CP1 DP8 MB1 full' or 'TP2 DP8 ZeRO3 offload'"
    )


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of a microbatch through a stage: through loop `loop`, or through all loops if 0.

    Loops are the model chunks of megatron-core's interleaved schedule (docs/decisions.md). Without a pipeline, all
    loops of a microbatch run forward, then backward.
    """

    microbatch: int
    loop: int
    backward: bool


def bubble_fraction(pipeline: int, loops: int, microbatches: int) -> float:
    """Return idle time over working time: (P - 1) / (L M)."""
    return (pipeline - 1) / (loops * microbatches)


def passes(pipeline: int, stage: int, loops: int, microbatches: int) -> list[Pass]:
    """Return the passes of a stage in one step, in order.

    The steady state repeats, so `enough_microbatches` suffice to find the peak.
    """
    if pipeline == 1:
        return [Pass(index, 0, backward) for index in range(microbatches) for backward in (False, True)]
    if loops == 1:
        forward = [(index, 1) for index in range(microbatches)]
        warmup, backward = pipeline - stage - 1, forward
    else:
        groups = [range(first, min(first + pipeline, microbatches)) for first in range(0, microbatches, pipeline)]
        forward = [(index, loop) for group in groups for loop in range(1, loops + 1) for index in group]
        backward = [(index, loop) for group in groups for loop in range(loops, 0, -1) for index in group]
        warmup = (pipeline - stage - 1) * 2 + (loops - 1) * pipeline
    warmup = min(warmup, len(forward))
    order = [Pass(*each, backward=False) for each in forward[:warmup]]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        order += [Pass(*ahead, backward=False), Pass(*behind, backward=True)]
    return order + [Pass(*each, backward=True) for each in backward[len(forward) - warmup :]]


def enough_microbatches(pipeline: int, microbatches: int) -> int:
    """Return a number of microbatches that reaches the same peak as all of them."""
    return min(microbatches, 2 if pipeline == 1 else 3 * pipeline)
