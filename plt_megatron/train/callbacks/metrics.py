"""Writes a run's numbers: metrics.jsonl always, TensorBoard and Weights & Biases if configured."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

from plt_megatron.extras import require
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.files import write_text
from plt_megatron.train.callbacks.base import Callback, Run


class Metrics(Callback):
    """Writes every record on the first rank."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._path = run.folder.metrics_file
        self._board: Any = None
        self._wandb: Any = None

    def _open_trackers(self) -> None:
        config, folder = self.run.config, self.run.folder
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder.tensorboard))
        if config.logging.wandb_project is not None:
            self._wandb = self._open_wandb(config.logging.wandb_project)

    def _open_wandb(self, project: str) -> Any:
        """Open the run folder's one W&B run, however often the run is restarted."""
        require("logging.wandb_project", "wandb")
        import wandb

        config, folder = self.run.config, self.run.folder
        if not folder.wandb_id_file.exists():
            write_text(folder.wandb_id_file, secrets.token_hex(8) + "\n")
        opened = wandb.init(
            project=project,
            id=folder.wandb_id_file.read_text(encoding="ascii").strip(),
            name=config.name,
            dir=str(folder.path),
            config=dataclasses.asdict(config),
            resume="allow",
        )
        # Our own axis: W&B drops values logged at an earlier step than its own, as after a rollback.
        for kind in ("train", "validation", "evaluation"):
            opened.define_metric(f"{kind}/*", step_metric="step")
        return opened

    def on_start(self) -> None:
        """Open the files, and remove what an earlier attempt wrote after this step."""
        self.run.folder.path.mkdir(parents=True, exist_ok=True)
        self._open_trackers()
        self._rewind()

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Remove what was written after the step that the run returns to."""
        self._rewind()

    def _rewind(self) -> None:
        json_lines.rewind(self._path, lambda record: record["step"] <= self.run.clock.step)

    def on_record(self, record: dict[str, Any]) -> None:
        json_lines.append(self._path, record)
        numbers = dict(_numbers(record))
        if self._board is not None:
            for tag, value in numbers.items():
                self._board.add_scalar(tag, value, record["step"])
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers | {"step": record["step"]})

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (tag, number) for a record; a list has one entry per loop, a mapping one per name."""
    suffix = f"_loops_{record['loop_count']}" if record["kind"] == "validation" else ""
    for name, value in record.items():
        if name in ("kind", "step") or (suffix and name == "loop_count"):
            continue
        entries = {name: value}
        if isinstance(value, list):
            entries = {f"{name}/loop_{loop}": entry for loop, entry in enumerate(value, 1)}
        elif isinstance(value, dict):
            entries = {f"{name}/{key}": entry for key, entry in value.items()}
        for tag, entry in entries.items():
            if isinstance(entry, int | float):
                yield f"{record['kind']}/{tag}{suffix}", entry
