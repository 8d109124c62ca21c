"""What the runs of a sweep recorded, and what is wrong with them. Nothing is averaged here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_megatron.errors import UserError
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, load_plan, plan_differences
from plt_megatron.experiments.sweep_status import (
    data_differences,
    data_part,
    failure_of,
    first_few,
    read_record,
    recorded_fingerprint,
    state_of,
)
from plt_megatron.run_folder.attempts import job_seconds
from plt_megatron.run_folder.metrics import RunMetrics
from plt_megatron.run_folder.text import plural

Status = Literal["used", "missing", "partial", "failed", "diverged", "other data", "other settings", "unreadable"]


@dataclass
class RunResult:
    """One run of the plan.

    Attributes:
        status: `used`, or why the run is left out of the means; `reason`: the same in words.
        curve: (tokens, validation loss) at the model's own loop count, in nats per token, ascending.
        loss: the last of them, for a run that is used; None for others.
        validation: the last record of a validation at the model's own loop count; empty: there is none.
        evaluation: the last record of an evaluation by lm-evaluation-harness; empty: there is none.
        seconds: of training, here and in Slurm's jobs, if known.
        skipped: steps that the training loop did not accept.
    """

    run: PlannedRun
    status: Status
    reason: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    loss: float | None = None
    validation: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    train_loss: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    skipped: int = 0
    fingerprint: dict[str, Any] | None = None


@dataclass
class SweepResults:
    """All runs of a sweep in the plan's order, and what the reader has to know before believing them."""

    plan: SweepPlan
    runs: list[RunResult]
    problems: list[str]

    def used(self) -> list[RunResult]:
        return [result for result in self.runs if result.status == "used"]

    @property
    def has_one_data(self) -> bool:
        """Whether all runs that have begun have read the same data."""
        return not any(result.status == "other data" for result in self.runs)


def load_results(folder: str | Path) -> SweepResults:
    """Read the sweep in `folder`. Raises `UserError` if there is none; runs with broken files are left out of the
    means."""
    plan = load_plan(folder)
    runs = [_read_run(run) for run in plan.runs]
    _set_other_data_aside(runs)
    return SweepResults(plan, runs, _problems(plan, runs))


def _read_run(run: PlannedRun) -> RunResult:
    try:
        return _read_files(run)
    except UserError as error:
        return RunResult(run, "unreadable", str(error))


def _read_files(run: PlannedRun) -> RunResult:
    metrics = run.folder.metrics()
    result = RunResult(run, "used", fingerprint=recorded_fingerprint(run) if metrics.tokens else None)
    validations = metrics.validation_at(run.config.model.loop_count)
    result.curve = [(r["tokens"], r["loss"]) for r in validations]
    result.validation = validations[-1] if validations else {}
    result.evaluation = metrics.evaluation[-1] if metrics.evaluation else {}
    result.train_loss = metrics.train[-1]["loss"] if metrics.train else None
    result.tokens_per_second = metrics.tokens_per_second()
    result.skipped = run.folder.bad_steps()
    record = read_record(run.folder)
    # The sweep's note has those of attempts on this machine alone.
    result.seconds = (record.seconds if record else 0.0) + job_seconds(run.folder.attempts()) or None
    result.status, result.reason = _status(run, result, metrics)
    if result.status == "used":
        result.loss = result.curve[-1][1]
    return result


def _status(run: PlannedRun, result: RunResult, metrics: RunMetrics) -> tuple[Status, str]:
    differences = _other_settings(run)
    if differences:
        return "other settings", f"not run as planned: {differences}"
    state = state_of(run)
    if state == "failed":
        return "failed", failure_of(run) or "its last attempt failed"
    if state == "pending":
        return "missing", "not begun"
    guessing = math.log(run.vocab)  # the loss of a model that knows nothing
    bad = [r["loss"] for r in (*metrics.train, *metrics.validation) if not math.isfinite(r["loss"])]
    last = result.curve[-1][1] if result.curve else None
    if (last is not None and not last < guessing) or (bad and state != "finished"):
        return "diverged", f"the loss is {last if last is not None else bad[-1]:.4g} (guessing: {guessing:.2f})"
    if state == "interrupted":
        return "partial", f"at {metrics.tokens / run.tokens:.0%} of its tokens"
    if last is None:
        return "partial", f"trained, but not validated at its {plural(run.config.model.loop_count, 'loop')}"
    return "used", ""


def _other_settings(run: PlannedRun) -> str:
    """How the run folder's own configuration differs from the plan's, in words."""
    if not run.folder.config_file.exists():
        return ""
    differences = plan_differences(run.config, run.folder.config())
    ignored = ("logging.", "checkpoint.", "training.threads_per_process", "data.index")
    return "; ".join(text for key, text in differences.items() if not key.startswith(ignored))


def _set_other_data_aside(runs: Sequence[RunResult]) -> None:
    """Leave runs that read other data than most out of the means."""
    seen = {id(r): _data_key(r.fingerprint) for r in runs if r.status == "used" and r.fingerprint}
    if len(set(seen.values())) < 2:
        return
    usual = Counter(seen.values()).most_common(1)[0][0]  # of equally common ones the first in the plan
    reference = next(r for r in runs if seen.get(id(r)) == usual)
    for result in runs:
        if id(result) in seen and seen[id(result)] != usual:
            words = data_differences(reference.fingerprint or {}, result.fingerprint or {})
            result.status, result.loss = "other data", None
            result.reason = f"read other data than {reference.run.name}: {', '.join(words)}"


def _data_key(fingerprint: dict[str, Any] | None) -> str:
    return repr(sorted(data_part(fingerprint or {}).items()))


def _problems(plan: SweepPlan, runs: Sequence[RunResult]) -> list[str]:
    """One line each; empty for a sweep whose every run counts."""
    problems = []
    used = [result for result in runs if result.status == "used"]
    if not used:
        problems.append(f"no run of the sweep is finished and usable ({len(runs)} are planned): there is no result yet")
    problems += [
        f"{r.run.name} is left out of the means ({r.status}): {r.reason}"
        for r in runs
        if r.status not in ("used", "missing")
    ]
    missing = [result.run.name for result in runs if result.status == "missing"]
    if missing:
        problems.append(f"{plural(len(missing), 'run')} not started: {first_few(missing)}")
    seeds: dict[tuple[int, ...], list[str]] = {}
    for label in dict.fromkeys(result.run.row() for result in runs):
        own = tuple(sorted(result.run.seed for result in used if result.run.row() == label))
        seeds.setdefault(own, []).append(label)
    if len(seeds) > 1 and used:
        sets = "; ".join(f"{', '.join(map(str, own)) or 'none'}: {', '.join(rows)}" for own, rows in seeds.items())
        problems.append(f"the rows have different seeds, so their means are not of the same runs ({sets})")
    if any(r.fingerprint is None for r in used):
        problems.append("some runs recorded no data fingerprint: it is unknown whether all read the same data")
    problems += [f"{r.run.name}: {plural(r.skipped, 'step')} skipped or rolled back" for r in runs if r.skipped]
    off = [r.run for r in runs if abs(r.run.deviation) > 0.005]
    rows = dict.fromkeys(f"{run.row()} {run.deviation:+.1%}" for run in off)
    if rows:
        problems.append(f"{plan.match_budget} is held only within: {', '.join(rows)}")
    return problems
