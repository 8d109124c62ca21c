"""The record of a training step, which all callbacks add to, and where it is shown and written.

Records go to metrics.jsonl always, to TensorBoard and Weights & Biases if configured; a terminal shows a bar, a log
plain lines.
"""

from __future__ import annotations

import dataclasses
import heapq
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import first_line
from plt_megatron.extras import require
from plt_megatron.model.loop_context import ExpertStatistics, LoopStatistics
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.files import write_text
from plt_megatron.run_folder.text import format_duration, plural
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.engine import StepResult
from plt_megatron.train.optimizers import described

_SOURCES = 64  # in a record: thousands would make it 100 kB long


class LoopLosses(Callback):
    """Reports, under a `training.loop_schedule`, the last step's loop count and the losses by loop count.

    The losses are means since the last record, also across restarts: a record's own loss is that of one step, whatever
    its loop count.
    """

    name = "loop_losses"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._losses: dict[str, list[float]] = {}  # by loop count, as text: JSON has no other keys
        self._loop_count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = state.get("losses", {})

    def after_step(self, step: Step, result: StepResult) -> None:
        self._loop_count = step.loop_count
        if result.updated and result.loss_tokens:
            self._losses.setdefault(str(step.loop_count), []).append(result.loss)

    def on_log(self) -> dict[str, Any]:
        """Return `loop_count` of the step, and `loss_by_loops`: mean losses by loop count."""
        means = {loops: sum(losses) / len(losses) for loops, losses in sorted(self._losses.items())}
        self._losses = {}
        return {"loop_count": self._loop_count, "loss_by_loops": means}


class LoopMeasures(Callback):
    """Collects `LoopStatistics` of the first microbatch in steps that will be logged."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._statistics: LoopStatistics | None = None

    def before_step(self, step: Step) -> None:
        self._statistics = None
        if self.run.is_due(self.run.config.logging.log_interval, step.number):
            self._statistics = step.batches[0].statistics = _empty(self.run.config.model, step.loop_count)

    def on_log(self) -> dict[str, Any]:
        """Return gate means, norms and step sizes, one entry per loop."""
        return {} if self._statistics is None else self._statistics.reduce()


def _empty(model: ModelConfig, loop_count: int) -> LoopStatistics:
    layers, device = model.num_layers, torch.cuda.current_device()
    if model.moe is None:
        return LoopStatistics(loop_count, layers, device)
    parts = parallel_state.get_tensor_and_context_parallel_world_size()
    experts = ExpertStatistics(loop_count, layers, model.moe.num_experts, device, parts)
    return LoopStatistics(loop_count, layers, device, experts)


class TrainLog(Callback):
    """Reports the record every `logging.log_interval` steps and after the last one: the step's results, the passes over
    the data's sources (at most 64, those with the most passes), batch size and row length where a schedule changes
    them, and what other callbacks add."""

    def after_step(self, step: Step, result: StepResult) -> None:
        if not self.run.is_due(self.run.config.logging.log_interval):
            return
        config, clock = self.run.config, self.run.clock
        record: dict[str, Any] = {"kind": "train", "step": clock.step, "tokens": clock.tokens}
        record |= {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
        epochs = self.run.data.epochs(clock.samples)
        shown = set(heapq.nlargest(_SOURCES, epochs, key=epochs.__getitem__))
        record["source_epochs"] = {name: passes for name, passes in epochs.items() if name in shown}
        if config.training.batch_schedule:
            record["global_batch_size"] = step.global_batch_size
        if config.data.length_schedule:
            record["sequence_length"] = step.sequence_length
        for callback in self.run.callbacks:
            record |= callback.on_log()
        self.run.report(record)


class Metrics(Callback):
    """Writes every record on the first rank."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._path = run.folder.metrics_file
        self._board: Any = None
        self._wandb: Any = None

    def _open_wandb(self, project: str) -> Any:
        """Open the run folder's one W&B run, however often the run is restarted; offline if the service refuses."""
        require("logging.wandb_project", "wandb")
        import wandb

        config, folder = self.run.config, self.run.folder
        if not folder.wandb_id_file.exists():
            write_text(folder.wandb_id_file, secrets.token_hex(8) + "\n")
        settings: dict[str, Any] = {
            "project": project,
            "id": folder.wandb_id_file.read_text(encoding="ascii").strip(),
            "name": config.name,
            "dir": str(folder.path),
            "config": dataclasses.asdict(config),
            "resume": "allow",
        }
        try:
            opened = wandb.init(**settings)
        except wandb.Error as error:  # no network, no key, or a wrong one
            later = f"`wandb sync {folder.path}/wandb/offline-run-*` sends it later"
            self.run.say(f"warning: Weights & Biases: {first_line(error)}; logging offline, {later}")
            wandb.teardown()  # its service holds the run's id
            opened = wandb.init(**settings, mode="offline")
        # Our own axis: W&B drops values logged at an earlier step than its own, as after a rollback.
        for kind in ("train", "validation", "evaluation", "stragglers", "upload"):
            opened.define_metric(f"{kind}/*", step_metric="step")
        return opened

    def on_start(self) -> None:
        """Open the files, and remove what an earlier attempt wrote after this step."""
        logging, folder = self.run.config.logging, self.run.folder
        folder.path.mkdir(parents=True, exist_ok=True)
        if logging.wandb_project is not None:
            self._wandb = self._open_wandb(logging.wandb_project)
        self._rewind()

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Remove what was written after the step that the run returns to."""
        self._rewind()

    def _rewind(self) -> None:
        step = self.run.clock.step
        json_lines.rewind(self._path, lambda record: record["step"] <= step)
        if self.run.config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if self._board is not None:
                self._board.close()
            self._board = SummaryWriter(str(self.run.folder.tensorboard), purge_step=step + 1)

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


class ProgressBar(Callback):
    """Progress display of the first rank; before the first step, a table of the data's sources and how each kind of
    parameter is updated."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._started = time.monotonic()
        self._first = 0  # tokens
        self._bar: Bar | None = None
        if sys.stdout.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(),
            )

    def on_start(self) -> None:
        step, total = self.run.clock.step, self.run.last_step
        self._begin()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=total, completed=step, loss="-")
        if step:
            self.say(f"resumed at step {step} of {total}")
        self.say(self.run.data.describe())
        self.say(described(self.run.config))

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Tell the time left from here on: the tokens trained on are fewer again."""
        self._begin()

    def _begin(self) -> None:
        self._started, self._first = time.monotonic(), self.run.clock.tokens

    def after_step(self, step: Step, result: StepResult) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step.number, loss=f"{result.loss:.4f}")

    def on_record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "validation":
            average = f", EMA loss {record['ema_loss']:.4f}" if "ema_loss" in record else ""
            loops = plural(record["loop_count"], "loop")
            self.say(f"  validation, {loops}: loss {record['loss']:.4f}{average}")
        elif record["kind"] == "evaluation":
            scores = ", ".join(f"{name} {value:.4f}" for name, value in record["scores"].items())
            self.say(f"  evaluation of step {record['step']}: {scores}")
        elif record["kind"] == "train":
            self._say_step(record)

    def _say_step(self, record: dict[str, Any]) -> None:
        loops = f" ({plural(record['loop_count'], 'loop')})" if "loop_count" in record else ""
        mfu = "" if record["mfu"] is None else f", MFU {100 * record['mfu']:.1f} %"
        self.say(
            f"step {record['step']}/{self.run.last_step}: loss {record['loss']:.4f}{loops}, "
            f"gradient norm {record['grad_norm']:.3f}, lr {record['lr']:.2e}, "
            f"{record['tokens_per_second']:,.0f} tokens/s{mfu}{self._remaining(record)}"
        )

    def _remaining(self, record: dict[str, Any]) -> str:
        done = record["tokens"] - self._first
        left = derived.tokens_left(self.run.config, record["step"], record["tokens"])
        if self._bar is not None or done <= 0 or left <= 0:
            return ""
        return f", {format_duration((time.monotonic() - self._started) / done * left)} left"

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
