"""Any layout gives one process's losses, gradient norms and weights."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from plt_megatron.config.layout import layout_of
from plt_megatron.config.schema import MoeConfig, ParallelConfig, RunConfig
from tests.distributed.cases import Outcome
from tests.distributed.parity_checks import differences
from tests.fuzz import draw
from tests.fuzz.search import Kind

TOLERANCE = 2e-5
CHAOS = 1e-2  # what rounding alone moves by so much says nothing of a layout, nor does anything after it
ROUNDING = 10  # a layout rounds in every operation what the comparison of one process with itself rounds once
# How many ways of rounding are tried: most move a number less than the worst does, by tens of times where an expert
# gets few tokens and Muon enlarges what is left of its gradient.
WAYS = 8
# In which of them the layout is compared, too: near a tie, which one in some dozens of cases with experts meets,
# rounding sends a token to another expert, or has another one dropped. What is wrong is so however weights are rounded.
OTHERWISE = range(1, 5)
_BY_STEP = re.compile(r"(?:loss|gradient norm|z-loss) (\d+)")


def find_problems(config: RunConfig) -> Iterator[str]:
    """Say what cannot be compared, one line each."""
    layout = layout_of(config)
    capacity = None if config.model.moe is None else config.model.moe.expert_capacity_factor
    if capacity is not None and layout.tensor * layout.context > 1:
        yield "model.moe.expert_capacity_factor is of the tokens of a rank, whose number the layout decides"


class Parity(Kind):
    """Cases of fp32."""

    name = "parity"
    often = 8
    fixed = {"training.precision": "fp32"}

    def draw(self, seed: int, number: int) -> draw.Settings:
        for turn in itertools.count():
            settings = draw.draw(f"{seed} {self.name} {turn}", number, self.fixed, self.find_problems)
            if layout_of(draw.load(settings)).world_size > 1:
                break
        return settings

    def find_problems(self, config: RunConfig) -> Iterator[str]:
        return find_problems(config)

    def check(self, settings: draw.Settings) -> str | None:
        config = draw.load(settings)
        reference = self.reference(config)
        outcome, expected = self.outcome(config), self.outcome(reference)
        for name, value in expected.initial.items():
            if not np.array_equal(outcome.initial[name], value):
                return f"starts differently: {name}"
        wrong = differences(outcome, expected)
        if max(wrong.values()) <= TOLERANCE:
            return None
        rounding = dict.fromkeys(wrong, 0.0)
        for way in range(1, WAYS + 1):
            moved = differences(self.outcome(reference, rounded=way), expected)
            rounding = {name: max(most, moved[name]) for name, most in rounding.items()}
            comparable = before_chaos(rounding)
            over = {name: wrong[name] / max(TOLERANCE, ROUNDING * rounding[name]) for name in comparable}
            worst = max(over, key=lambda name: over[name])
            if over[worst] <= 1:
                break
        if over[worst] <= 1:
            most = max(wrong, key=lambda name: wrong[name])
            what = "rounding alone moves it by more" if most in comparable else "chaotic after some steps"
            self.note(what, f"{most} by {rounding[most]:.1e}, is off by {wrong[most]:.1e}")
            return None
        if any(differences(self.outcome(config), outcome).values()):
            return f"is not the same from run to run: {worst} is off by {wrong[worst]:.1e}"
        for way in OTHERWISE:
            off = differences(self.outcome(config, rounded=way), self.outcome(reference, rounded=way))
            if all(off[name] <= max(TOLERANCE, ROUNDING * rounding[name]) for name in comparable):
                self.note("at a tie", f"{worst} is off by {wrong[worst]:.1e}, rounded otherwise by {off[worst]:.1e}")
                return None
        return f"is not one process's: {worst} is off by {wrong[worst]:.1e}"

    def reference(self, config: RunConfig) -> RunConfig:
        """The run with which a layout is compared."""
        return alone(config)

    def outcome(self, config: RunConfig, **options: Any) -> Outcome:
        """Have `parity_job` train a configuration."""
        return self.run(train, layout_of(config).world_size, config, timeout_s=300, **options)


def train(config: RunConfig, rounded: int = 0) -> Outcome:
    """`parity_job.train`; this process does not import torch."""
    from tests.fuzz import parity_job

    return parity_job.train(config, rounded)


def alone(config: RunConfig) -> RunConfig:
    """The same numbers, asked of one process: in one microbatch, unless its tokens' number counts."""
    model, training = config.model, config.training
    moe = model.moe or MoeConfig(2)
    by_microbatch = moe.router_load_balancing_type == "aux_loss" and moe.aux_loss_coeff > 0
    if not by_microbatch and moe.expert_capacity_factor is None and not training.batch_schedule:
        training = dataclasses.replace(training, micro_batch_size=training.global_batch_size)
    return dataclasses.replace(config, parallel=ParallelConfig(data_parallel_size=1), training=training)


def before_chaos(rounding: Mapping[str, float]) -> list[str]:
    """The numbers of the steps before the first one that rounding alone moves by `CHAOS`, or all numbers and weights.

    A deep model at a high rate doubles a rounding error many times a step: its steps are compared while they can be.
    """
    steps = {name: int(found[1]) for name in rounding if (found := _BY_STEP.fullmatch(name))}
    end = min((step for name, step in steps.items() if rounding[name] > CHAOS), default=None)
    if end is None:
        return list(rounding)
    return [name for name, step in steps.items() if step < end or (step == 0 and rounding[name] <= CHAOS)]
