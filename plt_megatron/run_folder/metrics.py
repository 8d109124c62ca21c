"""Checked records of a run's metrics.jsonl, for comparisons and plots."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.errors import UserError
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.files import write_json

Record = dict[str, Any]
METRICS = "metrics.jsonl"
_NUMBERS = {
    "train": ("step", "tokens", "loss"),
    "validation": ("step", "tokens", "loop_count", "loss"),
    "evaluation": ("step", "tokens"),
}


@dataclass(frozen=True)
class RunMetrics:
    """A run's records in the order of its steps; all lists are empty if it has not started.

    Attributes:
        train: records of training steps: `step`, `tokens` since the run started, `loss` in nats per token, and more.
        validation: the same with `loop_count`, the loops that the loss was measured with.
        evaluation: `step`, `tokens` and `scores` of an export, by `task/metric`.
    """

    train: list[Record]
    validation: list[Record]
    evaluation: list[Record]

    @property
    def step(self) -> int:
        """The last training step recorded; 0: none."""
        return max((record["step"] for record in self.train), default=0)

    @property
    def tokens(self) -> int:
        """Tokens up to the last record."""
        return max((record["tokens"] for record in (*self.train, *self.validation)), default=0)

    def final_train_loss(self, share: float = 0.1) -> float:
        """Return the mean loss of the last `share` of the training records, at least one: single batches are noisy."""
        last = self.train[-max(1, round(len(self.train) * share)) :]
        return sum(record["loss"] for record in last) / len(last)

    def final_validation_losses(self) -> dict[int, float]:
        """Return the loss of the last validation at each loop count."""
        return {record["loop_count"]: record["loss"] for record in self.validation}

    def validation_at(self, loop_count: int) -> list[Record]:
        """Return the validation records with `loop_count` loops."""
        return [record for record in self.validation if record["loop_count"] == loop_count]

    def loop_counts(self) -> list[int]:
        """Return the loop counts that were validated, ascending."""
        return sorted({record["loop_count"] for record in self.validation})

    def tokens_per_second(self) -> float | None:
        """Return the median speed; None if none was recorded."""
        return median_speed(self.train)


def bits_per_byte(loss_sum: float, size: int) -> float:
    """Return the bits per byte of `size` bytes of text with a summed loss of `loss_sum` nats; comparable across
    tokenizers."""
    return loss_sum / math.log(2) / size


def median_speed(records: Iterable[Record]) -> float | None:
    """Return the median tokens/s of training records; None if no record has it."""
    speeds = [record.get("tokens_per_second") for record in records]
    known = [speed for speed in speeds if speed and math.isfinite(speed)]
    return statistics.median(known) if known else None


def with_nan(record: Record) -> Record:
    """Return a record with NaN for losses and scores that are null: those that were not finite."""
    losses = {name: math.nan for name, value in record.items() if value is None and name.endswith("loss")}
    scores = {name: math.nan if value is None else value for name, value in record.get("scores", {}).items()}
    return record | losses | ({"scores": scores} if scores else {})


def read_metrics(path: Path) -> RunMetrics:
    """Read the training, validation and evaluation records of a metrics.jsonl. Other kinds are skipped.

    Raises:
        UserError: a line is broken, or a record lacks one of its numbers.
    """
    found: dict[str, list[Record]] = {kind: [] for kind in _NUMBERS}
    for record in map(with_nan, json_lines.read(path)):
        kind = record.get("kind")
        if kind not in _NUMBERS:
            continue
        missing = [name for name in _NUMBERS[kind] if not isinstance(record.get(name), int | float)]
        if missing:
            raise UserError(f"{path}: a {kind} record without {', '.join(missing)}")
        found[kind].append(record)
    found["evaluation"].sort(key=lambda record: float(record["step"]))  # one that was cut short is done by the next job
    return RunMetrics(**found)


# Scores of evaluated exports.

# {"tasks": [...], "limit": rows or null, "chat_template": whether it was used, "scores": {"task/metric": ...}}
SCORES = "evaluation.json"


def write_scores(
    folder: Path, scores: Mapping[str, float], *, tasks: Sequence[str], limit: int | None, chat: bool = False
) -> dict[str, float]:
    """Write the scores of an export, beside those of other tasks if these ran with the same `limit` and `chat`.

    A task's scores replace all of its earlier ones, whose metrics may be others.

    Args:
        limit: rows of each task; None: all.
        chat: whether in its chat template.

    Returns:
        All scores in the file.
    """
    how = {"limit": limit, "chat_template": chat}
    kept: dict[str, Any] = {"tasks": list(tasks), **how, "scores": dict(scores)}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or broken: replaced
        earlier = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        if earlier.items() >= how.items():
            names = [name for name in earlier["tasks"] if name not in tasks]
            again = tuple(f"{name}/" for name in {*tasks, *(score.rpartition("/")[0] for score in scores)})
            older = {name: float(score) for name, score in earlier["scores"].items() if not name.startswith(again)}
            kept |= {"tasks": [*names, *tasks], "scores": older | dict(scores)}
    write_json(folder / SCORES, kept)
    return dict(kept["scores"])


def read_scores(folder: Path) -> dict[str, float]:
    """Read the scores of an export by `task/metric`. Raises `UserError` if they are missing or broken."""
    try:
        return dict(json.loads((folder / SCORES).read_text(encoding="utf-8"))["scores"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SCORES}: not an evaluation's scores ({error})") from error
