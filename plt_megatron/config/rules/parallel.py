"""Rules for the parallel sizes: what they must divide, and how they combine; part of `validation`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout, layout_of
from plt_megatron.config.rules import divisions
from plt_megatron.config.rules import stages as stage_rules
from plt_megatron.config.schema import RunConfig


def find_problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    layout = layout_of(config, world_size)
    yield from _check_tensor(config, layout)
    yield from _check_pipeline(config, layout)
    yield from _check_recomputation(config)
    problem = None if world_size is None else layout.world_size_problem(world_size)
    if problem is not None:
        yield problem
    yield from divisions.find_problems(config, layout, fills=problem is None)


def _check_tensor(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    model, tp, groups = config.model, layout.tensor, derived.num_query_groups(config.model)
    if groups % tp and (tp % groups or 2 * groups * derived.head_dim(model) % tp):
        yield (
            f"model.num_query_groups {groups} with parallel.tensor_model_parallel_size {tp}: ranks split the key/value "
            "heads, or several ranks share one: one number must divide the other"
        )
    if layout.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1"
    if model.moe is not None and tp > 1 and not layout.sequence_parallel:
        yield (
            f"model.moe with parallel.tensor_model_parallel_size {tp} needs parallel.sequence_parallel=true: each rank "
            "routes its own share of the tokens"
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


def _check_recomputation(config: RunConfig) -> Iterator[str]:
    if config.parallel.recompute_granularity != "selective":
        return
    lacks = {
        "mlp": "" if derived.dense_layers(config.model) else "with model.moe layers have no dense FFN",
        "shared_experts": (
            "" if derived.shared_expert_size(config.model) else "it needs model.moe.shared_expert_intermediate_size"
        ),
    }
    for module in config.parallel.recompute_modules:
        if lacks.get(module):
            yield f"parallel.recompute_modules {module}: {lacks[module]}; leave it out"


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
