"""Search for layouts of a run that validation accepts and that fit given cards; best first."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.fields import find_type_problems
from plt_megatron.config.layout import layout_of
from plt_megatron.config.rules.parallel import uneven_settings
from plt_megatron.config.schema import ParallelConfig, RunConfig
from plt_megatron.config.yaml_nodes import text_of
from plt_megatron.errors import UserError
from plt_megatron.predict.cards import find_gpu_spec
from plt_megatron.predict.layout import RECOMPUTE, problems_on
from plt_megatron.predict.run_estimate import RunEstimate, estimate_run

MAX_MICRO_BATCH = 64
MIN_CONTEXT_ROWS = 4096  # tokens of a sequence per rank: with fewer, little work hides context-parallel traffic


@dataclass(frozen=True)
class Candidate:
    """A layout, as overrides of the configuration, with its estimate."""

    overrides: dict[str, object]
    estimate: RunEstimate

    @property
    def command_line(self) -> str:
        """The overrides as `key=value` arguments."""
        return " ".join(f"{key}={text_of(value)}" for key, value in self.overrides.items())

    @property
    def overheads(self) -> list[tuple[str, float]]:
        """A step's overheads beyond model FLOPs, as shares of its time, largest first."""
        times, total = self.estimate.times, self.estimate.step_seconds
        shares = [
            ("recomputation", times.recompute),
            ("memory-bound operations", times.memory_bound),
            ("tensor-parallel traffic", times.tensor_parallel),
            ("pipeline bubble", times.bubble),
            ("other traffic", times.other_communication),
            ("optimizer", times.optimizer),
        ]
        return sorted(((name, seconds / total) for name, seconds in shares), key=lambda share: -share[1])


@dataclass(frozen=True)
class SearchResult:
    """Layouts found by a search.

    Attributes:
        fitting: best first.
        nearest: the layout that needs the least memory, whether it fits or not; None if validation accepts none.
        tried, accepted: numbers of layouts tried, and accepted by validation.
        problems: the most frequent reasons why validation refused layouts.
    """

    fitting: list[Candidate]
    nearest: Candidate | None
    tried: int
    accepted: int
    problems: list[str]


def search(
    config: RunConfig, *, gpu: str, world_size: int, gpus_per_node: int, vocab_size: int | None = None
) -> SearchResult:
    """Try tensor x pipeline x context x data parallel sizes, sequence parallelism, micro batch sizes, recomputation,
    and expert parallel sizes for a mixture of experts.

    Micro batches larger than one that does not fit are not estimated, with all else equal: they need more. With
    DeepSpeed, try its ZeRO stages and offloading, and neither pipelines nor context parallelism. Everything else stays
    as configured. Raises `UserError` as `estimate_run` does.
    """
    if wrong := list(find_type_problems(config)):
        raise UserError("\n".join(wrong))
    capability = find_gpu_spec(gpu).capability
    estimated: list[Candidate] = []
    too_large: set[frozenset[tuple[str, object]]] = set()  # layouts that a smaller micro batch has ruled out
    problems: Counter[str] = Counter()
    tried = accepted = 0
    for overrides in _layouts(config, world_size, gpus_per_node):
        tried += 1
        changed = _changed(config, overrides)
        found = problems_on(changed, world_size, capability)
        if found:
            problems.update(found)
            continue
        accepted += 1
        way = frozenset(item for item in overrides.items() if item[0] != "training.micro_batch_size")
        if way in too_large:
            continue
        estimate = estimate_run(
            changed, gpu=gpu, world_size=world_size, gpus_per_node=gpus_per_node, vocab_size=vocab_size
        )
        estimated.append(Candidate(overrides, estimate))
        if not estimate.fits:
            too_large.add(way)
    fitting = sorted(
        (each for each in estimated if each.estimate.fits),
        key=lambda each: (each.estimate.step_seconds, each.estimate.peak_memory_bytes),
    )
    nearest = min(estimated, key=lambda each: each.estimate.peak_memory_bytes, default=None)
    return SearchResult(fitting, nearest, tried, accepted, [text for text, _ in problems.most_common(3)])


def _layouts(config: RunConfig, world_size: int, gpus_per_node: int) -> Iterator[dict[str, object]]:
    """Yield parallel sizes that multiply to the world size, each with every way to run it, micro batches from small to
    large. Tensor parallelism stays within a node."""
    for tensor, pipeline, context, data in _sizes(config, world_size, gpus_per_node):
        sizes: dict[str, object] = {
            "parallel.tensor_model_parallel_size": tensor,
            "parallel.pipeline_model_parallel_size": pipeline,
            "parallel.context_parallel_size": context,
            "parallel.data_parallel_size": data,
        }
        if pipeline != config.parallel.pipeline_model_parallel_size:
            # What made stages uneven was meant for another number of them.
            sizes |= {f"parallel.{name}": getattr(ParallelConfig(), name) for name in uneven_settings(config.parallel)}
        if context == config.parallel.context_parallel_size == 1:
            del sizes["parallel.context_parallel_size"]
        sizes |= _exchanges(config, tensor, context)
        micro_batches = _micro_batches(config.training.global_batch_size // data, pipeline)
        dense = config.model.moe is None
        sequence = ((False, True) if dense else (True,)) if tensor > 1 else (False,)
        ends = _experts(config, tensor * context * data), _zero(config)
        for parallel, size, recompute, experts, zero in itertools.product(sequence, micro_batches, RECOMPUTE, *ends):
            ways: dict[str, object] = {
                "parallel.sequence_parallel": parallel,
                "parallel.recompute_granularity": recompute,
                "training.micro_batch_size": size,
            }
            fewest = layout_of(_changed(config, sizes)).fewest_stage_layers(config.model.num_layers)
            if recompute == "full" and config.parallel.recompute_num_layers > fewest:
                ways["parallel.recompute_num_layers"] = fewest
            yield sizes | ways | experts | zero


def _sizes(config: RunConfig, world_size: int, gpus_per_node: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (tensor, pipeline, context, data) sizes."""
    deepspeed = config.deepspeed is not None
    own = config.parallel.pipeline_model_parallel_size
    pipelines = [1] if deepspeed else sorted({*_divisors(config.model.num_layers), own})
    most = config.data.sequence_length // MIN_CONTEXT_ROWS
    contexts = {1, config.parallel.context_parallel_size}
    if not deepspeed:
        contexts |= {size for size in _divisors(world_size) if size <= most}
    fits = [size for size in _divisors(world_size) if size <= gpus_per_node]
    tensors = [size for size in fits if gpus_per_node % size == 0 or world_size <= gpus_per_node]
    for tensor, pipeline, context in itertools.product(tensors, pipelines, sorted(contexts)):
        data, rest = divmod(world_size, tensor * pipeline * context)
        if rest or data == 0 or config.training.global_batch_size % data:
            continue
        if config.model.num_attention_heads % tensor or (context > 1 and config.data.sequence_length % (2 * context)):
            continue
        yield tensor, pipeline, context, data


def _exchanges(config: RunConfig, tensor: int, context: int) -> dict[str, object]:
    """Return overrides of how ranks exchange parts of a sequence that Transformer Engine's attention needs: `a2a` for
    packed documents, and not `a2a` where the ranks outnumber the heads."""
    if context == 1 or derived.backend(config.model, config.training.precision, have_te=True) == "torch":
        return {}
    changes: dict[str, object] = {}
    for name in ("cp_comm_type", "window_cp_comm_type"):
        kind = getattr(config.parallel, name)
        if config.data.reset_at_document_boundaries:
            wanted = "a2a"
        else:
            divisible = derived.num_query_groups(config.model) % (tensor * context) == 0
            wanted = "all_gather" if kind == "a2a" and not divisible else kind
        if wanted != kind:
            changes[f"parallel.{name}"] = wanted
    return changes


def _experts(config: RunConfig, ranks: int) -> list[dict[str, object]]:
    """Return the expert parallel sizes possible among `ranks` ranks that hold the same layers."""
    if config.model.moe is None:
        return [{}]
    experts = config.model.moe.num_experts
    sizes = (size for size in _divisors(ranks) if experts % size == 0)
    return [{"parallel.expert_model_parallel_size": size} for size in sizes]


def _zero(config: RunConfig) -> list[dict[str, object]]:
    """Return ZeRO stages, each without offloading and with the optimizer offloaded; in stage 3 also with weights."""
    if config.deepspeed is None:
        return [{}]
    offloads = [("none", "none"), ("cpu", "none"), ("cpu", "cpu")]
    return [
        {"deepspeed.zero_stage": stage, "deepspeed.offload_optimizer": optimizer, "deepspeed.offload_param": weights}
        for stage in (1, 2, 3)
        for optimizer, weights in offloads
        if weights == "none" or stage == 3
    ]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _micro_batches(sequences: int, pipeline: int) -> list[int]:
    """Return the powers of two for which the number of microbatches is a multiple of the pipeline's stages."""
    sizes = (1 << power for power in range(MAX_MICRO_BATCH.bit_length()))
    return [size for size in sizes if sequences % size == 0 and (sequences // size) % pipeline == 0]


def _changed(config: RunConfig, overrides: dict[str, object]) -> RunConfig:
    changed = copy.copy(config)
    changed.parallel, changed.training = copy.copy(config.parallel), copy.copy(config.training)
    changed.deepspeed = copy.copy(config.deepspeed)
    for key, value in overrides.items():
        section, name = key.split(".")
        setattr(getattr(changed, section), name, value)
    return changed


def model_flops_share(estimate: RunEstimate, config: RunConfig) -> float:
    """Return the MFU: model FLOP/s over the cards' dense peak in the precision of the linear layers."""
    training = config.training
    peak = find_gpu_spec(estimate.gpu).flops_per_second(training.precision, fp8=training.fp8 is not None)
    return estimate.total_flops / (estimate.total_seconds * estimate.world_size * peak)
