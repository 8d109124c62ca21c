"""Optimizer steps and evaluations on megatron-core: its schedules, DistributedDataParallel and optimizer.

The engine knows how to run microbatches through the model in this process's part of the layout. When, how often and on
what data is up to the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.config.rules.optimizer import optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch
from plt_megatron.model.parameters import find, hidden_matrix
from plt_megatron.model.pipeline import (
    LoopChunk,
    MicroBatches,
    StepState,
    build_chunks,
    renew_weight_copies,
    step_state_unchanged,
)
from plt_megatron.model.transformer_config import schedule_config
from plt_megatron.train.checkpoint.megatron_state import MegatronState, OptimizerPart
from plt_megatron.train.checkpoint.state import later_parameters
from plt_megatron.train.engine import (
    Engine,
    StepResult,
    leaves_later_loops_out,
    masked_loss,
    summed_over_tensor_parallel,
)
from plt_megatron.train.optimizers import LearningRate, build_optimizer, distributed_parts, squared_grad_norm


class MegatronEngine(Engine):
    """The `Engine` on megatron-core."""

    state: MegatronState

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        matrices = hidden_matrices(self.stage) if optimizer_spec(config.optimizer).matrix_state is not None else []
        self.ddp = wrap_ddp(
            self.stage,
            config.parallel.overlap_grad_reduce,
            overlap_param_gather=derived.overlap_param_gather(config),
            whole=matrices,
        )
        self.optimizer = build_optimizer(config, self.ddp)
        self.scheduler = LearningRate(config, self.optimizer)
        self.state = MegatronState(config, self.stage, distributed_parts(self.optimizer), matrices)
        overlapped = self.ddp.ddp_config.overlap_grad_reduce  # otherwise all are reduced at the end
        self._expected = ExpectedGradients(self._bucket_groups if overlapped else [])
        self._replicas = unreduced_replicas(self.stage)
        self._counted_share = torch.ones(1, device=torch.cuda.current_device())
        self._chunks: dict[int, tuple[list[LoopChunk], Any]] = {}

    def _step(self, batches: list[MicroBatch], accept: Callable[[float, float], bool], loop_count: int) -> StepResult:
        self.stage.train()
        leaves_out = leaves_later_loops_out(self.config, loop_count)
        unused = later_parameters(self.stage) if leaves_out else []
        before = StepState(self.stage)
        zero_gradients(self.ddp)
        self.optimizer.zero_grad()
        self._expected.begin(loop_count, unused)
        with self.times.measure("forward_backward"):
            if self.stage.config.moe_aux_loss_coeff or self.stage.config.moe_z_loss_coeff:
                self._counted_share = self._share_that_counts(batches)
            total = self._run(batches, loop_count, forward_only=False)
            self.optimizer.prepare_grads()
            # The only point in a step where the host waits for the GPU.
            *sums, squared = torch.cat((total, squared_grad_norm(self.optimizer))).tolist()
        result = self._mean(sums, squared**0.5)
        with self.times.measure("optimizer"):
            result.updated = accept(result.loss, result.grad_norm)
            if result.updated:
                self._clip(result.grad_norm)
                with left_alone(self.state.parts, unused):
                    self.optimizer.step_with_ready_grads()
                self.state.step += 1
                self.state.later_step += not leaves_out
            else:
                before.restore()
        return result

    def _share_that_counts(self, batches: list[MicroBatch]) -> Tensor:
        """Return the share of the step's tokens that count in the loss, float32 [1], equal on all ranks.

        megatron-core multiplies experts' auxiliary losses by the number of all tokens, but divides gradients by the
        number that counts. Times the whole step's share, their means weigh the same with any loss mask, in any layout.
        """
        own = sum(batch.tokens.numel() for batch in batches)
        return (self._count_tokens(batches) / (self.groups.dp.size() * own)).float()

    def _clip(self, grad_norm: float) -> None:
        if self.config.optimizer.clip_grad == 0:
            return
        for optimizer in distributed_parts(self.optimizer):
            if parameters := optimizer.get_parameters():  # a rank may own none, and the kernel reads the first
                clip_grad_by_total_norm_fp32(parameters, self.config.optimizer.clip_grad, grad_norm)

    def evaluate(self, batches: list[MicroBatch], loop_count: int) -> tuple[float, int]:
        self.stage.eval()
        with torch.no_grad(), step_state_unchanged(self.stage):
            loss_sum, tokens, *_ = self._run(batches, loop_count, forward_only=True).tolist()
            return loss_sum, int(tokens)

    @torch.no_grad()
    def gather_parameters(self) -> None:
        if self.ddp.ddp_config.overlap_param_gather:
            for group in self._bucket_groups:
                if not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)

    @torch.no_grad()
    def share_parameters(self) -> None:
        for group in self._bucket_groups:
            group.start_param_sync(force_sync=True)

    @torch.no_grad()
    def _await_gathering(self) -> None:
        """Wait for buckets that no layer has waited for: a one-loop evaluation skips the gates."""
        for group in self._bucket_groups:
            if group.param_gather_handle is not None:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    @property
    def _bucket_groups(self) -> list[Any]:
        return self.ddp.bucket_groups + self.ddp.expert_parallel_bucket_groups

    def _run(self, batches: list[MicroBatch], loop_count: int, forward_only: bool) -> Tensor:
        """Run the schedule and return `_reduce`'s sums."""
        chunks, config = self._schedule(loop_count)
        for chunk in chunks:
            chunk.rewind()
        renew_weight_copies(self.stage)
        shared = MicroBatches([batch.shard_for_cp(self.stage.context_rows) for batch in batches])
        virtual = config.virtual_pipeline_model_parallel_size
        schedule = get_forward_backward_func(pp_size=config.pipeline_model_parallel_size, vp_size=virtual)
        rows, length = batches[0].tokens.shape
        results = schedule(
            forward_step_func=self._forward_step,
            data_iterator=[shared] * len(chunks) if virtual else shared,
            model=chunks if virtual else chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        if forward_only:
            self._await_gathering()
        return self._reduce(results)

    def _schedule(self, loop_count: int) -> tuple[list[LoopChunk], Any]:
        if loop_count not in self._chunks:
            config = schedule_config(self.stage.config, loop_count)
            config.no_sync_func = self.ddp.no_sync
            config.finalize_model_grads_func = self._finalize
            config.grad_scale_func = None
            config.moe_grad_scale_func = lambda: self._counted_share
            self._chunks[loop_count] = build_chunks(self.stage, config, loop_count), config
        return self._chunks[loop_count]

    def _forward_step(self, batches: MicroBatches, chunk: LoopChunk) -> tuple[Tensor, Callable]:
        self.on_progress()
        output, batch = chunk(batches)
        return output, partial(masked_loss, batch.loss_mask)

    def _finalize(self, chunks: list[LoopChunk], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        # The chunks are views of one stage, so its gradients are reduced once.
        self.on_progress()
        with self.times.measure("gradient_reduction"):  # nested in forward_backward
            finalize_model_grads([self.ddp], num_tokens, **kwargs)
            self._share_gradients_of_replicas()

    @torch.no_grad()
    def _share_gradients_of_replicas(self) -> None:
        """Give all tensor-parallel ranks the first one's gradients of what each holds whole. Each has its own
        data-parallel group, and NCCL promises no order of summation that is the same in all: copies would drift."""
        if not self._replicas:
            return
        gradients = [parameter.main_grad for parameter in self._replicas]  # type: ignore[attr-defined]
        shared = torch.cat([gradient.flatten() for gradient in gradients])
        dist.broadcast(shared, group=self.groups.tp, group_src=0)
        for gradient, part in zip(gradients, shared.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def left_alone(parts: Sequence[OptimizerPart], unused: list[nn.Parameter]) -> Iterator[None]:
    """Keep an optimizer's step within this block from changing these parameters and their state.

    Enter it with the gradients ready. A group with no other parameters also keeps its step count, if it has one.
    """
    if not unused:
        yield
        return
    groups = []
    for part in parts:
        part.allocate()  # state that no step has updated yet is saved too
        own = part.main_parameters(unused)
        for main in own:
            main.grad = None
        left = {id(main) for main in own}
        groups += [group for group in part.inner.param_groups if {id(main) for main in group["params"]} <= left]
    steps = [(group, group["step"]) for group in groups if "step" in group]
    yield
    for group, step in steps:
        group["step"] = step


class ExpectedGradients:
    """Tells megatron-core's gradient buckets, reduced during the last backward pass, which gradients to expect.

    The buckets learn from one step how often each parameter's gradient arrives, and wait for just that in all others.
    The numbers differ between loop counts: the first step of each is reduced at its end, and its numbers noted here.
    """

    def __init__(self, groups: list[Any]) -> None:
        self._groups = groups
        self._known: dict[int, list[dict[Any, int]]] = {}
        self._last: int | None = None

    def begin(self, loop_count: int, unused: list[nn.Parameter]) -> None:
        """Prepare the buckets before a step's first pass, after they were reset."""
        if self._last is not None and self._last not in self._known:
            self._known[self._last] = [group.golden_per_param_grad_ready_counts for group in self._groups]
        self._last = loop_count
        never = set(unused)
        for number, group in enumerate(self._groups):
            missing = {parameter: 1 for parameter in group.params if parameter in never}
            group.per_param_grad_ready_counts = missing
            # A bucket that gets no gradients at all is reduced at the end as well.
            group.is_first_batch = loop_count not in self._known or len(missing) == len(group.params)
            if not group.is_first_batch:
                group.golden_per_param_grad_ready_counts = self._known[loop_count][number]


def unreduced_replicas(stage: LoopedGPT) -> list[nn.Parameter]:
    """Return the trained parameters that each of several tensor-parallel ranks holds whole, and whose gradients
    megatron-core does not sum over these ranks, after which they are equal."""
    if stage.pg_collection.tp.size() == 1:
        return []
    return [
        parameter
        for name, parameter in stage.named_parameters()
        if parameter.requires_grad
        and find(stage.config.plt, name).is_replicated
        and not summed_over_tensor_parallel(name, parameter, stage)
    ]


def zero_gradients(ddp: DistributedDataParallel) -> None:
    """Zero the gradient buffers for a step.

    A layer with fused gradient accumulation returns dummy gradients to autograd, which DistributedDataParallel counts
    if it overlaps the reduction. Without overlap they would only cost memory, since autograd adds up those of all loops
    in one graph. Transformer Engine returns none for a weight that lacks the attribute.
    """
    ddp.zero_grad_buffer()
    if ddp.config.gradient_accumulation_fusion and not ddp.ddp_config.overlap_grad_reduce:
        for module in ddp.module.modules():
            if getattr(module, "fuse_wgrad_accumulation", False):
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad and name.startswith("weight"):  # several experts: weight0, weight1 ..
                        del parameter.grad_added_to_main_grad


def hidden_matrices(stage: MegatronModule) -> list[nn.Parameter]:
    """Return a stage's parameters that a matrix optimizer updates."""
    named = stage.named_parameters()
    return [each for name, each in named if each.requires_grad and hidden_matrix(name) is not None]


def wrap_ddp(
    stage: MegatronModule,
    overlap_grad_reduce: bool,
    *,
    overlap_param_gather: bool = False,
    whole: Sequence[nn.Parameter] = (),
) -> DistributedDataParallel:
    """Wrap a stage in one DistributedDataParallel: its loops share the weights and so the gradient buffers.

    With overlap, a bucket is reduced when each of its parameters has received as many gradients as in the first step
    after synchronization was enabled; loops and recomputation change that count, but it stays constant across steps.
    The first layer that uses a bucket of weights waits for it, in whichever loop, and the bucket counts as gathered
    until the gradients of the step have been reduced.

    `whole`: parameters that the distributed optimizer must not divide; they get their own buffers, each on one rank.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        use_distributed_optimizer=True,
        average_in_collective=False,
    )
    data_parallel_size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    buckets = overlap_grad_reduce and parallel_state.is_pipeline_first_stage()
    with _in_buffers_of_their_own(whole):
        # The distributed optimizer's own layout, except for these parameters.
        layout = LayerWiseDistributedOptimizer.compute_full_param_layout(
            [parameter for parameter in stage.parameters() if parameter.requires_grad],
            derived.bucket_elements(data_parallel_size) if buckets else None,
            data_parallel_size,
            ddp_config,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
        return DistributedDataParallel(stage.config, ddp_config, stage, full_param_layout=layout)


@contextmanager
def _in_buffers_of_their_own(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Mark parameters that get their own buffers. megatron-core reads the mark here; later, its distributed optimizer
    would leave marked buckets to another class, whose checkpoints cannot be resharded."""
    for parameter in parameters:
        parameter.is_managed_by_layer_wise_optimizer = True  # type: ignore[attr-defined]
    yield
    for parameter in parameters:
        del parameter.is_managed_by_layer_wise_optimizer  # type: ignore[attr-defined]
