"""Parameters that a step of fewer loops does not use: those of later loops, such as gates.

They get no gradient. The optimizer must not take that for a gradient of zero, which would decay them and their moments,
and gradient buckets must not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ParamGroupOverride, ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from torch import nn

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.parameters import only_in_loops

if TYPE_CHECKING:
    from plt_megatron.train.checkpoint.megatron_state import OptimizerPart


def leaves_later_loops_out(config: RunConfig, loop_count: int) -> bool:
    """Whether a step of `loop_count` loops does not use parameters that the model may have."""
    return loop_count == 1 < config.model.loop_count


def later_parameters(stage: nn.Module) -> list[nn.Parameter]:
    """A stage's parameters that only later loops use: without a gradient in a step that leaves those out."""
    return [parameter for name, parameter in stage.named_parameters() if only_in_loops(name)]


def later_loops_override(config: RunConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Parameter groups of their own, with the same settings, for what only later loops use: DeepSpeed and Transformer
    Engine step a group as a whole."""
    decay = config.optimizer.weight_decay
    later = ParamWithNamePredicate("later loops", lambda parameter, name: only_in_loops(name))
    return {ParamKey(with_name_predicate=later): ParamGroupOverride(start_wd=decay, end_wd=decay)}


@contextmanager
def left_alone(parts: Sequence[OptimizerPart], unused: list[nn.Parameter]) -> Iterator[None]:
    """Within it, an optimizer's step changes neither these parameters nor its state of them.

    Call it with the gradients ready. A group of nothing else keeps its count of steps too, where a group has one.
    """
    if not unused:
        yield
        return
    groups = []
    for part in parts:
        part.allocate()  # what no step has updated yet is saved too
        own = [main for parameter in unused if (main := part.own_main_parameter(parameter)) is not None]
        for main in own:
            main.grad = None
        left = {id(main) for main in own}
        groups += [group for group in part.inner.param_groups if {id(main) for main in group["params"]} <= left]
    steps = [(group, group["step"]) for group in groups if "step" in group]
    yield
    for group, step in steps:
        group["step"] = step


class ExpectedGradients:
    """Tells megatron-core's gradient buckets, which are reduced during the last backward pass, what a step will bring.

    They learn from one step how often each parameter's gradient arrives, and wait for just that in all others. Each
    loop count has a number of its own: its first step is reduced at its end and noted here.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        overlapped = ddp.ddp_config.overlap_grad_reduce  # else all are reduced at the end
        self._groups = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups] if overlapped else []
        self._known: dict[int, list[dict[Any, int]]] = {}
        self._last: int | None = None

    def begin(self, loop_count: int, unused: list[nn.Parameter]) -> None:
        """Before a step's first pass, and after the buckets were reset."""
        if self._last is not None and self._last not in self._known:
            self._known[self._last] = [group.golden_per_param_grad_ready_counts for group in self._groups]
        self._last = loop_count
        never = set(unused)
        for number, group in enumerate(self._groups):
            missing = {parameter: 1 for parameter in group.params if parameter in never}
            group.per_param_grad_ready_counts = missing
            # What nothing will arrive for is reduced at the end as well.
            group.is_first_batch = loop_count not in self._known or len(missing) == len(group.params)
            if not group.is_first_batch:
                group.golden_per_param_grad_ready_counts = self._known[loop_count][number]
