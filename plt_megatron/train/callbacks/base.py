"""What happens in a run beside training: the interface of callbacks, and what they may use of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from plt_megatron.config.schema import RunConfig
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.train.data import RunData
from plt_megatron.train.engine import Engine, StepResult


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why, and what is intact."""


@dataclass
class Clock:
    """How far a run has come.

    Attributes:
        step: optimizer steps, those without an update included.
        samples: taken from the training data, those that a rollback has passed over included.
        tokens: trained on.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass
class Step:
    """An optimizer step under way.

    Attributes:
        number: 1 for the run's first.
        batches: this rank's microbatches.
        loop_count: of this step. A callback may change it before the step, to the same number on all ranks.
        seconds: what data, passes and update took, once it is done.
    """

    number: int
    batches: list[MicroBatch]
    loop_count: int
    seconds: float = 0.0


class Run(Protocol):
    """What callbacks see of a run."""

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
        """A sign of life, before what may take long; `phase` names it."""

    def say(self, line: str) -> None:
        """A line for the people who watch."""

    def report(self, record: dict[str, Any]) -> None:
        """Hand a record, `kind`, `step`, `tokens` and numbers, to all callbacks' `on_record`."""

    def roll_back(self) -> None:
        """Go back to the last checkpoint's weights, and on with the data that come next. Collective."""

    def what_is_saved(self) -> str:
        """One sentence for an error message."""


class Callback:
    """Something that a run does beside training. Subclasses override what they need.

    A run has one of each class in `callbacks.CALLBACKS`. All methods are called on all ranks at the same points, in the
    order of that list, so that they may communicate. What a class is asked to do, it reads from `run.config`.

    Attributes:
        name: of its state in checkpoints; none needed without state.
    """

    name = ""

    def __init__(self, run: Run) -> None:
        self.run = run

    # Before training.

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, in a run that goes on."""

    def on_start(self) -> None:
        """The first step, or the next one of a run that goes on, is about to come."""

    # In every step.

    def before_step(self, step: Step) -> None:
        """Its data are there."""

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the weights may be updated with the step's gradients; all callbacks have to agree. Once a step, the
        same numbers on all ranks."""
        return True

    def on_rejected(self, step: Step, result: StepResult) -> bool:
        """The weights have not been updated. Whether the run went back: then the step is over, without `after_step`."""
        return False

    def after_step(self, step: Step, result: StepResult) -> None:
        """It is done, and the run's clock has moved on."""

    # When something is to be told.

    def on_log(self) -> dict[str, Any]:
        """What it adds to the training record of the step just done. Collective."""
        return {}

    def on_record(self, record: dict[str, Any]) -> None:
        """A record of training or validation."""

    def say(self, line: str) -> None:
        """A line for the people who watch."""

    # Around checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What it has to know in a run that goes on: JSON, the same on all ranks."""
        return {}

    def parameter_state(self) -> dict[str, Tensor]:
        """The same in tensors, such as averages of weights: each in the shape of one of `engine.stage`'s parameters, by
        its name. They are saved in a layout's parts, and loading a checkpoint fills them, in whatever layout."""
        return {}

    def on_save(self, checkpoint: Path) -> None:
        """A checkpoint is there, whole."""

    def on_rollback(self, state: dict[str, Any]) -> None:
        """The run is back at a checkpoint, with this state in it."""
        self.load_state_dict(state)

    # At the end.

    def on_end(self) -> None:
        """The last step is done, or the run has been asked to stop."""

    def close(self) -> None:
        """Give back what it holds, however the run ended. Not collective."""
