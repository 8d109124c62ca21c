"""Batch size of each step of a run: `training.batch_schedule`.

It depends only on the configuration and on the tokens trained so far. Without any state, all ranks agree, a resumed run
continues as it would have, and estimates know a run's steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from plt_megatron.config import schedules
from plt_megatron.config.schema import BatchStage, RunConfig

MAX_INCREMENTS = 10_000  # per stage


class BatchSchedule(schedules.TokenSchedule):
    """Batch size of each step of a run; `training.global_batch_size` throughout without a schedule.

    Attributes:
        sizes: batch sizes in sequences, in order of use; the last one is `training.global_batch_size`.

    Args:
        config: validated configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        training = config.training
        self._length = config.data.sequence_length
        ends: list[int] = []  # tokens at which each size but the last ends
        self.sizes: list[int] = []
        start, sizes_after = 0, [stage.global_batch_size for stage in training.batch_schedule[1:]]
        sizes_after.append(training.global_batch_size)
        for stage, after in zip(training.batch_schedule, sizes_after, strict=False):  # one size more without stages
            sizes = stage_sizes(stage, after)
            ends += [start + (stage.until - start) * part // len(sizes) for part in range(1, len(sizes) + 1)]
            self.sizes += sizes
            start = stage.until
        self.sizes.append(training.global_batch_size)
        super().__init__(ends, self.sizes)

    def global_batch_size(self, tokens: int) -> int:
        """Return the number of sequences in the step that follows `tokens`."""
        return self.value(tokens)

    def step_tokens(self, tokens: int) -> int:
        """Return the number of tokens in the step that follows `tokens`."""
        return self.global_batch_size(tokens) * self._length

    def batches(self, tokens: int = 0) -> Iterator[int]:
        """Yield the batch sizes of the steps that follow `tokens`, endlessly."""
        while True:
            size = self.global_batch_size(tokens)
            yield size
            tokens += size * self._length

    def stretches(
        self, tokens: int = 0, *, steps: int | None = None, end: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Return (size, number of steps) for each stretch of equal batches that follows `tokens`. The stretches cover
        `steps` steps, or all whole steps up to `end` tokens."""
        return self.value_stretches(tokens, lambda size: size * self._length, steps=steps, end=end)

    def steps(self, end: int, tokens: int = 0) -> int:
        """Return the number of whole steps between `tokens` and `end` tokens."""
        return sum(number for _, number in self.stretches(tokens, end=end))

    def tokens(self, steps: int, tokens: int = 0) -> int:
        """Return the tokens trained on after `steps` more steps, starting from `tokens`."""
        return tokens + self._length * sum(size * number for size, number in self.stretches(tokens, steps=steps))

    @property
    def step_in_words(self) -> str:
        """Tokens per step, as in `8,192` or `2,048 to 8,192`."""
        low, high = (f"{size * self._length:,}" for size in (min(self.sizes), max(self.sizes)))
        return low if low == high else f"{low} to {high}"


def stage_sizes(stage: BatchStage, after: int) -> list[int]:
    """Return a stage's batch sizes. With an increment, they grow up to the next stage's size `after`, exclusive."""
    if stage.increment is None:
        return [stage.global_batch_size]
    return list(range(stage.global_batch_size, after, stage.increment))


def with_global_batch_size(config: RunConfig, size: int) -> RunConfig:
    """Return the configuration with `size` sequences in every step, to estimate what such a step costs."""
    training = dataclasses.replace(config.training, global_batch_size=size, batch_schedule=[])
    return dataclasses.replace(config, training=training)


# ---------------------------------------------------------------- checks


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield a schedule's problems, one line each, assuming that each number is in range. Divisibility of the batches
    is checked with the layout."""
    stages = config.training.batch_schedule
    begins = schedules.starts(stages)

    def too_short(number: int) -> str | None:
        tokens = int(stages[number].until - begins[number])
        step = stages[number].global_batch_size * config.data.sequence_length
        return f"one step of {step:,} tokens does not fit into the {tokens:,}" if tokens < step else None

    yield from schedules.find_problems("training.batch_schedule", stages, too_short)
    for number, stage in enumerate(stages):
        if stage.increment is not None:
            yield from _check_increment(config, number, stage.global_batch_size, stage.increment)


def _check_increment(config: RunConfig, number: int, size: int, increment: int) -> Iterator[str]:
    later = config.training.batch_schedule[number + 1 :]
    after = later[0].global_batch_size if later else config.training.global_batch_size
    name = f"training.batch_schedule[{number + 1}].global_batch_size" if later else "training.global_batch_size"
    if after - size > MAX_INCREMENTS * increment:
        yield (
            f"training.batch_schedule[{number}].increment {increment} makes {(after - size) // increment:,} batch "
            f"sizes, more than {MAX_INCREMENTS:,}: use a larger one"
        )
    elif after <= size or (after - size) % increment:
        yield (
            f"training.batch_schedule[{number}].increment {increment}: its global_batch_size {size} "
            f"does not reach {name} {after} in a whole number of increments"
        )
