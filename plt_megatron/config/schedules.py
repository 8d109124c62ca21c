"""Schedules in stages that each end at their `until`: batch sizes, row lengths and the data mix.

- `training.batch_schedule`: the batch size of each step;
- `data.length_schedule`: the row length of each step. A sample always has `data.sequence_length` tokens. In a stage of
  shorter rows it is read as several rows, each with its own context; samples and their order stay the same;
- `data.stages`: the mix of the training data. A run reads the samples of the first stage, then those of the next.

All three use token counts, which stay the same when a run gets longer; `training.loop_schedule` (`loop_schedule`) uses
shares of the run, which grow with it (docs/decisions.md). After the last stage, all four go on with the setting that
has no stages. They depend only on the configuration and on the tokens trained so far: all ranks agree without any
state, a resumed run continues as it would have, and estimates know a run's steps.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from plt_megatron.config.schema import BatchStage, DataConfig, DataSource, DataStage, LengthStage, LoopStage, RunConfig

# `until` is where it ends, in tokens or as a share of the run.
Stage = BatchStage | LengthStage | DataStage | LoopStage


class TokenSchedule:
    """Values that a run's steps have one after the other, each up to a number of tokens.

    A value takes effect at the first step that begins at or after the end of the previous one: no step is split.

    Args:
        ends: tokens at which each value but the last ends, ascending.
        values: in order of use, one more than `ends`.
    """

    def __init__(self, ends: Sequence[int], values: Sequence[int]) -> None:
        self._ends, self._values = ends, values

    def value(self, tokens: int) -> int:
        """Return the value in the step that follows `tokens`."""
        return self._values[bisect_right(self._ends, tokens)]

    def value_stretches(
        self, tokens: int, step_tokens: Callable[[int], int], *, steps: int | None = None, end: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield (value, number of steps) for each stretch of steps with one value that follows `tokens`. The stretches
        cover `steps` steps, or all whole steps up to `end` tokens.

        Args:
            step_tokens: returns the tokens of a step, given its value.
        """
        number = bisect_right(self._ends, tokens)
        while number < len(self._values):
            value, stop = self._values[number], self._ends[number] if number < len(self._ends) else None
            own = step_tokens(value)
            wanted = None if stop is None else -((tokens - stop) // own)
            possible = steps if end is None else max(0, (end - tokens) // own)
            assert possible is not None, "give steps or end"
            taken = possible if wanted is None else min(wanted, possible)
            if taken:
                yield value, taken
            if wanted is None or taken < wanted:
                return
            tokens += taken * own
            steps = None if steps is None else steps - taken
            number = bisect_right(self._ends, tokens)


def starts(stages: Sequence[Stage]) -> list[float]:
    """Return where each stage begins, followed by where the last one ends."""
    return [0, *(stage.until for stage in stages)]


def stage_problems(
    key: str, stages: Sequence[Stage], too_short: Callable[[int], str | None] = lambda number: None
) -> Iterator[str]:
    """Yield a line for each stage of the schedule `key` that does not end after the stage before it or, if all do, that
    is too short.

    Args:
        too_short: of a stage, by its index, what does not fit into it; None if it is long enough.
    """
    begins = starts(stages)
    backward = [number for number, stage in enumerate(stages) if stage.until <= begins[number]]
    for number in backward:
        yield f"{key}[{number}].until {stages[number].until:,} must be above {begins[number]:,}, where it begins"
    for number in range(0 if backward else len(stages)):
        missing = too_short(number)
        if missing is not None:
            yield f"{key}[{number}].until {stages[number].until:,}: {missing} in this stage; make it longer"


MAX_INCREMENTS = 10_000  # per stage


class BatchSchedule(TokenSchedule):
    """Batch size of each step of a validated run; `training.global_batch_size` throughout without a schedule.

    Attributes:
        sizes: batch sizes in sequences, in order of use; the last one is `training.global_batch_size`.
    """

    def __init__(self, config: RunConfig) -> None:
        training = config.training
        self._length = config.data.sequence_length
        ends: list[int] = []  # tokens at which each size but the last ends
        self.sizes: list[int] = []
        start, sizes_after = 0, [stage.global_batch_size for stage in training.batch_schedule[1:]]
        sizes_after.append(training.global_batch_size)
        for stage, after in zip(training.batch_schedule, sizes_after, strict=False):  # one size more without stages
            size, increment = stage.global_batch_size, stage.increment
            sizes = [size] if increment is None else list(range(size, after, increment))
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


# ---------------------------------------------------------------- checks


def batch_problems(config: RunConfig) -> Iterator[str]:
    """Yield a schedule's problems, one line each, assuming that each number is in range. Divisibility of the batches
    is checked with the layout."""
    stages = config.training.batch_schedule
    begins = starts(stages)

    def too_short(number: int) -> str | None:
        tokens = int(stages[number].until - begins[number])
        step = stages[number].global_batch_size * config.data.sequence_length
        return f"one step of {step:,} tokens does not fit into the {tokens:,}" if tokens < step else None

    yield from stage_problems("training.batch_schedule", stages, too_short)
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


class LengthSchedule(TokenSchedule):
    """Row length of each step of a validated run; `data.sequence_length` throughout without a schedule.

    Attributes:
        lengths: row lengths in tokens, in order of use; the last one is `data.sequence_length`.
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


# ---------------------------------------------------------------- checks


def length_problems(config: RunConfig) -> Iterator[str]:
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
    yield from stage_problems("data.length_schedule", config.data.length_schedule)


def training_sources(data: DataConfig) -> list[DataSource]:
    """Return the training sources of the last stage, the only one without `data.stages`."""
    return data.sources or data.train_sources


def stage_sources(data: DataConfig) -> list[list[DataSource]]:
    """Return the training sources of each stage, the last one included."""
    return [*(stage.sources for stage in data.stages), training_sources(data)]


def stage_of_sample(data: DataConfig, sample: int) -> int:
    """Return the index of a sample's stage."""
    return bisect_right([stage.until // data.sequence_length for stage in data.stages], sample)


def stage_samples(data: DataConfig, samples: int) -> list[range]:
    """Return each stage's sample indices, out of `samples`. A sample belongs to a stage if its last token does."""
    ends = [min(samples, stage.until // data.sequence_length) for stage in data.stages]
    return [range(first, end) for first, end in zip([0, *ends], [*ends, samples], strict=True)]


def distinct_sources(data: DataConfig) -> list[DataSource]:
    """Return the training sources of all stages in order of first use, each path once."""
    found: dict[str, DataSource] = {}
    for sources in stage_sources(data):
        for source in sources:
            found.setdefault(os.path.abspath(source.path), source)
    return list(found.values())


def all_sources(data: DataConfig) -> Iterator[tuple[str, DataSource]]:
    """Yield (dotted key, source) for every source of every part."""
    lists = {f"data.{name}": getattr(data, name) for name in ("sources", "train_sources", "validation_sources")}
    lists |= {f"data.stages[{number}].sources": stage.sources for number, stage in enumerate(data.stages)}
    for key, sources in (lists | {"data.test_sources": data.test_sources}).items():
        yield from ((f"{key}[{index}]", source) for index, source in enumerate(sources))


# ---------------------------------------------------------------- checks


def data_stage_problems(data: DataConfig) -> Iterator[str]:
    """Yield the problems of the stages, one line each, assuming that each number is in range."""
    if not data.stages:
        return
    rates = [data.fim is not None and data.fim.rate, *(source.fim_rate for _, source in all_sources(data))]
    if any(rates):
        yield "data.stages with data.fim is not verified: leave one of them out"
    length, begins = data.sequence_length, starts(data.stages)

    def too_short(number: int) -> str | None:
        holds = data.stages[number].until // length > begins[number] // length
        return None if holds else f"no sample of {length:,} tokens ends"

    yield from stage_problems("data.stages", data.stages, too_short)
