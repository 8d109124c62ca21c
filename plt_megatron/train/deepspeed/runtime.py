"""Makes DeepSpeed work in our process and with a looped model: device, process groups, gradients, no compilation.

DeepSpeed's own launcher is never used: DeepSpeed joins the groups that `runtime/process_groups.py` made.

A recomputed region has a separate backward for every loop, so a parameter in it gets its gradient in several parts.
DeepSpeed reduces a gradient when its hook fires: `GradientParts` holds each parameter back (`ds_grad_is_ready`) until
its last part has arrived. Under sequence parallelism some parameters see a slice of the sequence on each
tensor-parallel rank: their parts are added up first, as megatron-core does at the end of a step.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.config.schema import ParallelConfig, RunConfig
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import Parameter, find, layer_of
from plt_megatron.runtime.cpu_runtime import is_cpu_runtime
from plt_megatron.train.engine import summed_over_tensor_parallel

_engines: weakref.WeakSet[Any] = weakref.WeakSet()  # of this process, while they live


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed and set it up for this machine. It is an extra, imported nowhere else at import time."""
    if is_cpu_runtime():
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Otherwise DeepSpeed has torch count devices to detect CUDA; the CPU runtime reports one.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")  # required although the device is already chosen
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if is_cpu_runtime():
        # Otherwise it compiles a helper for collectives when it starts, which takes a minute, and a killed build leaves
        # a lock that later runs hang on. Replaced as a whole: the original is a probe that runs compilers when first
        # accessed.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def join_process_groups(deepspeed: ModuleType) -> None:
    """Make DeepSpeed use the current process groups and forget earlier ones."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    assert dist.is_initialized()
    for engine in _engines:
        engine.destroy()  # autograd nodes hold its hooks, and so all of it, with process groups and their threads
    _engines.clear()
    # Ids continue from one engine to the next, and ranks compare them. The module stack would keep engines alive.
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

    Without it DeepSpeed silently takes tensor-parallel ranks for data-parallel ones.
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


def start_deepspeed(
    deepspeed: ModuleType, model: nn.Module, parameter_groups: list[dict[str, Any]], config: dict[str, Any]
) -> Any:
    """Build DeepSpeed's engine around a model, with its own configuration and torch's parameter groups."""
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    class ZeroEngine(deepspeed.DeepSpeedEngine):  # type: ignore[name-defined,misc]
        """Engine that uses DeepSpeed's ZeRO for stage 1 in BF16 too. DeepSpeed itself would choose another optimizer
        there, which reduces whole gradients and has a different interface throughout."""

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


class GradientParts:
    """Counts the parts of gradients in each microbatch's backward. Construction puts hooks on the parameters and must
    precede DeepSpeed's."""

    def __init__(self, stage: LoopedGPT, config: RunConfig) -> None:
        self._config = config
        self._counted: dict[str, nn.Parameter] = {}
        self._expected: dict[str, int] = {}
        self._seen: Counter[str] = Counter()
        group = stage.pg_collection.tp
        for name, parameter in stage.named_parameters():
            if group.size() > 1 and summed_over_tensor_parallel(name, parameter, stage):
                parameter.register_hook(partial(_all_reduce, group))
            parameter.ds_grad_is_ready = True  # type: ignore[attr-defined]
            if any(expected_parts(name, config, loops) > 1 for loops in range(2, config.model.loop_count + 1)):
                self._counted[name] = parameter
                parameter.register_hook(partial(self._count, name, parameter))

    def expect(self, loop_count: int) -> None:
        """Expect microbatches with this many loops from now on."""
        for name, parameter in self._counted.items():
            self._expected[name] = expected_parts(name, self._config, loop_count)
            parameter.ds_grad_is_ready = self._expected[name] == 1  # type: ignore[attr-defined]

    def _count(self, name: str, parameter: nn.Parameter, grad: Tensor) -> None:
        self._seen[name] += 1
        parameter.ds_grad_is_ready = self._seen[name] == self._expected[name]  # type: ignore[attr-defined]

    def finish_microbatch(self) -> None:
        """Check after a microbatch's backward that every part has arrived, and no more.

        Raises:
            RuntimeError: if not: DeepSpeed would train on without some of the gradient.
        """
        for name, expected in self._expected.items():
            if self._seen[name] != expected:
                raise RuntimeError(f"the gradient of {name} arrived in {self._seen[name]} parts instead of {expected}")
        self._seen.clear()


def _all_reduce(group: dist.ProcessGroup, grad: Tensor) -> Tensor:
    summed = grad.to(torch.float32, copy=True)
    dist.all_reduce(summed, group=group)
    return summed.to(grad.dtype)


def expected_parts(name: str, config: RunConfig, loop_count: int) -> int:
    """Return in how many parts a parameter's gradient arrives in one microbatch's backward through `loop_count` loops:
    one or, in a recomputed region, one for each loop that uses it. 0 means no gradient."""
    model = config.model
    parameter = find(model, name)
    if loop_count == 1 and parameter.only_in_loops:
        # A gate that reads hidden states is computed in the first loop too, and gets zeros.
        return int(parameter.component == "gates" and model.gate_input == "hidden")
    if loop_count == 1 or layer_of(name) not in derived.looped_layers(model):
        return 1
    if not _is_recomputed(name, parameter, config.parallel):
        return 1
    if parameter.in_core_attention:
        return loop_count - 1  # unused in the first loop
    if ".k_layernorm." in name or parameter.mixes_tokens == "key":
        used = derived.later_loops_use_keys(model)
    else:
        used = parameter.mixes_tokens != "value" or derived.later_loops_use_values(model)
    return loop_count if used else 1


def _is_recomputed(name: str, parameter: Parameter, parallel: ParallelConfig) -> bool:
    """Return whether a looped layer's parameter is used in a recomputed region."""
    if parallel.recompute_granularity != "selective":
        return parallel.recompute_granularity == "full"
    modules = {"core_attn": parameter.in_core_attention, "mlp": ".mlp." in name}  # norms included; there are no experts
    return any(modules.get(module, False) for module in parallel.recompute_modules)
