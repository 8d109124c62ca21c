"""Decay branches: a run of WSD (warm-up, constant rate, decay) whose rate falls earlier or later than another's.

Until the rate falls, runs of one seed that differ in length alone take the same steps on the same samples. So one of
them, the trunk, may take them for all: a branch begins with its checkpoint, and ends as a run of its length would have.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import partial

from plt_megatron.config import derived
from plt_megatron.config.batch_schedule import BatchSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError


def first_decay_step(config: RunConfig) -> int:
    """The last step with a constant rate: after it the rate falls."""
    constant = float(derived.lr_decay_iters(config) - derived.lr_wsd_decay_iters(config))
    return bisect_right(range(derived.train_iters(config) + 1), constant, key=partial(derived.lr_position, config)) - 1


def _warmup_steps(config: RunConfig) -> int:
    """Steps until the rate is constant."""
    warmup = float(config.optimizer.lr_warmup_iters)
    return bisect_left(range(derived.train_iters(config)), warmup, key=partial(derived.lr_position, config))


def decay_steps(step: int) -> int:
    """Steps of decay that make a tenth of a run whose rate is constant up to `step`, WSD's default."""
    return max(1, round(step / 9))


def stages_problem(config: RunConfig) -> str | None:
    """Why a run's loops would not be its branches' too; None: they are."""
    stages = len(config.training.loop_schedule)
    if stages < 2:
        return None
    return (
        f"training.loop_schedule has {stages} stages, which end at shares of a run's own length: a branch would have "
        "other loops in the same steps; give it one stage, or leave it out"
    )


def branch_settings(
    trunk: RunConfig, checkpoint: str, step: int, decay: int, order_samples: int | None = None
) -> list[str]:
    """`key=value` settings that make a trunk's configuration that of a branch.

    Args:
        checkpoint: the trunk's, at `step`.
        decay: steps over which the rate falls, the branch's last.
        order_samples: samples whose order the checkpoint's run has drawn, where that is known: a run of so many tokens
            may have begun with another batch.

    Raises:
        UserError: the trunk has no constant rate up to that step, or its loops follow from its length.
    """
    problem = stages_problem(trunk)
    if problem is not None:
        raise UserError(f"{trunk.name} cannot branch: {problem}")
    if trunk.optimizer.lr_decay_style != "WSD":
        raise UserError(
            f"{trunk.name} has optimizer.lr_decay_style {trunk.optimizer.lr_decay_style}: only a run of WSD has a "
            "constant rate to branch from"
        )
    # The branch counts its warm-up in its own steps.
    first, last = max(_warmup_steps(trunk), trunk.optimizer.lr_warmup_iters), first_decay_step(trunk)
    if not first <= step <= last:
        raise UserError(
            f"{trunk.name} has a constant rate from step {first} to {last}: it cannot branch at step {step}"
        )
    length = step + decay
    samples = BatchSchedule(trunk).tokens(length) // trunk.data.sequence_length
    drawn = order_samples or derived.order_samples(trunk)
    order = max(drawn, samples)
    if order > drawn:
        raise UserError(
            f"a branch of {length} steps is longer than {trunk.name}, whose samples are drawn in the order of a run of "
            f"{derived.train_iters(trunk)}: give that run data.order_samples={order} from its start, or a shorter decay"
        )
    return [
        f"training.train_iters={length}",
        f"optimizer.lr_decay_iters={length}",
        f"optimizer.lr_wsd_decay_iters={decay}",
        f"data.order_samples={order}",
        f"checkpoint.load={checkpoint}",
        "checkpoint.weights_only=false",
        "checkpoint.allow_other_schedule=true",
    ]
