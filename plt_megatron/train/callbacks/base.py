"""The callback interface, and the part of the run that callbacks may use."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.data import RunData
from plt_megatron.train.engine import Engine, StepResult


class TrainingFailed(RuntimeError):
    """Training cannot continue; the message says why, and what is intact."""


@dataclass
class Clock:
    """The progress of a run."""

    step: int = 0  # optimizer steps, including those without an update
    samples: int = 0  # taken from the training data, including those skipped by rollbacks
    tokens: int = 0  # trained on


@dataclass
class Step:
    """An optimizer step in progress."""

    number: int  # 1 for the run's first
    batches: list[MicroBatch]  # this rank's
    loop_count: int  # a callback may change it before the step, to the same number on all ranks
    global_batch_size: int  # samples over all ranks
    sequence_length: int  # tokens of the rows that samples are cut into
    seconds: float = 0.0  # duration of data loading, passes and update, once the step is done


class Run(Protocol):
    """A run, as callbacks see it."""

    config: RunConfig
    folder: RunFolder
    data: RunData
    engine: Engine
    clock: Clock
    is_first_rank: bool
    callbacks: list[Callback]

    @property
    def last_step(self) -> int:
        """The number of the last step."""

    def is_due(self, interval: int, step: int | None = None) -> bool:
        """Return whether something done every `interval` steps (0: never) and after the last one is due after `step`,
        by default the one just done."""

    def beat(self, phase: str | None = None) -> None:
        """Report a sign of life before long work; `phase` names it."""

    def say(self, line: str) -> None:
        """Show a line to people who watch the run."""

    def report(self, record: dict[str, Any]) -> None:
        """Pass a record of `kind`, `step`, `tokens` and numbers to all callbacks' `on_record`."""

    def roll_back(self) -> None:
        """Return to the last checkpoint's weights, and continue with the next data. Collective."""

    def what_is_saved(self) -> str:
        """Return a sentence on the last checkpoint, for an error message."""


class Callback:
    """Something that a run does besides training. Subclasses override what they need.

    A run has one of each class in `registry.CALLBACKS` that it needs (`registry.is_needed`). All methods are called on
    all ranks at the same points, in the order of that list, so that they may communicate. A class reads its settings
    from `run.config`.
    """

    name = ""  # of its state in checkpoints; not needed without state

    def __init__(self, run: Run) -> None:
        self.run = run

    # Before training.

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in a resumed run."""

    def on_start(self) -> None:
        """Called before the first step of a new or resumed run."""

    # In every step.

    def before_step(self, step: Step) -> None:
        """Called before each step, with its data."""

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Return whether the weights may be updated with the step's gradients; all callbacks must agree. Called once
        per step, with the same numbers on all ranks."""
        return True

    def on_rejected(self, step: Step, result: StepResult) -> bool:
        """Called if the weights were not updated. Return whether the run rolled back; if so, no `after_step`."""
        return False

    def after_step(self, step: Step, result: StepResult) -> None:
        """Called after each step, with the run's clock advanced."""

    # Reports.

    def on_log(self) -> dict[str, Any]:
        """Return what it adds to the training record of the last step. Collective."""
        return {}

    def other_weights(self) -> dict[str, AbstractContextManager[None]]:
        """Return weights that validation measures besides the run's own, by the prefix of their fields (`ema`:
        `ema_loss`). Each is a context, which all ranks enter together and within which the engine's model has them."""
        return {}

    def on_record(self, record: dict[str, Any]) -> None:
        """Handle a record of training or validation."""

    def say(self, line: str) -> None:
        """Show a line to people who watch the run."""

    # Around checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return its state for a resumed run: JSON, the same on all ranks."""
        return {}

    def parameter_state(self) -> dict[Any, Any]:
        """Return state in tensors, such as averages of weights: either tensors in the shapes of `engine.stage`'s
        parameters, by parameter name, or, nested in dictionaries, megatron-core's sharded tensors, whose keys begin
        with `kept.` and the callback's name. They are saved like parameters, and loading a checkpoint in any layout
        fills them. After a step, weights are complete on a rank only once `engine.gather_parameters()` was called on
        all ranks."""
        return {}

    def on_save(self, checkpoint: Path) -> None:
        """Called when a complete checkpoint has been published."""

    def on_export(self, export: Path) -> None:
        """Called on the first rank only, when an export of a checkpoint and its evaluation are finished."""

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Called when the run has rolled back to a checkpoint with this state."""
        self.load_state_dict(state)

    # At the end.

    def is_working(self) -> bool:
        """Return whether it is still working on something beside the run. Polled after the last step: the run ends when
        no callback of any rank is, or when it is asked to stop."""
        return False

    def on_end(self) -> None:
        """Called after the last step, or when the run stops on request."""

    def close(self) -> None:
        """Release resources, however the run ended. Not collective."""
