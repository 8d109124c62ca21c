"""Loops as virtual pipeline stages: loop l of a stage is model chunk l of megatron-core's interleaved schedule.

All chunks of a rank share the stage's weights; a chunk is a view that knows its loop. The last stage's output of loop l
arrives at the first stage as the input of loop l+1, exactly as in cross-loop parallelism. The bubble shrinks to
(P - 1) / (L * M) of the work, without extra memory for weights.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import ModelType
from torch import Tensor, nn

from plt_megatron.model.loop_context import LoopContext
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch


class MicroBatches:
    """The microbatches of one step on this rank, with the context that joins each one's loops.

    The chunks request them by index, each in its own order.
    """

    def __init__(self, batches: list[MicroBatch]) -> None:
        self.batches = batches
        self._contexts: list[LoopContext | None] = [None] * len(batches)

    def context(self, index: int, loop: int, loop_count: int) -> LoopContext:
        """Return the context of microbatch `index` in `loop`. It is dropped here after the last loop, so that autograd
        alone decides how long K and V live."""
        context = (self._contexts[index] or self.batches[index].context(loop_count)).at_loop(loop)
        self._contexts[index] = None if context.is_last_loop else context
        return context


class LoopChunk(nn.Module):
    """One loop of a stage, as the schedule's model chunk. Owns no parameters.

    Args:
        stage: the stage whose weights it runs.
        config: the schedule's configuration (virtual pipeline size = loops).
        loop: 1 for the first; None runs all loops at once (a model in one stage).
        loop_count: loops of this schedule.
    """

    def __init__(self, stage: LoopedGPT, config: Any, loop: int | None, loop_count: int) -> None:
        super().__init__()
        self._stage = (stage,)  # in a tuple, so that it is not a submodule: a chunk is a view
        self.config = config
        self.loop = loop
        self.loop_count = loop_count
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = None if loop is None or loop_count == 1 else loop - 1
        self.input_tensor: Tensor | None = None
        self._next = 0

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the previous stage's output; called by the schedule before each forward."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.input_tensor = input_tensor

    def rewind(self) -> None:
        """Restart with the first microbatch."""
        self._next = 0

    def forward(self, batches: MicroBatches) -> tuple[Tensor, MicroBatch]:
        """Run this loop over the next microbatch and return (hidden states or losses, the microbatch)."""
        index, self._next = self._next, self._next + 1
        batch = batches.batches[index]
        if self.loop is None:
            return self._stage[0](batch, self.loop_count), batch
        context = batches.context(index, self.loop, self.loop_count)
        return self._stage[0].run_loop(batch, context, self.input_tensor), batch


def build_chunks(stage: LoopedGPT, config: Any, loop_count: int) -> list[LoopChunk]:
    """Return the schedule's model chunks: one per loop in a pipeline, one for all loops in a single stage."""
    if stage.pre_process and stage.post_process:
        return [LoopChunk(stage, config, None, loop_count)]
    return [LoopChunk(stage, config, loop, loop_count) for loop in range(1, loop_count + 1)]
