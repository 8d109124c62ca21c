"""A leg of a run: it stops or is killed where it is told to, and meets the run's bad steps. Run by the pool."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from plt_megatron.config.schema import RunConfig
from plt_megatron.runtime.process_groups import init_process_groups
from plt_megatron.train.callbacks.base import Step, TrainingFailed
from plt_megatron.train.callbacks.incidents import Incidents
from plt_megatron.train.trainer import Trainer


def run_leg(config: RunConfig, end: Mapping[str, Any] | None, bad: Mapping[str, Any]) -> tuple[bool | str, int]:
    """Train to the end or to where the leg ends; whether the run is finished, or the message it failed with, and how
    many steps were not accepted.

    Args:
        end: see `resume.Leg`; None: the leg goes on to the run's last step.
        bad: `nonfinite` and `spikes`, the samples whose steps are bad; `planned`, whether only the run's schedules move
            its other losses.
    """
    init_process_groups(config.parallel)
    trainer = Trainer(config)
    refused = _meet_bad_steps(trainer, bad)
    if end is not None:
        _end_at(trainer, end)
    try:
        return trainer.run(), len(refused)
    except TrainingFailed as error:
        return str(error), len(refused)
    finally:
        trainer.close()
        parallel_state.destroy_model_parallel()


def _meet_bad_steps(trainer: Trainer, bad: Mapping[str, Any]) -> list[int]:
    """Have the steps that read these samples go wrong; the steps that were not accepted, as they come.

    By samples: a run that was rolled back reads none twice, and one that was killed meets the same ones again.
    """
    (incidents,) = [callback for callback in trainer.callbacks if isinstance(callback, Incidents)]
    accept, refused = incidents.guard.accept, []

    def judge(loss: float, norm: float) -> bool:
        first = trainer.clock.samples
        samples = range(first, first + trainer.batch_sizes.global_batch_size(trainer.clock.tokens))
        nonfinite, spike = (any(sample in samples for sample in bad[name]) for name in ("nonfinite", "spikes"))
        if bad["planned"] and math.isfinite(loss):
            loss = _planned_loss(trainer.config, samples, incidents._current)
        good = accept(math.nan if nonfinite else loss + 100 * spike, norm)
        if not good:
            refused.append(trainer.clock.step + 1)
            planned = bad["planned"] and math.isfinite(loss) and not (nonfinite or spike)
            assert not planned, f"a planned step is refused: {incidents.guard.problem}"
        return good

    incidents.guard.accept = judge  # type: ignore[method-assign]
    return refused


def _planned_loss(config: RunConfig, samples: range, step: Step) -> float:
    """The same for all steps that read the same stages of the data in rows of one length with as many loops."""
    length = config.data.sequence_length
    first, last = (
        sum((sample + 1) * length > stage.until for stage in config.data.stages) for sample in (samples[0], samples[-1])
    )
    return 2.0 + 10 * first + 3 * last + step.sequence_length + 7 * step.loop_count


def _end_at(trainer: Trainer, end: Mapping[str, Any]) -> None:
    """Stop or kill the leg when it comes to a step."""
    victim = dist.get_rank() == end["rank"] % dist.get_world_size()
    train_step, save = trainer._train_step, trainer._save

    def stopping() -> None:
        if trainer.clock.step + 1 >= end["step"]:
            if end["how"] == "stop" and trainer.is_first_rank:
                trainer.folder.stop_file.touch()
            if end["how"] == "kill" and victim:
                os.kill(os.getpid(), signal.SIGKILL)
        train_step()

    def killed_while_saving() -> None:
        if end["how"] == "kill while saving" and trainer.clock.step >= end["step"] and victim:
            os.kill(os.getpid(), signal.SIGKILL)
        save()
        if end["how"] == "kill after saving" and trainer.clock.step >= end["step"] and victim:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer._train_step, trainer._save = stopping, killed_while_saving  # type: ignore[method-assign]
