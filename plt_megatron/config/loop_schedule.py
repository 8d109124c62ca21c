"""Loop count of each step of a run: `training.loop_schedule`.

It depends only on the configuration and on the run's progress. Without any state, all ranks agree, a resumed run
continues as it would have, and estimates know what a run costs.
"""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from plt_megatron.config import derived, schedules
from plt_megatron.config.schedules import BatchSchedule, LengthSchedule
from plt_megatron.config.schema import LoopStage, RunConfig


@dataclass(frozen=True)
class _Stage:
    """Stage between two points of the run, from 0 to 1. `shares`: shares of steps with 1, 2, ... loops."""

    start: float
    end: float
    ramp_end: float
    shares: tuple[float, ...]


class StepKind(NamedTuple):
    """Properties that determine a step's cost: loops, samples, and the tokens per row they are read in."""

    loop_count: int
    global_batch_size: int
    sequence_length: int


class LoopSchedule:
    """Loop count of each step of a validated run; the model's throughout without a schedule."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._batches, self._lengths = BatchSchedule(config), LengthSchedule(config)
        self._stages = [
            _Stage(start, stage.until, start + stage.ramp * (stage.until - start), _shares(stage, config))
            for start, stage in zip(schedules.starts(stages_of(config)), stages_of(config), strict=False)
        ]

    def loop_count(self, step: int, tokens: int) -> int:
        """Return the loops of the step that follows `step` steps, which have trained on `tokens`."""
        shares = self._shares_at(self._progress(step, tokens))
        if max(shares) == 1:
            return shares.index(1) + 1
        drawn = random.Random(f"loops {self._config.training.seed} {step}").random()  # hashes a string seed by SHA-512
        for loops, share in enumerate(shares, start=1):
            drawn -= share
            if drawn < 0:
                return loops
        return max(loops for loops, share in enumerate(shares, start=1) if share > 0)  # shares add up to 1 - 1e-16

    def step_shares(self, start: int = 0) -> dict[StepKind, float]:
        """Return each kind's share of the steps after `start`; the expected share where loops are drawn."""
        steps = derived.train_iters(self._config)
        start = first = min(start, steps - 1)
        found: defaultdict[StepKind, float] = defaultdict(float)
        tokens = self._batches.tokens(start)
        for size, alike in self._batches.stretches(tokens, steps=steps - start):
            own = size * self._config.data.sequence_length
            for length, number in self._lengths.stretches(tokens, own, alike):
                for loops, count in self._expected(first, first + number).items():
                    found[StepKind(loops, size, length)] += count / (steps - start)
                first += number
            tokens += alike * own
        return {kind: share for kind, share in sorted(found.items()) if share > 0}

    def mean_shares(self, start: int = 0) -> dict[int, float]:
        """Return loop count -> share of the steps after `start`."""
        found: defaultdict[int, float] = defaultdict(float)
        for kind, share in self.step_shares(start).items():
            found[kind.loop_count] += share
        return dict(found)

    def kind_token_shares(self, start: int = 0) -> dict[StepKind, float]:
        """Return each kind's share of the tokens of the steps after `start`."""
        weighted = {kind: share * kind.global_batch_size for kind, share in self.step_shares(start).items()}
        total = sum(weighted.values())
        return {kind: weight / total for kind, weight in weighted.items()}

    def stage_steps(self) -> list[int]:
        """Return the number of the run's steps that begin in each stage."""
        ends = self._first_steps([stage.end for stage in self._stages], derived.train_iters(self._config))
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _first_steps(self, points: list[float], stop: int) -> list[int]:
        """Return, for each of these points of the run, the first step that begins at or after it, or `stop`."""
        return [bisect_left(range(stop), point, key=self._progress_of_step) for point in points]

    def _expected(self, start: int, stop: int) -> dict[int, float]:
        """Return loop count -> expected number of steps from `start` to `stop`, all with equal batches."""
        # Between these points the shares are constant or change by the same amount in every step.
        points = [point for stage in self._stages for point in (stage.ramp_end, stage.end)]
        bounds = [max(start, step) for step in self._first_steps(points, stop)]
        counts = [0.0] * self._config.model.loop_count
        for first, end in zip([start, *bounds], bounds, strict=False):
            if first < end:
                ends = (self._shares_at(self._progress_of_step(step)) for step in (first, end - 1))
                for index, (one, other) in enumerate(zip(*ends, strict=True)):
                    counts[index] += (end - first) * (one + other) / 2
        return dict(enumerate(counts, start=1))

    def _progress_of_step(self, step: int) -> float:
        return self._progress(step, self._batches.tokens(step))

    def _progress(self, step: int, tokens: int) -> float:
        """Return the share of the run that is done, in tokens or, if its length is given in steps, in steps."""
        training = self._config.training
        if training.train_tokens is not None:
            return tokens / training.train_tokens
        return step / derived.train_iters(self._config)

    def _shares_at(self, progress: float) -> tuple[float, ...]:
        number = next((n for n, stage in enumerate(self._stages) if progress < stage.end), len(self._stages) - 1)
        stage = self._stages[number]
        if progress >= stage.ramp_end:
            return stage.shares
        new = (progress - stage.start) / (stage.ramp_end - stage.start)
        pairs = zip(self._stages[number - 1].shares, stage.shares, strict=True)
        return tuple((1 - new) * old + new * own for old, own in pairs)


def stages_of(config: RunConfig) -> list[LoopStage]:
    """Return the stages of a run from its begin to its end: those given, and the model's loops in what they leave."""
    given = config.training.loop_schedule
    return given if given and given[-1].until == 1 else [*given, LoopStage()]


def _shares(stage: LoopStage, config: RunConfig) -> tuple[float, ...]:
    loops = config.model.loop_count
    if stage.loop_shares:
        return tuple(stage.loop_shares) + (0.0,) * (loops - len(stage.loop_shares))
    return tuple(float(count == (stage.loop_count or loops)) for count in range(1, loops + 1))


def with_equal_steps(config: RunConfig, kind: StepKind | None = None) -> RunConfig:
    """Return the configuration with only steps of this kind, to see what one costs; None: as after all schedules. Rows
    that are shorter than a sample are as many more."""
    model, data, training = config.model, config.data, config.training
    loops, size, length = kind or (model.loop_count, training.global_batch_size, data.sequence_length)
    rows = data.sequence_length // length
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, loop_count=loops),
        data=dataclasses.replace(data, sequence_length=length, length_schedule=[]),
        training=dataclasses.replace(
            training,
            micro_batch_size=rows * training.micro_batch_size,
            global_batch_size=rows * size,
            batch_schedule=[],
            loop_schedule=[],
        ),
    )


# ---------------------------------------------------------------- checks


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of a schedule and of the loss weights of earlier loops, one line each, assuming that each
    number is in range."""
    given, loops = len(config.training.loop_loss_weights), config.model.loop_count
    if given > max(loops - 1, 1):
        yield (
            f"training.loop_loss_weights has {given} weights, but {loops - 1} of model.loop_count {loops} loops come "
            "before the last, whose weight is 1"
        )
    stages = config.training.loop_schedule
    if not stages:
        return
    found = [problem for number in range(len(stages)) for problem in _check_stage(config, number)]
    yield from found
    if found:
        return
    steps, whole = LoopSchedule(config).stage_steps(), derived.train_iters(config)

    def too_short(number: int) -> str | None:
        return None if steps[number] else f"no step of the run's {whole:,} begins"

    yield from schedules.stage_problems("training.loop_schedule", stages, too_short)
    shares = [_shares(stage, config) for stage in stages_of(config)]
    most = max(count for each in shares for count, share in enumerate(each, start=1) if share > 0)
    if most < loops:
        yield f"training.loop_schedule never runs model.loop_count {loops} loops: set model.loop_count={most}"


def _check_stage(config: RunConfig, number: int) -> Iterator[str]:
    stage, before = config.training.loop_schedule[number], config.training.loop_schedule[:number]
    key, loops = f"training.loop_schedule[{number}]", config.model.loop_count
    name, most = ("loop_shares", len(stage.loop_shares)) if stage.loop_shares else ("loop_count", stage.loop_count or 0)
    if most > loops:
        yield f"{key}.{name}: {most} loops are above model.loop_count {loops}, the loops of the model"
    elif stage.loop_shares and abs(sum(stage.loop_shares) - 1) > 1e-6:
        yield f"{key}.loop_shares must add up to 1, not {sum(stage.loop_shares):g}"
    if stage.ramp and not before:
        yield f"{key}.ramp {stage.ramp:g}: there is no stage before it to ramp from"
