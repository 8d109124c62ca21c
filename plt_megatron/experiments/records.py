"""The records of a sweep's or study's runs in their folders: each run's progress, data and results.

Nothing is averaged here. A run that is left out of the means is named with the reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_megatron.config import derived
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.data.mix import fingerprint_differences, required_samples, training_fingerprint
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, load_plan, plan_differences
from plt_megatron.run_folder.attempts import job_seconds
from plt_megatron.run_folder.checkpoints import NAME, latest_step, read_verified_progress, step_of
from plt_megatron.run_folder.files import write_json
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.metrics import RunMetrics
from plt_megatron.run_folder.status import read_run_status
from plt_megatron.run_folder.text import first_few, plural

State = Literal["finished", "failed", "interrupted", "pending"]


@dataclass
class RunRecord:
    """The sweep's note on a run. `seconds`: total of all attempts; `fingerprint`: that of its data (`data.mix`)."""

    status: str = "started"
    exit_status: int | None = None
    attempts: int = 0
    seconds: float = 0.0
    reason: str = ""
    fingerprint: dict[str, Any] | None = None


def read_record(folder: RunFolder) -> RunRecord | None:
    """Read the note; None if no sweep has started the run or seen it finished (a Slurm job does not write one)."""
    try:
        return RunRecord(**json.loads(folder.sweep_note.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder.sweep_note}: broken ({error}); remove it") from error


def write_record(folder: RunFolder, record: RunRecord) -> None:
    write_json(folder.sweep_note, asdict(record), indent=None)


def state_of(run: PlannedRun) -> State:
    """Return the state of a run: finished, if the last step is recorded, validated and saved; failed, if the last
    attempt ended with an error; else interrupted or pending."""
    metrics, steps = run.folder.metrics(), derived.train_iters(run.config)
    is_validated = run.config.validation.iters == 0 or any(record["step"] >= steps for record in metrics.validation)
    if metrics.step >= steps and is_validated and _is_saved(run, steps):
        return "finished"
    if failure_of(run) is not None:
        return "failed"
    return "interrupted" if metrics.tokens or latest_step(run.folder.path) else "pending"


def _is_saved(run: PlannedRun, steps: int) -> bool:
    """Return whether the last step is saved; in a copy without checkpoints, by the sweep's note."""
    if not run.config.checkpoint.enabled:
        return True
    saved, record = latest_step(run.folder.path), read_record(run.folder)
    return saved >= steps or (saved == 0 and record is not None and record.status == "finished")


def failure_of(run: PlannedRun) -> str | None:
    """Return why the run's last attempt failed, by the sweep's note or the Slurm job's; None if it did not."""
    record = read_record(run.folder)
    if record is not None and record.status == "failed":
        return record.reason or "its last attempt failed"
    return read_run_status(run.folder.path).stopped


def note_finished(runs: Iterable[PlannedRun]) -> None:
    """Write the sweep's note on finished runs that have none (a Slurm job writes none), so that reports do not need
    their checkpoints."""
    for run in runs:
        record = read_record(run.folder) or RunRecord()
        if record.status != "finished" or record.fingerprint is None:
            record.status, record.reason, record.fingerprint = "finished", "", recorded_fingerprint(run)
            write_record(run.folder, record)


def forget_failure(run: PlannedRun) -> None:
    """Turn a failed run into an interrupted one, which is resumed."""
    run.folder.try_again()
    forget_note_of_failure(run)


def forget_note_of_failure(run: PlannedRun) -> None:
    """Turn the sweep's note on a failed run into that on an interrupted one."""
    record = read_record(run.folder)
    if record is not None and record.status == "failed":
        record.status, record.reason = "interrupted", ""
        write_record(run.folder, record)


# ---------------------------------------------------------------- data


def data_fingerprint(run: PlannedRun) -> dict[str, Any]:
    """Return the fingerprint of the data that the run would read now."""
    config = run.config
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    return training_fingerprint(config, tokenizer, required_samples(config)[0])


def recorded_fingerprint(run: PlannedRun) -> dict[str, Any] | None:
    """Return the fingerprint of the data that the run has read, from its checkpoint or the sweep's note; None if
    neither has it."""
    checkpoint = run.folder.latest_checkpoint(verify=False)
    if checkpoint is not None:
        # Training reports a damaged checkpoint; the note has the same fingerprint.
        with contextlib.suppress(OSError, ValueError, KeyError):
            found: dict[str, Any] | None = read_verified_progress(checkpoint).get("data_fingerprint")
            if found is not None:
                return found
    record = read_record(run.folder)
    return record.fingerprint if record else None


def data_key(fingerprint: dict[str, Any]) -> str:
    """Return a text that fingerprints of the same data share, whatever seed and budget."""
    return repr(sorted(item for item in fingerprint.items() if item[0] not in ("sampling", "sha256")))


def data_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the differences between two fingerprints; empty for the same data, whatever seed and budget."""
    return fingerprint_differences(before, {**now, "sampling": before.get("sampling")})


def check_same_data(todo: Iterable[PlannedRun], finished: Sequence[PlannedRun]) -> None:
    """Raise `UserError` if a run would now read other data than a finished run with the same data settings has read."""
    first: dict[str, PlannedRun] = {}
    for run in todo:
        first.setdefault(repr(run.config.data), run)
    for settings, run in first.items():
        same = ((r.name, recorded_fingerprint(r)) for r in finished if repr(r.config.data) == settings)
        name, before = next((found for found in same if found[1]), ("", None))
        words = data_differences(before, data_fingerprint(run)) if before else []
        if words:
            raise UserError(
                f"{run.name} would read other data than {name} has read ({', '.join(words)}), and the two could not be "
                "compared: restore that data, or give the sweep another name (name=...)"
            )


# ---------------------------------------------------------------- time


def measured_flops_rate(runs: Iterable[PlannedRun]) -> float | None:
    """Return the median model FLOP/s of runs with metrics, wherever they ran; None before the first."""
    speeds = [(run.folder.metrics().tokens_per_second(), run.flops_per_token) for run in runs]
    rates = [speed * flops for speed, flops in speeds if speed]
    return statistics.median(rates) if rates else None


def remaining_tokens(run: PlannedRun) -> int:
    """Return the number of tokens left after the last record, or after the checkpoint that a branch starts from."""
    start, done = run.config.checkpoint, run.folder.metrics().tokens
    checkpoint = Path(start.load or "")
    if not done and not start.weights_only and NAME.fullmatch(checkpoint.name):
        done = BatchSchedule(run.config).tokens(step_of(checkpoint))
    return max(0, run.tokens - done)


def remaining_seconds(runs: Sequence[PlannedRun], rate: float, jobs: int = 1) -> float:
    """Return the seconds that the rest of `runs` takes at `rate` model FLOP/s per run, `jobs` at once."""
    ends = [0.0] * max(1, jobs)
    for run in runs:  # like the sweep: in order, each as soon as a slot is free
        ends[ends.index(min(ends))] += remaining_tokens(run) * run.flops_per_token / rate
    return max(ends)


# ---------------------------------------------------------------- results

Status = Literal["used", "missing", "partial", "failed", "diverged", "other data", "other settings", "unreadable"]


@dataclass
class RunResult:
    """One run of the plan.

    Attributes:
        status: `used`, or why the run is left out of the means; `reason`: the same in words.
        curve: (tokens, validation loss) at the model's own loop count, in nats per token, ascending.
        validation: last validation record at the model's own loop count; empty if there is none.
        evaluation: last record of an evaluation by lm-evaluation-harness; empty if there is none.
        seconds: training time, here and in Slurm's jobs, if known.
        skipped: steps that the training loop did not accept.
    """

    run: PlannedRun
    status: Status
    reason: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    validation: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    train_loss: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    skipped: int = 0
    fingerprint: dict[str, Any] | None = None

    @property
    def loss(self) -> float | None:
        """The last loss of the curve if the run is used, else None."""
        return self.curve[-1][1] if self.status == "used" else None


@dataclass
class SweepResults:
    """All runs of a sweep in the plan's order, and reservations about their results."""

    plan: SweepPlan
    runs: list[RunResult]
    problems: list[str]

    def used(self) -> list[RunResult]:
        return [result for result in self.runs if result.status == "used"]


def load_results(folder: str | Path) -> SweepResults:
    """Read the sweep in `folder`. Raises `UserError` if there is none; runs with broken files are left out of the
    means."""
    plan = load_plan(folder)
    runs = []
    for run in plan.runs:
        try:
            runs.append(_read_run(run))
        except UserError as error:
            runs.append(RunResult(run, "unreadable", str(error)))
    groups: dict[tuple[str, ...], list[RunResult]] = {}
    for result in runs:  # rows may differ in data settings, by plan
        groups.setdefault((*plan.group_of(result.run), repr(result.run.config.data)), []).append(result)
    for group in groups.values():
        _set_other_data_aside(group)
    return SweepResults(plan, runs, list(_problems(plan, runs)))


def _read_run(run: PlannedRun) -> RunResult:
    metrics = run.folder.metrics()
    validations = metrics.validation_at(run.config.model.loop_count)
    curve = [(r["tokens"], r["loss"]) for r in validations]
    status, reason = _status(run, curve, metrics)
    record = read_record(run.folder)
    return RunResult(
        run,
        status,
        reason,
        curve=curve,
        validation=validations[-1] if validations else {},
        evaluation=metrics.evaluation[-1] if metrics.evaluation else {},
        train_loss=metrics.train[-1]["loss"] if metrics.train else None,
        # The sweep's note covers only attempts on this machine.
        seconds=(record.seconds if record else 0.0) + job_seconds(run.folder.attempts()) or None,
        tokens_per_second=metrics.tokens_per_second(),
        skipped=run.folder.bad_steps(),
        fingerprint=recorded_fingerprint(run) if metrics.tokens else None,
    )


def _status(run: PlannedRun, curve: Sequence[tuple[int, float]], metrics: RunMetrics) -> tuple[Status, str]:
    differences = _other_settings(run)
    if differences:
        return "other settings", f"not run as planned: {differences}"
    state = state_of(run)
    if state == "failed":
        return "failed", failure_of(run) or "its last attempt failed"
    if state == "pending":
        return "missing", "not begun"
    guessing = math.log(run.vocab)  # the loss of a model that knows nothing
    last = curve[-1][1] if curve else None
    updates = [record["loss"] for record in metrics.train if record.get("updated", True)]
    newest = last if state == "finished" else updates[-1] if updates else None
    if newest is not None and not newest < (guessing if state == "finished" else math.inf):
        return "diverged", f"the loss is {newest:.4g} (guessing: {guessing:.2f})"
    if state == "interrupted":
        return "partial", f"at {metrics.tokens / run.tokens:.0%} of its tokens"
    if last is None:
        return "partial", f"trained, but not validated at its {plural(run.config.model.loop_count, 'loop')}"
    return "used", ""


def _other_settings(run: PlannedRun) -> str:
    """Describe how the run folder's own configuration differs from the plan's."""
    if not run.folder.config_file.exists():
        return ""
    differences = plan_differences(run.config, run.folder.config())
    ignored = ("logging.", "checkpoint.", "training.threads_per_process", "data.index")
    return "; ".join(text for key, text in differences.items() if not key.startswith(ignored))


def _set_other_data_aside(runs: Sequence[RunResult]) -> None:
    """Leave runs that read other data than most with the same data settings out of the means."""
    seen = {id(r): data_key(r.fingerprint) for r in runs if r.status == "used" and r.fingerprint}
    if len(set(seen.values())) < 2:
        return
    usual = Counter(seen.values()).most_common(1)[0][0]  # ties go to the first in the plan
    reference = next(r for r in runs if seen.get(id(r)) == usual)
    for result in runs:
        if id(result) in seen and seen[id(result)] != usual:
            words = data_differences(reference.fingerprint or {}, result.fingerprint or {})
            result.status = "other data"
            result.reason = f"read other data than {reference.run.name}: {', '.join(words)}"


def _problems(plan: SweepPlan, runs: Sequence[RunResult]) -> Iterator[str]:
    """Describe the problems of a sweep, one line each; none if every run counts."""
    used = [result for result in runs if result.status == "used"]
    if not used:
        yield f"no run of the sweep is finished and usable ({len(runs)} are planned): there is no result yet"
    for r in runs:
        if r.status not in ("used", "missing"):
            yield f"{r.run.name} is left out of the means ({r.status}): {r.reason}"
    missing = [result.run.name for result in runs if result.status == "missing"]
    if missing:
        yield f"{plural(len(missing), 'run')} not started: {first_few(missing)}"
    seeds: dict[tuple[int, ...], list[str]] = {}
    for label in dict.fromkeys(result.run.row() for result in runs):
        own = tuple(sorted(result.run.seed for result in used if result.run.row() == label))
        seeds.setdefault(own, []).append(label)
    if len(seeds) > 1 and used:
        sets = "; ".join(f"{', '.join(map(str, own)) or 'none'}: {', '.join(rows)}" for own, rows in seeds.items())
        yield f"the rows have different seeds, so their means are not of the same runs ({sets})"
    if any(r.fingerprint is None for r in used):
        yield "some runs recorded no data fingerprint: it is unknown whether all read the same data"
    yield from (f"{r.run.name}: {plural(r.skipped, 'step')} skipped or rolled back" for r in runs if r.skipped)
    rows = dict.fromkeys(f"{r.run.row()} {r.run.deviation:+.1%}" for r in runs if abs(r.run.deviation) > 0.005)
    if rows:
        yield f"{plan.match_budget} is held only within: {', '.join(rows)}"
