"""The interface of callbacks, and what they may use of the run."""

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
    """The progress of a run.

    Attributes:
        step: optimizer steps, including those without an update.
        samples: taken from the training data, including those skipped by rollbacks.
        tokens: trained on.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass
class Step:
    """An optimizer step in progress.

    Attributes:
        number: 1 for the run's first.
        batches: this rank's microbatches.
        loop_count: of this step. A callback may change it before the step, to the same number on all ranks.
        global_batch_size: samples of this step, of all ranks together.
        sequence_length: tokens of the rows that they are read as.
        seconds: time of data, passes and update, once it is done.
    """

    number: int
    batches: list[MicroBatch]
    loop_count: int
    global_batch_size: int
    sequence_length: int
    seconds: float = 0.0


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
        """Whether something done every `interval` steps (0: never) and after the last one is due after `step`, by
        default the one just done."""

    def beat(self, phase: str | None = None) -> None:
        """Report a sign of life before long work; `phase` names it."""

    def say(self, line: str) -> None:
        """A line for the people who watch."""

    def report(self, record: dict[str, Any]) -> None:
        """Pass a record of `kind`, `step`, `tokens` and numbers to all callbacks' `on_record`."""

    def roll_back(self) -> None:
        """Return to the last checkpoint's weights, and continue with the next data. Collective."""

    def what_is_saved(self) -> str:
        """One sentence for an error message."""


class Callback:
    """Something that a run does besides training. Subclasses override what they need.

    A run has one of each class in `registry.CALLBACKS`. All methods are called on all ranks at the same points, in the
    order of that list, so that they may communicate. A class reads its settings from `run.config`.

    Attributes:
        name: of its state in checkpoints; not needed without state.
    """

    name = ""

    def __init__(self, run: Run) -> None:
        self.run = run

    # Before training.

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in a resumed run."""

    def on_start(self) -> None:
        """Before the first step of a new or resumed run."""

    # In every step.

    def before_step(self, step: Step) -> None:
        """Before each step, with its data."""

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the weights may be updated with the step's gradients; all callbacks must agree. Called once per step,
        with the same numbers on all ranks."""
        return True

    def on_rejected(self, step: Step, result: StepResult) -> bool:
        """The weights were not updated. Returns whether the run rolled back; then `after_step` is not called."""
        return False

    def after_step(self, step: Step, result: StepResult) -> None:
        """After each step, with the run's clock advanced."""

    # Reports.

    def on_log(self) -> dict[str, Any]:
        """What it adds to the training record of the last step. Collective."""
        return {}

    def other_weights(self) -> dict[str, AbstractContextManager[None]]:
        """Weights that validation measures beside the run's own, by what its fields begin with (`ema`: `ema_loss`): in
        its context, which all ranks enter together, the engine's model has them."""
        return {}

    def on_record(self, record: dict[str, Any]) -> None:
        """A record of training or validation."""

    def say(self, line: str) -> None:
        """A line for the people who watch."""

    # Around checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Its state for a resumed run: JSON, the same on all ranks."""
        return {}

    def parameter_state(self) -> dict[Any, Any]:
        """State in tensors, such as averages of weights: each in the shape of one of `engine.stage`'s parameters, by
        its name. They are saved like parameters, and loading a checkpoint in any layout fills them. After a step,
        weights are complete on a rank only once `engine.gather_parameters()` was called on all. Or, nested in
        dictionaries, megatron-core's sharded tensors, whose keys begin with `kept.` and the callback's name."""
        return {}

    def on_save(self, checkpoint: Path) -> None:
        """A complete checkpoint has been published."""

    def on_export(self, export: Path) -> None:
        """An export of a checkpoint is finished, its evaluation too. On the first rank only."""

    def on_rollback(self, state: dict[str, Any]) -> None:
        """The run has rolled back to a checkpoint with this state."""
        self.load_state_dict(state)

    # At the end.

    def is_working(self) -> bool:
        """Whether it still works on something beside the run. Asked time and again after the last step: the run ends
        when no callback of any rank does, or when it is asked to stop."""
        return False

    def on_end(self) -> None:
        """After the last step, or when the run stops on request."""

    def close(self) -> None:
        """Release resources, however the run ended. Not collective."""
