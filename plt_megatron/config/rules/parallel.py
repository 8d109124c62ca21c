"""Rules for the parallel sizes: what they must divide, layers per pipeline stage, and how they combine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout, layout_of
from plt_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig


class _Division(NamedTuple):
    """`what`, of this `size`, must be divisible by the number `by`, which `words` say with what may be changed."""

    what: str
    size: int
    by: int
    words: str


def _division_problems(config: RunConfig, layout: ParallelLayout, *, fills: bool) -> Iterator[str]:
    """Yield what is not divisible, one line each. `fills`: whether the layout fills its ranks, which batches need."""
    divisions = [*_heads(config.model), *_sizes(config, layout), *_rows(config, layout)]
    if fills:
        divisions += _batches(config, layout)
    for what, size, by, words in divisions:
        if size % by:
            yield f"{what} {size} is not divisible by {words}"


def _heads(model: ModelConfig) -> Iterator[_Division]:
    heads, groups, head = model.num_attention_heads, derived.num_query_groups(model), derived.head_dim(model)
    if model.kv_channels is None:
        words = f"model.num_attention_heads {heads}; change one, or set model.kv_channels"
        yield _Division("model.hidden_size", model.hidden_size, heads, words)
    if model.kv_channels is not None or model.hidden_size % heads == 0:
        yield _Division("the head dimension (model.kv_channels)", head, 2, "2: RoPE rotates pairs of channels")
    yield _Division("model.num_attention_heads", heads, groups, f"model.num_query_groups {groups}")


def _sizes(config: RunConfig, layout: ParallelLayout) -> Iterator[_Division]:
    """Yield what ranks share: heads and FFNs among tensor-parallel ranks, experts among those of a stage."""
    model, ep = config.model, layout.expert
    tensor = f"parallel.tensor_model_parallel_size {layout.tensor}"
    yield _Division("model.num_attention_heads", model.num_attention_heads, layout.tensor, tensor)
    for name, size in derived.split_ffns(model).items():
        yield _Division(f"model.{name}", size, layout.tensor, tensor)
    if model.moe is not None:
        expert = f"parallel.expert_model_parallel_size {ep}"
        yield _Division("model.moe.num_experts", model.moe.num_experts, ep, expert)
        ranks = f"(tensor {layout.tensor} x context {layout.context} x data {layout.data})"
        change = f"{expert}: change it, or parallel.data_parallel_size"
        yield _Division(f"the number of ranks that hold the same layers {ranks},", layout.ranks_per_stage, ep, change)


def _rows(config: RunConfig, layout: ParallelLayout) -> Iterator[_Division]:
    """Yield the lengths of the run's rows, which context and sequence parallelism divide."""
    cp, tp = layout.context, layout.tensor
    lengths = {
        f"data.length_schedule[{number}].sequence_length": stage.sequence_length
        for number, stage in enumerate(config.data.length_schedule)
    }
    for key, length in (lengths | {"data.sequence_length": config.data.sequence_length}).items():
        if cp > 1:
            words = f"{2 * cp}: parallel.context_parallel_size {cp} cuts a sequence into twice as many chunks"
            yield _Division(key, length, 2 * cp, words)
        if layout.sequence_parallel:
            parts = "it" if cp == 1 else f"each of parallel.context_parallel_size {cp} parts"
            tensor = f"parallel.tensor_model_parallel_size {tp}"
            words = f"{cp * tp}: parallel.sequence_parallel shares {parts} among {tensor} ranks"
            yield _Division(key, length, cp * tp, words)


def _batches(config: RunConfig, layout: ParallelLayout) -> Iterator[_Division]:
    """Yield the run's batch sizes. An increment stands for the batches that it leads to: if it and the first one are
    divisible, they all are."""
    training, micro = config.training, config.training.micro_batch_size
    step = micro * layout.data
    sizes = {
        f"training.batch_schedule[{number}].{name}": size
        for number, stage in enumerate(training.batch_schedule)
        for name, size in (("global_batch_size", stage.global_batch_size), ("increment", stage.increment))
        if size is not None
    }
    for key, size in (sizes | {"training.global_batch_size": training.global_batch_size}).items():
        over = "" if key == "training.global_batch_size" else "; if this stage is over, any divisible value works"
        words = f"{step} (training.micro_batch_size {micro} x data parallel size {layout.data}){over}"
        yield _Division(key, size, step, words)
        if size % step == 0:
            pipeline = f"parallel.pipeline_model_parallel_size {layout.pipeline}"
            words = f"{pipeline}: change {key} or training.micro_batch_size"
            yield _Division("microbatches per step:", layout.num_microbatches(size, micro), layout.pipeline, words)


_GIVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def uneven_settings(parallel: ParallelConfig) -> list[str]:
    """Return the names of the settings of `parallel` that make stages uneven."""
    return [name for name in (*_GIVEN, *_COUNTED) if getattr(parallel, name)]


def _stage_problems(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    """Yield divisions that do not work out, one line each."""
    given = [name for name in _GIVEN if getattr(config.parallel, name) is not None]
    counted = [name for name in _COUNTED if getattr(config.parallel, name)]
    uneven = uneven_settings(config.parallel)
    size = f"parallel.pipeline_model_parallel_size {layout.pipeline}"
    if uneven and layout.pipeline == 1:
        yield f"parallel.{uneven[0]} applies to the stages of a pipeline: leave it out, or raise {size}"
    elif given and counted:
        yield f"parallel.{given[0]} and parallel.{counted[0]} both set what the first and last stage hold: use one"
    elif given:
        yield from _check_given(config, layout, given)
    elif (config.model.num_layers + len(counted)) % layout.pipeline:
        more = "".join(f" + 1 (parallel.{name})" for name in counted)
        yield f"model.num_layers {config.model.num_layers}{more} is not divisible by {size}"


def _check_given(config: RunConfig, layout: ParallelLayout, given: list[str]) -> Iterator[str]:
    layers = config.model.num_layers
    rest, stages = layers - sum(getattr(config.parallel, name) for name in given), layout.pipeline - len(given)
    names = " and ".join(f"parallel.{name} {getattr(config.parallel, name)}" for name in given)
    if stages == 0 and rest != 0:
        yield f"{names} must add up to model.num_layers {layers}: there is no stage between them"
    elif stages > 0 and (rest < stages or rest % stages):
        yield (
            f"{names} leave {rest} of model.num_layers {layers} to the other {stages} of "
            f"parallel.pipeline_model_parallel_size {layout.pipeline} stages: it must be a multiple of {stages}"
        )


def find_problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    layout = layout_of(config, world_size)
    yield from _check_tensor(config, layout)
    yield from _check_pipeline(config, layout)
    yield from _check_recomputation(config)
    problem = None if world_size is None else layout.world_size_problem(world_size)
    if problem is not None:
        yield problem
    yield from _division_problems(config, layout, fills=problem is None)


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
    problems = list(_stage_problems(config, layout))
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
    if cp == 1:
        return
    if have_te is None:
        have_te = importlib.util.find_spec("transformer_engine") is not None
    if derived.backend(model, config.training.precision, have_te) == "torch":
        return
    packed, other = config.data.reset_at_document_boundaries, "or set model.backend=torch"
    kinds = [("cp_comm_type", parallel.cp_comm_type)]
    if derived.has_windows(model):
        kinds.append(("window_cp_comm_type", parallel.window_cp_comm_type))
    indivisible, unpacked = derived.num_query_groups(model) % (tp * cp) > 0, "data.reset_at_document_boundaries=false"
    for name, kind in kinds:
        if packed and kind != "a2a":
            change = unpacked if indivisible else f"parallel.{name}=a2a"
            yield (
                f"parallel.{name} {kind} with data.reset_at_document_boundaries: Transformer Engine would split each "
                f"document over the ranks, not the sequence; set {change}, {other}"
            )
        elif kind == "a2a" and indivisible:
            yield (
                f"parallel.{name} a2a splits the {derived.num_query_groups(model)} key/value heads "
                f"(model.num_query_groups): not divisible by tensor {tp} x context {cp}; "
                f"set {f'{unpacked} and ' if packed else ''}parallel.{name}=all_gather, {other}"
            )
