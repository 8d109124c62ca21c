"""One optimizer step of a run as its ranks see it: the input of the memory, traffic and time estimates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.activations import Activations
from plt_megatron.predict.flops import Flops, step_flops_per_token
from plt_megatron.predict.held import Stage, stages_of
from plt_megatron.predict.layout import Layout
from plt_megatron.predict.parameters import FFN, Weights


@dataclass(frozen=True)
class Step:
    """An optimizer step with a certain number of loops, microbatches and tokens per row.

    Attributes:
        config: the run's configuration, with this step's loops and row length.
        layout: the run's layout, with this step's microbatches.
        vocab_size: the tokenizer's.
        stages: parameters that the ranks hold; the step may not use all of them.
    """

    config: RunConfig
    layout: Layout
    vocab_size: int
    stages: Sequence[Stage]

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, vocab_size: int) -> Self:
        """Describe a step of the configuration as it stands, with all loops."""
        return cls(config, layout, vocab_size, stages_of(config, layout, vocab_size))

    @cached_property
    def shapes(self) -> Activations:
        """Sizes of a microbatch on one rank."""
        return Activations.of(self.config, self.layout, self.vocab_size)

    @cached_property
    def largest(self) -> Stage:
        """The stage with the most parameters."""
        return max(self.stages, key=lambda stage: stage.parameters.total)

    @property
    def padded_vocab_size(self) -> int:
        return derived.padded_vocab_size(self.config.model, self.vocab_size, self.layout.tensor)

    @cached_property
    def flops(self) -> Flops:
        """Training FLOPs per token."""
        return step_flops_per_token(self.config, self.padded_vocab_size, self.config.model.loop_count)

    def stage_flops(self, stage: Stage) -> Flops:
        """Return a pipeline stage's training FLOPs per token."""
        return share_of_stage(self.flops, self.config, self.layout, stage.index)

    @cached_property
    def slowest(self) -> Stage:
        """The stage with the most FLOPs, which sets the pipeline's pace."""
        return max(self.stages, key=lambda stage: self.stage_flops(stage).total)

    def losses(self, stage: Stage) -> list[int]:
        """Return the loops that end in a loss, hence an output layer, in this stage."""
        last = stage is self.stages[-1]
        return derived.loops_with_loss(self.config, self.config.model.loop_count) if last else []


def share_of_stage(flops: Flops, config: RunConfig, layout: Layout, stage: int) -> Flops:
    """Return a pipeline stage's part of the FLOPs: its layers and, in the last stage, the output layer."""
    model, layers = config.model, layout.stage_layers(config.model.num_layers)[stage]
    weights = Weights(model)
    ffn = flops.ffn * weights.matmuls(layers, *FFN) / weights.matmuls(range(model.num_layers), *FFN)
    output = flops.output if stage == layout.pipeline - 1 else 0.0
    return dataclasses.replace(flops.times(len(layers) / model.num_layers), ffn=ffn, output=output)
