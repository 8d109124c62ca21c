"""Makes DeepSpeed handle a looped model's gradients correctly.

A recomputed region has a separate backward for every loop, so that a parameter in it gets its gradient in several
parts. DeepSpeed reduces a gradient when its hook fires: `GradientParts` holds each parameter back
(`ds_grad_is_ready`) until its last part has arrived. And under sequence parallelism some parameters see a slice of the
sequence on each tensor-parallel rank: their parts are added up first, as megatron-core does at the end of a step.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.config.schema import ParallelConfig, RunConfig
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import Parameter, find, layer_of


class GradientParts:
    """Counts the parts of gradients in each microbatch's backward. Hooks go on the parameters when it is built, which
    must be before DeepSpeed's."""

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
        """The microbatches that follow have so many loops."""
        for name, parameter in self._counted.items():
            self._expected[name] = expected_parts(name, self._config, loop_count)
            parameter.ds_grad_is_ready = self._expected[name] == 1  # type: ignore[attr-defined]

    def _count(self, name: str, parameter: nn.Parameter, grad: Tensor) -> None:
        self._seen[name] += 1
        parameter.ds_grad_is_ready = self._seen[name] == self._expected[name]  # type: ignore[attr-defined]

    def finish_microbatch(self) -> None:
        """After a microbatch's backward: check that every part has arrived, and no more.

        Raises:
            RuntimeError: not so. DeepSpeed would train on without some of the gradient.
        """
        for name, expected in self._expected.items():
            if self._seen[name] != expected:
                raise RuntimeError(f"the gradient of {name} came in {self._seen[name]} parts instead of {expected}")
        self._seen.clear()


def _all_reduce(group: dist.ProcessGroup, grad: Tensor) -> Tensor:
    summed = grad.to(torch.float32, copy=True)
    dist.all_reduce(summed, group=group)
    return summed.to(grad.dtype)


def summed_over_tensor_parallel(name: str, parameter: nn.Parameter, stage: LoopedGPT) -> bool:
    """Whether each tensor-parallel rank has a part of the gradient: megatron-core's own rule."""
    if stage.config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
        return True
    return stage.config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)


def expected_parts(name: str, config: RunConfig, loop_count: int) -> int:
    """In how many parts a parameter's gradient comes in one microbatch's backward through so many loops: one, or in a
    recomputed region one for each loop that uses it. 0: there is none."""
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
    keys, values = derived.later_loops_use_keys(model), derived.later_loops_use_values(model)
    used = {".k_layernorm.": keys, ".key_shift.key": keys, ".key_shift.value": values}
    return loop_count if all(use for part, use in used.items() if part in name) else 1


def _is_recomputed(name: str, parameter: Parameter, parallel: ParallelConfig) -> bool:
    """Whether a looped layer's parameter is used in a recomputed region."""
    if parallel.recompute_granularity != "selective":
        return parallel.recompute_granularity == "full"
    modules = {"core_attn": parameter.in_core_attention, "mlp": ".mlp." in name}  # its norms too; there are no experts
    return any(modules.get(module, False) for module in parallel.recompute_modules)
