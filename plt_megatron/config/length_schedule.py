"""Row length of each step of a run: `data.length_schedule`.

A sample always has `data.sequence_length` tokens. In a stage of shorter rows it is read as several rows, each with its
own context; samples, their order, batch sizes and all token counts stay the same. Like the batch size, the row length
depends only on the configuration and on the tokens trained so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plt_megatron.config import schedules
from plt_megatron.config.schema import RunConfig


class LengthSchedule(schedules.TokenSchedule):
    """Row length of each step of a run; `data.sequence_length` throughout without a schedule.

    Attributes:
        lengths: row lengths in tokens, in order of use; the last one is `data.sequence_length`.

    Args:
        config: validated configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        stages = config.data.length_schedule
        self.lengths = [*(stage.sequence_length for stage in stages), config.data.sequence_length]
        super().__init__([stage.until for stage in stages], self.lengths)

    def sequence_length(self, tokens: int) -> int:
        """Return the tokens per row in the step that follows `tokens`."""
        return self.value(tokens)

    def stretches(self, tokens: int, step_tokens: int, steps: int) -> Iterator[tuple[int, int]]:
        """Return (length, number of steps) for each stretch of equal row length among the `steps` steps of
        `step_tokens` tokens each that follow `tokens`."""
        return self.value_stretches(tokens, lambda _: step_tokens, steps=steps)


def with_sequence_length(config: RunConfig, length: int) -> RunConfig:
    """Return the configuration with rows of `length` and as many tokens per step, to estimate what a step costs."""
    rows, training = config.data.sequence_length // length, config.training
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length=length, length_schedule=[]),
        training=dataclasses.replace(
            training,
            micro_batch_size=rows * training.micro_batch_size,
            global_batch_size=rows * training.global_batch_size,
        ),
    )


# ---------------------------------------------------------------- checks


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield a schedule's problems, one line each, assuming that each number is in range. Divisibility of the lengths
    is checked with the layout."""
    longest = config.data.sequence_length
    for number, stage in enumerate(config.data.length_schedule):
        if stage.sequence_length >= longest or longest % stage.sequence_length:
            yield (
                f"data.length_schedule[{number}].sequence_length {stage.sequence_length}: samples have "
                f"data.sequence_length {longest} tokens and are read as several rows of equal length; give a smaller "
                "number that divides it"
            )
    yield from schedules.find_problems("data.length_schedule", config.data.length_schedule)
