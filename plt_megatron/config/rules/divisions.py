"""What must be divisible: heads by groups, sizes and rows by ranks, batches by what a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from plt_megatron.config import derived
from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.schema import ModelConfig, RunConfig


class _Division(NamedTuple):
    """`what`, of this `size`, must be divisible by the number `by`, which `words` say with what may be changed."""

    what: str
    size: int
    by: int
    words: str


def find_problems(config: RunConfig, layout: ParallelLayout, *, fills: bool) -> Iterator[str]:
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
