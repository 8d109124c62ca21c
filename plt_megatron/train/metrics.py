"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError

FILE_NAME = "metrics.jsonl"
# What the clock and the machine decide: two runs that do the same differ in these alone.
MACHINE_FIELDS = ("tokens_per_second", "model_tflops", "mfu", "peak_memory_bytes", "step_seconds")


class MetricsWriter:
    """Writes one record a line. Only one rank's is enabled."""

    def __init__(self, folder: Path, config: RunConfig, enabled: bool) -> None:
        self._path = folder / FILE_NAME
        self._enabled = enabled
        self._board: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._open_trackers(folder, config)

    def _open_trackers(self, folder: Path, config: RunConfig) -> None:
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if config.logging.wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise UserError(
                    "logging.wandb_project: needs Weights & Biases: pip install 'plt-megatron[track]', or leave it out"
                ) from error
            self._wandb = wandb.init(
                project=config.logging.wandb_project,
                name=config.name,
                dir=str(folder),
                config=dataclasses.asdict(config),
                resume="allow",
            )

    def rewind(self, step: int) -> None:
        """Forget what an earlier attempt wrote beyond `step`, which is run again now. Atomic."""
        if not self._enabled or not self._path.exists():
            return
        kept = [record for record in read_metrics(self._path.parent) if record["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def write(self, record: dict[str, Any]) -> None:
        """One record: `kind` (train or validation), `step`, `tokens` and numbers."""
        if not self._enabled:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = dict(_numbers(record))
        if self._board is not None:
            for tag, value in numbers.items():
                self._board.add_scalar(tag, value, record["step"])
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, number) of a record; a list has one entry a loop, a mapping one a name."""
    suffix = f"_loops_{record['loop_count']}" if record["kind"] == "validation" else ""
    for name, value in record.items():
        if name in ("kind", "step", "loop_count"):
            continue
        entries = {name: value}
        if isinstance(value, list):
            entries = {f"{name}/loop_{loop}": entry for loop, entry in enumerate(value, 1)}
        elif isinstance(value, dict):
            entries = {f"{name}/{key}": entry for key, entry in value.items()}
        for tag, entry in entries.items():
            if isinstance(entry, int | float):
                yield f"{record['kind']}/{tag}{suffix}", entry


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line cut short by a crash is left out."""
    records = []
    with (folder / FILE_NAME).open() as file:
        for line in file:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records
