"""The pipeline schedule of one rank: the order in which megatron-core runs loops of microbatches forward and backward.

Loops are the model chunks of its interleaved schedule (docs/decisions.md). A single stage runs all loops of a
microbatch forward, then backward.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of a microbatch through a stage: through loop `loop`, or all where it is 0."""

    microbatch: int
    loop: int
    backward: bool


def bubble_fraction(pipeline: int, loops: int, microbatches: int) -> float:
    """Idle time over working time: (P - 1) / (L M)."""
    return (pipeline - 1) / (loops * microbatches)


def passes(pipeline: int, stage: int, loops: int, microbatches: int) -> list[Pass]:
    """The passes of a stage in one step, in order.

    The steady state repeats, so callers that need the peak may use fewer microbatches:
    `enough_microbatches`.
    """
    if pipeline == 1:
        return [Pass(index, 0, backward) for index in range(microbatches) for backward in (False, True)]
    if loops == 1:
        forward = [(index, 1) for index in range(microbatches)]
        warmup, backward = pipeline - stage - 1, forward
    else:
        groups = [range(first, min(first + pipeline, microbatches)) for first in range(0, microbatches, pipeline)]
        forward = [(index, loop) for group in groups for loop in range(1, loops + 1) for index in group]
        backward = [(index, loop) for group in groups for loop in range(loops, 0, -1) for index in group]
        warmup = (pipeline - stage - 1) * 2 + (loops - 1) * pipeline
    warmup = min(warmup, len(forward))
    order = [Pass(*each, backward=False) for each in forward[:warmup]]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        order += [Pass(*ahead, backward=False), Pass(*behind, backward=True)]
    return order + [Pass(*each, backward=True) for each in backward[len(forward) - warmup :]]


def enough_microbatches(pipeline: int, microbatches: int) -> int:
    """A number of microbatches that shows the same peak as all of them."""
    return min(microbatches, 2 if pipeline == 1 else 3 * pipeline)
