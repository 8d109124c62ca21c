"""How far a run has come, from its folder alone."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.loader import load_config
from plt_megatron.errors import UserError
from plt_megatron.launcher.job import load_settings
from plt_megatron.launcher.records import WHY, last_checkpoint_step, read_events, unended
from plt_megatron.run_folder.checkpoints import checkpoint_folders, step_of

METRICS = "metrics.jsonl"
_TAIL_BYTES = 1 << 17
_RECORDS = 20  # whose median rate stands for the run's


@dataclass(frozen=True)
class RunStatus:
    """A run, as its folder shows it.

    Attributes:
        step, steps: done, and in all; 0 and None where they cannot be told.
        tokens_per_second: of the whole job lately; None: nothing logged yet.
        tokens_per_step: None where the configuration cannot be read.
        checkpoint: step of the last one; 0: none.
        attempts: starts of the ranks so far.
        restarts: one line for each attempt that did not finish, the oldest first.
        last_status: how the last attempt ended (finished, preempted, failed, node_failed, killed); "" if it has not
            ended, or none was made.
        stopped: the reason why the job gave the run up; None if it did not.
        problem: why the configuration cannot be read; None if it can.
    """

    run: Path
    step: int
    steps: int | None
    tokens_per_second: float | None
    tokens_per_step: int | None
    checkpoint: int
    attempts: int
    restarts: list[str]
    last_status: str
    stopped: str | None
    problem: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the last step is done and, where attempts are recorded, the last one says so."""
        if self.last_status:
            return self.last_status == "finished"
        return self.steps is not None and self.step >= self.steps

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the present rate."""
        if self.steps is None or not self.tokens_per_second or not self.tokens_per_step:
            return None
        return max(0, self.steps - self.step) * self.tokens_per_step / self.tokens_per_second


def read_run_status(run: Path) -> RunStatus:
    """Look at a run's folder. Nothing that is missing or damaged in it is an error here."""
    steps, tokens_per_step, problem = None, None, None
    try:
        config = load_config(run / "config.yaml", accept_old_names=True)
        steps, tokens_per_step = derived.train_iters(config), derived.tokens_per_step(config)
    except (UserError, AssertionError) as error:
        problem = str(error).splitlines()[0] if str(error) else "config.yaml does not say how long the run is"
    records = last_train_records(run, _RECORDS)
    events = read_events(run)
    ends = [event for event in events if event["event"] == "end"]
    open_starts = unended(events)
    stops = [event for event in events if event["event"] == "stop"]
    return RunStatus(
        run=run,
        step=int(records[-1]["step"]) if records else 0,
        steps=steps,
        tokens_per_second=_rate(records),
        tokens_per_step=tokens_per_step,
        checkpoint=last_checkpoint_step(run),
        attempts=sum(event["event"] == "start" for event in events),
        restarts=[_describe(end) for end in ends if end.get("status") != "finished"],
        last_status=str(ends[-1].get("status") or "") if ends and not open_starts else "",
        stopped=str(stops[-1].get("reason") or "no reason given") if stops and (run / WHY).is_file() else None,
        problem=problem,
    )


def _describe(end: dict[str, Any]) -> str:
    nodes = ", ".join(end.get("nodes") or [])
    where = f" on {nodes}" if nodes else ""
    return f"attempt {end.get('attempt')}{where}, step {end.get('step')}: {end.get('status')}: {end.get('reason')}"


def last_train_records(run: Path, count: int) -> list[dict[str, Any]]:
    """The last records of training in metrics.jsonl, the oldest first; torn lines are left out."""
    try:
        with (run / METRICS).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    records = []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and record.get("kind") == "train" and isinstance(record.get("step"), int):
                records.append(record)
        if len(records) == count:
            break
    return records[::-1]


def _rate(records: list[dict[str, Any]]) -> float | None:
    rates = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
    return statistics.median(rates) if rates else None


def measured_tokens_per_second(run: Path, world_size: int) -> float | None:
    """What the run's earlier jobs reached on as many processes; None: nothing to go by."""
    if not (run / "job.yaml").is_file():
        return None
    try:
        settings = load_settings(run)
    except UserError:
        return None
    records = last_train_records(run, _RECORDS)
    return _rate(records) if settings.world_size == world_size and len(records) > 2 else None


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the checkpoints that are there, ascending; checkpoints of a course given up are left out."""
    last = last_checkpoint_step(run)
    return [step for step in map(step_of, checkpoint_folders(run / "checkpoints")) if step <= last]
