"""How long the rows are that each step of a run reads its samples as: `data.length_schedule`.

A sample has `data.sequence_length` tokens throughout. In a stage of shorter rows it is read as several, each with a
context of its own; samples, their order, batches and all that counts tokens stay as they are. As with the batches, a
function of the configuration and of the tokens that the run has trained on.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator

from plt_megatron.config.schedules import find_order_problems
from plt_megatron.config.schema import RunConfig


class LengthSchedule:
    """The row lengths of a run's steps. Without a schedule, `data.sequence_length` in all of them.

    A length holds from the first step that begins at or after the number of tokens given for it.

    Attributes:
        lengths: in tokens, in their order; the last one is `data.sequence_length`.

    Args:
        config: validated.
    """

    def __init__(self, config: RunConfig) -> None:
        stages = config.data.length_schedule
        self._ends = [stage.until for stage in stages]
        self.lengths = [*(stage.sequence_length for stage in stages), config.data.sequence_length]

    def sequence_length(self, tokens: int) -> int:
        """Tokens of a row in the step that follows `tokens`."""
        return self.lengths[bisect_right(self._ends, tokens)]

    def stretches(self, tokens: int, step_tokens: int, steps: int) -> Iterator[tuple[int, int]]:
        """(length, number) of successive steps of one length among `steps` steps of `step_tokens` each that follow
        `tokens`."""
        while steps:
            number = bisect_right(self._ends, tokens)
            taken = steps
            if number < len(self._ends):
                taken = min(steps, -((tokens - self._ends[number]) // step_tokens))
            yield self.lengths[number], taken
            tokens, steps = tokens + taken * step_tokens, steps - taken


def with_sequence_length(config: RunConfig, length: int) -> RunConfig:
    """The run whose every step reads as many tokens in rows of `length`: what a step of them costs."""
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
    """The problems of a schedule whose single numbers are in range, one line each. What its lengths must be divisible
    by is checked with the layout."""
    longest = config.data.sequence_length
    for number, stage in enumerate(config.data.length_schedule):
        if stage.sequence_length >= longest or longest % stage.sequence_length:
            yield (
                f"data.length_schedule[{number}].sequence_length {stage.sequence_length}: samples have "
                f"data.sequence_length {longest} tokens and are read as several rows of equal length; give a smaller "
                "number that divides it"
            )
    yield from find_order_problems("data.length_schedule", config.data.length_schedule)
