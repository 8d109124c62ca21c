"""A run's progress, from its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.errors import UserError
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.attempts import FINISHED, setup_warnings, unended
from plt_megatron.run_folder.checkpoints import latest_step
from plt_megatron.run_folder.folder import CONFIG, RunFolder
from plt_megatron.run_folder.metrics import median_speed

_RECORDS = 20  # training records over which the median rate is taken


@dataclass(frozen=True)
class RunStatus:
    """The status of a run, as its folder shows it.

    Attributes:
        step, steps: steps done, by metrics.jsonl or the last checkpoint, and in total; 0 and None if unknown.
        tokens_per_second: recent rate of the whole job; None if nothing is logged yet.
        tokens_left: tokens until the last step; None if the configuration cannot be read.
        checkpoint: step of the last checkpoint; 0 if there is none.
        saves: whether the configuration has the run save checkpoints; False if it cannot be read, and in a copy without
            checkpoints of a run that a sweep saw finish.
        attempts: starts of the ranks so far.
        restarts: one line for each attempt that did not finish, the oldest first.
        last_status: how the last attempt ended (`attempts`); "" if it has not ended, none was made, or the run has been
            tried again without a job.
        stopped: why the job gave the run up; None if it did not.
        attempt_jobs: ids of the jobs that made attempts.
        warnings: failures that the setup of the last attempt's job passed over.
        problems: files that cannot be read, and why.
    """

    run: Path
    step: int = 0
    steps: int | None = None
    tokens_per_second: float | None = None
    tokens_left: int | None = None
    checkpoint: int = 0
    saves: bool = False
    attempts: int = 0
    restarts: list[str] = field(default_factory=list)
    last_status: str = ""
    stopped: str | None = None
    attempt_jobs: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the last step is done: by the last attempt's own word or, where none is recorded, if the step is
        logged, and saved unless the run saves none."""
        if self.last_status:
            return self.last_status == FINISHED and (self.steps is None or self.step >= self.steps)
        if self.steps is None or self.step < self.steps:
            return False
        return self.checkpoint >= self.steps or not self.saves  # a step is logged before it is saved

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the present rate; None if unknown."""
        if self.tokens_left is None or not self.tokens_per_second:
            return None
        return self.tokens_left / self.tokens_per_second


def read_run_status(run: Path) -> RunStatus:
    """Read a run's folder. Missing or damaged files are not errors here. Raises `OSError` if one cannot be read."""
    folder = RunFolder(run)
    steps, left, saves = None, None, False
    problems = []
    records, checkpoint = last_train_records(folder), 0
    try:
        checkpoint = latest_step(run)
    except UserError as error:
        problems.append(str(error))
    logged, tokens = (int(records[-1]["step"]), int(records[-1].get("tokens") or 0)) if records else (0, 0)
    step = max(logged, checkpoint)  # a checkpoint's step may not be one that is logged
    if not records and folder.metrics_size() and not json_lines.last(folder.metrics_file, 1):
        folder.metrics_file.open("rb").close()  # raises if it is just not readable
        problems.append(f"{folder.metrics_file.name}: damaged, no line at its end can be read")
    try:
        config = folder.config()
        saves = config.checkpoint.enabled and not (checkpoint == 0 and _was_finished(folder))
        tokens = BatchSchedule(config).tokens(step - logged, tokens)
        steps, left = derived.last_step(config, step, tokens), derived.tokens_left(config, step, tokens)
    except (UserError, AssertionError, ArithmeticError) as error:
        reason = str(error).splitlines()[0] if str(error) else "config.yaml does not set the run's length"
        problems.append(f"{CONFIG}: {reason}")
    events = folder.attempts()
    starts = [event for event in events if event["event"] == "start"]
    ends = [event for event in events if event["event"] == "end"]
    if ends and ends[-1].get("status") == FINISHED:  # metrics and checkpoints may be gone since
        step = max(step, int(ends[-1].get("step") or 0))
    last = events[-1] if events else {"event": ""}
    stopped = f"see {folder.why_file}" if folder.why_file.is_file() else None
    if last["event"] == "stop":  # a full disk has no room for why.txt; a job whose Python does not run writes it alone
        stopped = str(last.get("reason") or "no reason given")
    is_ended = ends and not unended(events) and last["event"] != "again"
    return RunStatus(
        run=run,
        step=step,
        steps=steps,
        tokens_per_second=median_speed(records),
        tokens_left=left,
        checkpoint=checkpoint,
        saves=saves,
        attempts=len(starts),
        restarts=[_describe(end) for end in ends if end.get("status") != FINISHED],
        last_status=str(ends[-1].get("status") or "") if is_ended else "",
        stopped=stopped,
        attempt_jobs=[str(start.get("job_id")) for start in starts],
        warnings=setup_warnings(events),
        problems=problems,
    )


def _was_finished(folder: RunFolder) -> bool:
    """Return whether the sweep's note says so."""
    try:
        note = json.loads(folder.sweep_note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and note.get("status") == "finished"


def _describe(end: dict[str, Any]) -> str:
    nodes = ", ".join(end.get("nodes") or [])
    where = f" on {nodes}" if nodes else ""
    return f"attempt {end.get('attempt')}{where}, step {end.get('step')}: {end.get('status')}: {end.get('reason')}"


def last_train_records(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the last few training records, oldest first."""

    def is_train(record: dict[str, Any]) -> bool:
        return record.get("kind") == "train" and isinstance(record.get("step"), int)

    return json_lines.last(folder.metrics_file, _RECORDS, is_train)
