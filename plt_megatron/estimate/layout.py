"""How a run is spread over ranks: what every estimate of one rank's memory, time and traffic depends on."""

from __future__ import annotations

from dataclasses import dataclass

from plt_megatron.config.schema import RunConfig

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions, and how one rank runs its microbatches.

    Attributes:
        tensor, pipeline, context, expert, data: ranks along each dimension. `data` does not contain `context`;
            experts are spread over the ranks of `data` (x `context`), as in megatron-core.
        zero_stage: 0 all optimizer state on every data-parallel rank; 1 optimizer state divided (megatron-core's
            distributed optimizer); 2 gradients too; 3 weights too.
        recompute: `none`, `selective` (core attention) or `full` (units of `recompute_num_layers` layers).
        micro_batch_size: sequences.
        microbatches: per optimizer step and data-parallel rank.
        offload_optimizer, offload_weights: kept in the host's memory (DeepSpeed).
        backend: `torch` or `te`.
        on_cpu: gloo and torch's CPU kernels.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1
    recompute: str = "none"
    recompute_num_layers: int = 1
    micro_batch_size: int = 1
    microbatches: int = 1
    overlap_grad_reduce: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    backend: str = "torch"
    on_cpu: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def shards(self) -> int:
        """Ranks that hold the same weights, over which gradients are added up and optimizer state is divided."""
        return self.data * self.context

    def __str__(self) -> str:
        sizes = [("TP", self.tensor), ("PP", self.pipeline), ("CP", self.context), ("EP", self.expert)]
        words = [f"{name}{size}" for name, size in sizes if size > 1 or name in ("TP", "PP")]
        if self.sequence_parallel:
            words.insert(1, "SP")
        words.append(f"DP{self.data}")
        return " ".join(words)


def layout_of(config: RunConfig, world_size: int | None = None, *, on_cpu: bool = False) -> Layout:
    """The layout of a validated configuration on `world_size` ranks (None: as many as it asks for).

    `model.backend: auto` is Transformer Engine on a GPU and torch on a CPU.
    """
    parallel, training = config.parallel, config.training
    context = parallel.context_parallel_size
    deepspeed = config.engine == "deepspeed"
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    data = parallel.data_parallel_size
    if data is None:
        data = 1 if world_size is None else max(1, world_size // (tensor * pipeline * context))
    backend = config.model.backend
    if backend == "auto":
        backend = "torch" if on_cpu else "te"
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=getattr(parallel, "expert_model_parallel_size", 1),
        data=data,
        sequence_parallel=parallel.sequence_parallel,
        zero_stage=config.zero.stage if deepspeed else 1,  # 1: megatron-core's distributed optimizer, always on
        offload_optimizer=deepspeed and config.zero.offload_optimizer == "cpu",
        offload_weights=deepspeed and config.zero.offload_param == "cpu",
        recompute=parallel.recompute_granularity,
        recompute_num_layers=parallel.recompute_num_layers,
        micro_batch_size=training.micro_batch_size,
        microbatches=max(1, training.global_batch_size // (training.micro_batch_size * data)),
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        backend=backend,
        on_cpu=on_cpu,
    )
