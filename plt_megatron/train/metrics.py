"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.folder import RunFolder


class MetricsWriter:
    """Writes one record a line. Only one rank's is enabled."""

    def __init__(self, folder: Path, config: RunConfig, enabled: bool) -> None:
        self._folder = RunFolder(folder)
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

            self._board = SummaryWriter(str(RunFolder(folder).tensorboard))
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
        if self._enabled:
            json_lines.rewind(self._folder.metrics_file, lambda record: record["step"] <= step)

    def write(self, record: dict[str, Any]) -> None:
        """One record: `kind` (train or validation), `step`, `tokens` and numbers."""
        if not self._enabled:
            return
        json_lines.append(self._folder.metrics_file, record)
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
