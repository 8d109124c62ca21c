"""Decay branches: WSD runs (warm-up, constant rate, decay) that start from another run's checkpoint.

Until the decay begins, runs with the same seed that differ only in length take the same steps on the same samples. One
of them, the trunk, can take these steps for all: a branch starts from its checkpoint and ends as a run of the branch's
length would have.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import partial

from plt_megatron.config import derived
from plt_megatron.config.loader import setting
from plt_megatron.config.loop_schedule import stages_of
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError


def first_decay_step(config: RunConfig) -> int:
    """Return the last step with a constant learning rate, after which it decays."""
    constant = float(derived.lr_decay_iters(config) - derived.lr_wsd_decay_iters(config))
    return bisect_right(range(derived.train_iters(config) + 1), constant, key=partial(derived.lr_position, config)) - 1


def _warmup_steps(config: RunConfig) -> int:
    """Return the number of steps until the learning rate is constant."""
    warmup = float(config.optimizer.lr_warmup_iters)
    return bisect_left(range(derived.train_iters(config)), warmup, key=partial(derived.lr_position, config))


def decay_steps(step: int) -> int:
    """Return the decay steps that make up about a tenth of a run whose rate is constant up to `step`: WSD's default."""
    return max(1, round(step / 9))


def stages_problem(config: RunConfig) -> str | None:
    """Return why a run's loop schedule would not carry over to its branches; None if it would."""
    stages = len(stages_of(config))
    if stages < 2:
        return None
    return (
        f"training.loop_schedule has {stages} stages, which end at shares of a run's own length: a branch would run "
        "other loop counts in the same steps; use one stage, or leave it out"
    )


def branch_settings(
    trunk: RunConfig,
    checkpoint: str,
    step: int,
    decay: int,
    order_samples: int | None = None,
    clock: tuple[int, int] | None = None,
) -> list[str]:
    """Return the `key=value` settings that turn a trunk's configuration into a branch's.

    Args:
        checkpoint: the trunk's checkpoint at `step`.
        decay: number of final steps over which the rate decays.
        order_samples: length of the sample permutation that the checkpoint's run drew, if known. The configuration may
            give another: a run whose length is in tokens may have begun with another batch size.
        clock: the tokens trained on at the checkpoint, and those that its learning rate schedule counts as one step, if
            known; for the same reason.

    Raises:
        UserError: the trunk's rate is not constant at that step, its loops depend on its length, or its permutation is
            too short for the branch.
    """
    problem = stages_problem(trunk)
    if problem is not None:
        raise UserError(f"{trunk.name} cannot branch: {problem}")
    if trunk.optimizer.lr_decay_style != "WSD":
        raise UserError(
            f"{trunk.name} has optimizer.lr_decay_style {trunk.optimizer.lr_decay_style}: only WSD runs have a "
            "constant rate to branch from"
        )
    _check_rate(trunk, step, clock)
    length = step + decay
    tokens = BatchSchedule(trunk).tokens(step) if clock is None else clock[0]
    samples = BatchSchedule(trunk).tokens(decay, tokens) // trunk.data.sequence_length
    drawn = order_samples or derived.order_samples(trunk)
    order = max(drawn, samples)
    if order > drawn:
        raise UserError(
            f"a branch of {length} steps is longer than {trunk.name}, whose samples are shuffled for a run of "
            f"{derived.train_iters(trunk)}: start that run with data.order_samples={order}, or use a shorter decay"
        )
    return [
        f"training.train_iters={length}",
        f"optimizer.lr_decay_iters={length}",
        f"optimizer.lr_wsd_decay_iters={decay}",
        f"data.order_samples={order}",
        setting("checkpoint.load", checkpoint),
        "checkpoint.weights_only=false",
        "checkpoint.allow_other_schedule=true",
    ]


def _check_rate(trunk: RunConfig, step: int, clock: tuple[int, int] | None) -> None:
    warmup = trunk.optimizer.lr_warmup_iters  # which the branch counts in its own steps
    if clock is None or trunk.training.train_tokens is None:
        first, last = max(_warmup_steps(trunk), warmup), first_decay_step(trunk)
        where, constant, is_constant = f"step {step}", f"step {first} to {last}", first <= step <= last
    else:
        tokens, per_step = clock
        last = derived.lr_decay_iters(trunk, per_step) - derived.lr_wsd_decay_iters(trunk, per_step)
        where, constant = f"step {step}, {tokens:,} tokens", f"{warmup * per_step:,} to {last * per_step:,} tokens"
        is_constant = step >= warmup and warmup * per_step <= tokens <= last * per_step
    if not is_constant:
        raise UserError(f"{trunk.name} has a constant rate from {constant}: it cannot branch at {where}")
