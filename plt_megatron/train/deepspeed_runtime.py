"""Sets DeepSpeed up in our process: device, process groups, and no compiled extensions.

DeepSpeed's own launcher is never used: it joins the groups that `runtime/process_groups.py` made.
"""

from __future__ import annotations

import logging
import os
import weakref
from types import ModuleType
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from plt_megatron.runtime.cpu_runtime import is_cpu_runtime

_engines: weakref.WeakSet[Any] = weakref.WeakSet()  # of this process, while they live


def import_deepspeed() -> ModuleType:
    """DeepSpeed, ready for this machine. It is an extra of the project, imported nowhere else at import time."""
    if is_cpu_runtime():
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Else DeepSpeed has torch count devices to see whether there is CUDA; the CPU runtime answers one.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")  # required although the device is already chosen
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if is_cpu_runtime():
        # Else it compiles a helper for collectives when it starts: a minute, and a lock that a killed build leaves, at
        # which later runs hang. Assigned whole: what is there is a probe that runs compilers when first looked at.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def join_process_groups(deepspeed: ModuleType) -> None:
    """Make DeepSpeed use the current process groups and forget earlier ones."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    assert dist.is_initialized()
    for engine in _engines:
        engine.destroy()  # autograd's nodes hold its hooks, and so all of it, process groups and their threads included
    _engines.clear()
    # Numbers go on from one engine to the next, and ranks compare them. Engines would live on in the stack.
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    partition_parameters.Init.param_id = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    deepspeed.comm.comm.cdb = None
    groups.mpu = None
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
    groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = None
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class ModelParallelUnit:
    """megatron-core's process groups under the names that DeepSpeed asks for.

    Without it DeepSpeed takes tensor-parallel ranks for data-parallel ones, silently.
    """

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


def start_deepspeed(
    deepspeed: ModuleType, model: nn.Module, parameter_groups: list[dict[str, Any]], config: dict[str, Any]
) -> Any:
    """DeepSpeed's engine around a model.

    Args:
        parameter_groups: as torch's optimizers take them.
        config: DeepSpeed's.
    """
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    class ZeroEngine(deepspeed.DeepSpeedEngine):  # type: ignore[name-defined,misc]
        """Stage 1 in BF16 with DeepSpeed's ZeRO as well. Its own choice there is another optimizer, which reduces whole
        gradients and has other ways to everything."""

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            super()._do_optimizer_sanity_check(basic_optimizer)
            return ZERO_OPTIMIZATION

    unit = ModelParallelUnit()
    engine = ZeroEngine(
        args=None,
        model=model,
        model_parameters=parameter_groups,
        mpu=unit,
        dist_init_required=False,
        config=config,
        config_class=deepspeed.DeepSpeedConfig(config, unit),
    )
    _engines.add(engine)
    return engine
