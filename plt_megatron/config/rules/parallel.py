"""Rules for the parallel sizes: what they must divide, and how they combine; part of `validation`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout, layout_of
from plt_megatron.config.rules import stages as stage_rules
from plt_megatron.config.schema import RunConfig


def find_problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    layout = layout_of(config, world_size)
    yield from _check_tensor(config, layout)
    yield from _check_pipeline(config, layout)
    yield from _check_context(config, layout)
    yield from _check_overlap(config)
    yield from _check_recomputation(config)
    if config.model.moe is not None:
        yield from _check_experts(config.model.moe.num_experts, layout)
    problem = None if world_size is None else layout.world_size_problem(world_size)
    if problem is not None:
        yield problem
    else:
        yield from _check_batches(config, layout)


def _check_tensor(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    model, tp = config.model, layout.tensor
    for name, size in (("num_attention_heads", model.num_attention_heads), *derived.split_ffns(model).items()):
        if size % tp:
            yield f"model.{name} {size} is not divisible by parallel.tensor_model_parallel_size {tp}"
    groups = derived.num_query_groups(model)
    if groups % tp and (tp % groups or 2 * groups * derived.head_dim(model) % tp):
        yield (
            f"model.num_query_groups {groups} with parallel.tensor_model_parallel_size {tp}: ranks split the key/value "
            "heads, or several ranks share one: one number must divide the other"
        )
    if layout.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1"
    elif layout.sequence_parallel:
        for key, length in _row_lengths(config).items():
            if length % tp:
                yield (
                    f"{key} {length} is not divisible by parallel.tensor_model_parallel_size {tp}, which "
                    "parallel.sequence_parallel needs"
                )


def _check_pipeline(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    problems = list(stage_rules.find_problems(config, layout))
    yield from problems
    if problems:
        return
    fewest = layout.fewest_stage_layers(layers)
    if parallel.recompute_granularity == "full" and parallel.recompute_num_layers > fewest:
        yield (
            f"parallel.recompute_num_layers {parallel.recompute_num_layers} is more than the {fewest} layers of a "
            "pipeline stage"
        )


def _check_overlap(config: RunConfig) -> Iterator[str]:
    if not config.parallel.overlap_param_gather:
        return
    off = "set parallel.overlap_param_gather=false"
    if not config.parallel.overlap_grad_reduce:
        yield f"parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true, which makes buckets; or {off}"
    if config.model.fused_gated_window:
        yield (
            "parallel.overlap_param_gather with model.fused_gated_window: the kernel reads the gates' weights without "
            f"waiting for them; {off}"
        )


def _check_recomputation(config: RunConfig) -> Iterator[str]:
    parallel, model, modules = config.parallel, config.model, config.parallel.recompute_modules
    if parallel.recompute_granularity != "selective":
        return
    if not modules or len(set(modules)) < len(modules):
        yield f"parallel.recompute_modules {modules}: name each part once, and at least one"
    if "mlp" in modules and not derived.dense_layers(model):
        yield "parallel.recompute_modules mlp: with model.moe layers have no dense FFN; leave it out"
    if "shared_experts" in modules and not derived.shared_expert_size(model):
        yield "parallel.recompute_modules shared_experts needs model.moe.shared_expert_intermediate_size; leave it out"


def _check_context(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    """Check that context parallelism can divide the rows."""
    cp, tp = layout.context, layout.tensor
    if cp == 1:
        return
    for key, length in _row_lengths(config).items():
        if length % (2 * cp):
            yield (
                f"{key} {length} is not divisible by {2 * cp}: "
                f"parallel.context_parallel_size {cp} cuts a sequence into twice as many chunks"
            )
        elif layout.sequence_parallel and length % (cp * tp):
            yield (
                f"{key} {length} is not divisible by {cp * tp}: parallel.sequence_parallel shares each of "
                f"parallel.context_parallel_size {cp} parts among parallel.tensor_model_parallel_size {tp} ranks"
            )


def _row_lengths(config: RunConfig) -> dict[str, int]:
    """Return the lengths of the run's rows, by setting."""
    stages = enumerate(config.data.length_schedule)
    lengths = {f"data.length_schedule[{number}].sequence_length": stage.sequence_length for number, stage in stages}
    return lengths | {"data.sequence_length": config.data.sequence_length}


def _check_experts(experts: int, layout: ParallelLayout) -> Iterator[str]:
    ep = layout.expert
    if experts % ep:
        yield f"model.moe.num_experts {experts} is not divisible by parallel.expert_model_parallel_size {ep}"
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield (
            f"model.moe with parallel.tensor_model_parallel_size {layout.tensor} needs "
            "parallel.sequence_parallel=true: each rank routes its own share of the tokens"
        )
    if layout.ranks_per_stage % ep:
        yield (
            f"parallel.expert_model_parallel_size {ep} must divide the {layout.ranks_per_stage} ranks that hold the "
            f"same layers (tensor {layout.tensor} x context {layout.context} x data {layout.data}): change it, or "
            "parallel.data_parallel_size"
        )


def _check_batches(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    training = config.training
    step = training.micro_batch_size * layout.data
    for key, size in _batch_sizes(config).items():
        if size % step:
            over = "" if key == "training.global_batch_size" else "; if this stage is over, any divisible value works"
            yield (
                f"{key} {size} is not divisible by {step} "
                f"(training.micro_batch_size {training.micro_batch_size} x data parallel size {layout.data}){over}"
            )
        elif layout.num_microbatches(size, training.micro_batch_size) % layout.pipeline:
            microbatches = layout.num_microbatches(size, training.micro_batch_size)
            yield (
                f"{microbatches} microbatches per step: not divisible by parallel.pipeline_model_parallel_size "
                f"{layout.pipeline}: change {key} or training.micro_batch_size"
            )


def _batch_sizes(config: RunConfig) -> dict[str, int]:
    """Return the run's batch sizes, by setting. An increment stands for the batches that it leads to: if it and the
    first one are divisible, they all are."""
    training = config.training
    sizes = {
        f"training.batch_schedule[{number}].{name}": size
        for number, stage in enumerate(training.batch_schedule)
        for name, size in (("global_batch_size", stage.global_batch_size), ("increment", stage.increment))
        if size is not None
    }
    return sizes | {"training.global_batch_size": training.global_batch_size}


def find_te_problems(config: RunConfig, have_te: bool | None) -> Iterator[str]:
    """Yield what Transformer Engine's attention, which backend `auto` may use, cannot do when ranks split a sequence.

    `have_te`: whether it is installed; None: find out.
    """
    parallel, model = config.parallel, config.model
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if cp == 1 or model.backend == "torch":
        return
    if have_te is None:
        have_te = importlib.util.find_spec("transformer_engine") is not None
    if model.backend == "auto" and not have_te:
        return
    packed, other = config.data.reset_at_document_boundaries, "or set model.backend=torch"
    kinds = [("cp_comm_type", parallel.cp_comm_type)]
    if derived.has_gates(model):
        kinds.append(("window_cp_comm_type", parallel.window_cp_comm_type))
    for name, kind in kinds:
        if packed and kind != "a2a":
            yield (
                f"parallel.{name} {kind} with data.reset_at_document_boundaries: Transformer Engine would split each "
                f"document over the ranks, not the sequence; set parallel.{name}=a2a, {other}"
            )
        elif kind == "a2a" and derived.num_query_groups(model) % (tp * cp):
            yield (
                f"parallel.{name} a2a splits the {derived.num_query_groups(model)} key/value heads "
                f"(model.num_query_groups): not divisible by tensor {tp} x context {cp}; "
                f"{'set data.reset_at_document_boundaries=false' if packed else 'use all_gather'}, {other}"
            )
