"""megatron-core's groups for a single process, on the CPU runtime, on machines with a GPU too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

enter_cpu_runtime(force=True)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Process groups of one rank, for as long as a module's tests run."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from plt_megatron.config.schema import ParallelConfig
    from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        init_process_groups(ParallelConfig())
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        # Of the process: a backward pass without a schedule leaves one of no dimension, which a schedule cannot set.
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        yield
        destroy_process_groups()
    torch.set_num_threads(threads)
