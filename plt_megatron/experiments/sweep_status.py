"""The progress of a sweep's runs, read from their folders, and how long the rest will take."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from plt_megatron.config import derived
from plt_megatron.data.mix import fingerprint, fingerprint_differences, required_samples
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.experiments.sweep_plan import PlannedRun
from plt_megatron.run_folder.checkpoints import latest_step, read_verified_progress
from plt_megatron.run_folder.files import write_json
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.status import read_run_status

State = Literal["finished", "failed", "interrupted", "pending"]


def first_few(names: Sequence[str], most: int = 6) -> str:
    """`a, b and 3 more`."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


@dataclass
class RunRecord:
    """The sweep's note on a run. `seconds`: of all attempts; `fingerprint`: of its data (`data.mix`)."""

    status: str = "started"
    exit_status: int | None = None
    attempts: int = 0
    seconds: float = 0.0
    reason: str = ""
    fingerprint: dict[str, Any] | None = None


def read_record(folder: RunFolder) -> RunRecord | None:
    """None where no sweep has started the run, or seen it finished (a Slurm job does not write it)."""
    try:
        return RunRecord(**json.loads(folder.sweep_note.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{folder.sweep_note}: broken ({error}); remove it") from error


def write_record(folder: RunFolder, record: RunRecord) -> None:
    """Write the note atomically."""
    write_json(folder.sweep_note, asdict(record), indent=None)


def state_of(run: PlannedRun) -> State:
    """Finished: the last step is recorded, validated and saved. Failed: the last attempt ended with an error."""
    metrics, steps = run.folder.metrics(), derived.train_iters(run.config)
    is_validated = run.config.validation.iters == 0 or any(record["step"] >= steps for record in metrics.validation)
    if metrics.step >= steps and is_validated and _is_saved(run, steps):
        return "finished"
    if failure_of(run) is not None:
        return "failed"
    return "interrupted" if metrics.tokens or latest_step(run.folder.path) else "pending"


def _is_saved(run: PlannedRun, steps: int) -> bool:
    """Whether nothing is left to train: in a copy without checkpoints the sweep's note says so."""
    if not run.config.checkpoint.enabled:
        return True
    saved, record = latest_step(run.folder.path), read_record(run.folder)
    return saved >= steps or (saved == 0 and record is not None and record.status == "finished")


def failure_of(run: PlannedRun) -> str | None:
    """Why the run's last attempt failed, by the sweep's note or by the Slurm job's; None if it did not."""
    record = read_record(run.folder)
    if record is not None and record.status == "failed":
        return record.reason or "its last attempt failed"
    return read_run_status(run.folder.path).stopped


def note_finished(runs: Iterable[PlannedRun]) -> None:
    """Make the sweep's note of finished runs that have none (a Slurm job writes none), so that their folders say all
    that counts without a checkpoint."""
    for run in runs:
        record = read_record(run.folder) or RunRecord()
        if record.status != "finished" or record.fingerprint is None:
            record.status, record.reason, record.fingerprint = "finished", "", recorded_fingerprint(run)
            write_record(run.folder, record)


# ---------------------------------------------------------------- data


def data_fingerprint(run: PlannedRun) -> dict[str, Any]:
    """The fingerprint of the data that the run would read now."""
    config = run.config
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    samples = required_samples(config)[0]
    return fingerprint(config.data, tokenizer, seed=config.training.seed, num_samples=samples)


def recorded_fingerprint(run: PlannedRun) -> dict[str, Any] | None:
    """The fingerprint of the data that the run has read, from its checkpoint or the sweep's note; None if neither has
    it."""
    checkpoint = run.folder.latest_checkpoint(verify=False)
    if checkpoint is not None:
        # Training reports a damaged checkpoint; the note has the same fingerprint.
        with contextlib.suppress(OSError, ValueError, KeyError):
            found: dict[str, Any] | None = read_verified_progress(checkpoint).get("data_fingerprint")
            if found is not None:
                return found
    record = read_record(run.folder)
    return record.fingerprint if record else None


def data_part(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint without what differs between seeds and budgets on the same data."""
    return {key: value for key, value in fingerprint.items() if key not in ("sampling", "sha256")}


def data_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what differs between two fingerprints; empty for the same data, whatever seed and budget."""
    if data_part(before) == data_part(now):
        return []
    return fingerprint_differences(before, {**now, "sampling": before.get("sampling")})


def check_same_data(todo: Iterable[PlannedRun], finished: Sequence[PlannedRun]) -> None:
    """Raise `UserError` if a run would read other data now than a finished one with the same data settings has read."""
    first: dict[str, PlannedRun] = {}
    for run in todo:
        first.setdefault(repr(run.config.data), run)
    for settings, run in first.items():
        same = {r.name: recorded_fingerprint(r) for r in finished if repr(r.config.data) == settings}
        name, before = next(((name, found) for name, found in same.items() if found), ("", None))
        words = data_differences(before, data_fingerprint(run)) if before else []
        if words:
            raise UserError(
                f"{run.name} would read other data than {name} has read ({', '.join(words)}), and the two could not be "
                "compared: put that data back, or give the sweep another name (name=...)"
            )


# ---------------------------------------------------------------- time


def measured_flops_rate(runs: Iterable[PlannedRun]) -> float | None:
    """Model FLOP/s that runs with metrics reached on this machine, the median over runs; None before the first."""
    speeds = [(run.folder.metrics().tokens_per_second(), run.flops_per_token) for run in runs]
    rates = [speed * flops for speed, flops in speeds if speed]
    return statistics.median(rates) if rates else None


def remaining_tokens(run: PlannedRun) -> int:
    """Tokens after the last record."""
    return max(0, run.tokens - run.folder.metrics().tokens)


def remaining_seconds(runs: Sequence[PlannedRun], rate: float, jobs: int = 1) -> float:
    """Seconds that the rest of `runs` takes at `rate` model FLOP/s a run, `jobs` at once."""
    rest = [remaining_tokens(run) * run.flops_per_token / rate for run in runs]
    ends = [0.0] * max(1, jobs)
    for seconds in rest:  # in order, each as soon as a place is free: what the sweep does
        first = ends.index(min(ends))
        ends[first] += seconds
    return max(ends)
