"""What a run recorded in its metrics.jsonl, as numbers to compare and to plot."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.train.metrics import FILE_NAME, read_metrics


@dataclass(frozen=True)
class TrainPoint:
    """A training record. `loss` in nats per token; `tokens` seen since the run began."""

    step: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class ValidationPoint:
    """A validation record: the loss with `loop_count` loops, in nats per token."""

    step: int
    tokens: int
    loop_count: int
    loss: float


@dataclass(frozen=True)
class RunMetrics:
    """A run's records in the order of its steps."""

    train: list[TrainPoint]
    validation: list[ValidationPoint]

    def final_train_loss(self, share: float = 0.1) -> float:
        """Mean over the last `share` of the training records, at least one: single batches are noisy."""
        last = self.train[-max(1, round(len(self.train) * share)) :]
        return sum(point.loss for point in last) / len(last)

    def final_validation_losses(self) -> dict[int, float]:
        """Loop count -> the loss of the last validation at that loop count."""
        return {point.loop_count: point.loss for point in self.validation}

    def loop_counts(self) -> list[int]:
        """Loop counts that were validated, ascending."""
        return sorted({point.loop_count for point in self.validation})


def load_run(run_dir: str | os.PathLike[str]) -> RunMetrics:
    """What the run in `run_dir` recorded so far. Records of other kinds are left out.

    Raises `UserError` where there are no metrics, none of training, or a broken line.
    """
    folder = Path(run_dir)
    try:
        records = read_metrics(folder)
    except FileNotFoundError:
        raise UserError(f"{folder / FILE_NAME} not found: {folder} is no run that has begun") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / FILE_NAME} holds a line that is not JSON: {error}") from None
    train = [_point(TrainPoint, record, folder) for record in records if record["kind"] == "train"]
    validation = [_point(ValidationPoint, record, folder) for record in records if record["kind"] == "validation"]
    if not train:
        raise UserError(f"{folder / FILE_NAME} holds no training step yet")
    return RunMetrics(train, validation)


def _point[Point: (TrainPoint, ValidationPoint)](kind: type[Point], record: dict[str, Any], folder: Path) -> Point:
    names = [field.name for field in dataclasses.fields(kind)]
    missing = [name for name in names if name not in record]
    if missing:
        raise UserError(f"{folder / FILE_NAME}: a {record['kind']} record without {', '.join(missing)}")
    return kind(**{name: record[name] for name in names})
