"""Parameters that a step with fewer loops does not use: those of later loops, such as gates.

They get no gradient. The optimizer must not treat that as a zero gradient, which would decay them and their moments,
and gradient buckets must not wait for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.parameters import only_in_loops

if TYPE_CHECKING:
    from plt_megatron.train.checkpoint.megatron_state import OptimizerPart


def leaves_later_loops_out(config: RunConfig, loop_count: int) -> bool:
    """Return whether a step of `loop_count` loops leaves parameters unused that the model may have."""
    return loop_count == 1 < config.model.loop_count


def later_parameters(stage: nn.Module) -> list[nn.Parameter]:
    """Return a stage's parameters that only later loops use; a step that skips those loops gives them no gradient."""
    return [parameter for name, parameter in stage.named_parameters() if only_in_loops(name)]


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

    def __init__(self, ddp: DistributedDataParallel) -> None:
        overlapped = ddp.ddp_config.overlap_grad_reduce  # otherwise all are reduced at the end
        self._groups = [*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups] if overlapped else []
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
