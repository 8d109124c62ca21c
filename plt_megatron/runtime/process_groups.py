"""Process groups: torch.distributed from the launcher's environment, then megatron-core's parallel groups."""

from __future__ import annotations

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.schema import ParallelConfig
from plt_megatron.errors import UserError


def init_process_groups(parallel: ParallelConfig) -> None:
    """Join the job that `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` describe (without a rank or an
    address, a job of one process) and build the tensor, pipeline, context and data-parallel groups.

    Raises:
        UserError: the layout does not fill the world.
    """
    from megatron.core import parallel_state

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = ParallelLayout.of(parallel, world_size)
    problem = layout.world_size_problem(world_size)
    if problem is not None:
        raise UserError(f"parallel: {problem}")
    # The watchdog ends a hung job, and names the rank: collectives, which blame those that wait, give up later.
    longest = max(60 * parallel.distributed_timeout_minutes, parallel.distributed_timeout_seconds_after_init)
    timeout = timedelta(seconds=2 * longest + 60)
    if not dist.is_initialized():
        _init_torch_distributed(world_size, timeout)
    parallel_state.initialize_model_parallel(
        **layout.megatron_sizes,
        expert_tensor_parallel_size=1,  # experts are not split, but distributed over tensor-parallel ranks too
        # Needed only for checkpoints gathered on the host, unlike ours; each group costs connections at start.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
    )


def _init_torch_distributed(world_size: int, timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world_size == 1 and not os.environ.keys() >= {"RANK", "MASTER_ADDR"}:  # a shell may export an address alone
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def destroy_process_groups() -> None:
    """Leave the job; the process can then join another."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
