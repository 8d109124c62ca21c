"""Run folders: their files, and how to find them."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.loader import WRITTEN, dump_config, load_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder import attempts, checkpoints, json_lines
from plt_megatron.run_folder.archive import ARCHIVE, folders_with_runs, unpack_command
from plt_megatron.run_folder.files import LOCK, write_text, writing
from plt_megatron.run_folder.metrics import METRICS, RunMetrics, read_metrics

CONFIG, JOB_SCRIPT, CODE, LOGS = WRITTEN, "job.sbatch", "code", "logs"
STOP, SAVE = "STOP", "SAVE"
MODEL_YAML = "model.yaml"  # beside an import's checkpoints: its model, for runs to include
_DEPTH = 3  # depth of run folders below the output folder: sweeps are one level deeper than runs


class RunFolder:
    """The files of a run, any of which may be missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / CONFIG  # resolved
        self.former_config_file = self.path / ".former_config.yaml"  # kept until a start that may be refused succeeds
        # Written by training.
        self.metrics_file = self.path / METRICS  # one record of training or validation per line
        self.checkpoints = self.path / checkpoints.FOLDER
        self.exports = self.path / "exports"  # Hugging Face folders, named like checkpoints
        self.exporting = self.path / "exporting"  # checkpoints waiting to be exported
        self.uploading = self.path / "uploading"  # exports and checkpoints waiting to be uploaded
        self.uploads_file = self.path / "uploads.jsonl"  # every attempt to upload one
        self.upload_id_file = self.path / "upload_id"  # tells its uploads from another run's of the same name
        self.loaded = self.path / "loaded"  # a checkpoint that was downloaded to start from
        self.incidents = self.path / "incidents"  # bad steps, and every rank's stack after a hang
        self.tensorboard = self.path / "tensorboard"
        self.wandb_id_file = self.path / "wandb_id"  # id of the run at Weights & Biases
        self.profile = self.path / "profile"  # the profiler's traces
        self.index_cache = self.path / "index_cache"  # sample indices
        # Requests to stop, or to save and continue.
        self.stop_file = self.path / STOP
        self.save_file = self.path / SAVE
        # Written by a submission for its job.
        self.job_file = self.path / "job.yaml"
        self.job_script = self.path / JOB_SCRIPT
        self.code = self.path / CODE
        self.git_file = self.path / "git.txt"
        self.environment_file = self.path / "environment.txt"
        self.submissions_file = self.path / "submissions.jsonl"
        # Written by the job.
        self.logs = self.path / LOGS
        self.attempts_file = self.path / "attempts.jsonl"
        self.why_file = self.path / "why.txt"  # why the job gave up
        # Written by a sweep on this machine.
        self.sweep_note = self.path / "sweep_run.json"
        self.sweep_log = self.path / "train.log"

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """Return the folder of a run of this configuration."""
        return cls(derived.run_folder(config))

    @property
    def resubmit(self) -> str:
        """The shell command that submits the run's job again."""
        return f"sbatch {shlex.quote(str(self.job_script))}"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def save_config(self, config: RunConfig) -> None:
        """Write config.yaml, whatever a start had tried. Raises `UserError` if it cannot be written."""
        save_config(config, self.config_file)
        self.keep_config()

    def try_config(self, config: RunConfig) -> None:
        """Write config.yaml for a start that may be refused. `restore_config` can undo it until `keep_config`."""
        self._undo_try()  # after a start that was killed
        with writing(self.path):
            text = self.config_file.read_text(encoding="utf-8") if self.config_file.is_file() else ""
            if text != dump_config(config):
                write_text(self.former_config_file, text)
        save_config(config, self.config_file)

    def keep_config(self) -> None:
        """Keep the configuration that `try_config` has written: the run has started with it."""
        self.former_config_file.unlink(missing_ok=True)

    def restore_config(self) -> None:
        """Restore what `try_config` has replaced, and give up the lock of a run that is not there then: it has not
        started, and this process ends."""
        if not self._undo_try():
            return
        (self.path / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder has other files
            self.path.rmdir()

    def _undo_try(self) -> bool:
        """Restore the former configuration, if a start has not gone far; return whether there was none before."""
        former = self.former_config_file
        if not former.is_file():
            return False
        if former.stat().st_size:
            former.replace(self.config_file)
            return False
        for path in (self.config_file, former):
            path.unlink(missing_ok=True)
        return True

    def config(self) -> RunConfig:
        """Load the run's configuration, even from an older version. Raises `UserError` if it is missing or broken."""
        return load_config(self.config_file, accept_old_names=True)

    def checkpoint_at(self, step: int) -> Path:
        """Return the run's checkpoint of this step, unchecked. Raises `UserError` if there is none."""
        checkpoint = self.checkpoints / checkpoints.folder_name(step)
        if not checkpoint.is_dir():
            found = checkpoints.checkpoint_folders(self.checkpoints)
            steps = ", ".join(str(checkpoints.step_of(path)) for path in found) or "none"
            raise UserError(
                f"{self.path} has no checkpoint of step {step}; it has {steps} (checkpoint.keep_every keeps them)"
            )
        return checkpoint

    def records(self) -> list[dict[str, Any]]:
        """Read all records of metrics.jsonl as they are. Raises `UserError` on a broken line."""
        return json_lines.read(self.metrics_file)

    def metrics(self) -> RunMetrics:
        """Read the run's metrics; empty if it has not started. Raises `UserError` on a broken file."""
        return read_metrics(self.metrics_file)

    def trained_metrics(self) -> RunMetrics:
        """Read the run's metrics. Raises `UserError` if it has no training step yet."""
        if not self.metrics_file.exists():
            packed = _unpack_hint(self.path) or _unpack_hint(self.path.parent)
            runs = _find_runs(self.path, lambda error: None) if self.path.exists() else []
            inside = next((run for run in runs if run != self.path), None)
            why = f"has no run that has started{packed}" if inside is None else f"has folders of runs, as {inside}"
            raise UserError(f"{self.metrics_file} not found: {self.path} {why}")
        metrics = self.metrics()
        if not metrics.train:
            raise UserError(f"{self.metrics_file} has no training step yet")
        return metrics

    def latest_checkpoint(self, verify: bool = True) -> Path | None:
        """Return the last complete checkpoint; without `verify`, judged by its name alone."""
        return checkpoints.latest_checkpoint(self.path, verify)

    def metrics_size(self) -> int:
        """Return the size of metrics.jsonl in bytes; 0 without one."""
        return self.metrics_file.stat().st_size if self.metrics_file.is_file() else 0

    def has_trained(self) -> bool:
        """Return whether the run has a logged step or a checkpoint."""
        return self.metrics_size() > 0 or bool(checkpoints.checkpoint_folders(self.checkpoints))

    def attempts(self) -> list[dict[str, Any]]:
        """Read its jobs' records of their attempts (`attempts`)."""
        return attempts.read_events(self.attempts_file)

    def put_why_aside(self, attempt: int) -> None:
        """Move the reason why the run was given up to the logs, as of before this attempt. Raises `OSError`."""
        if self.why_file.is_file():
            self.logs.mkdir(exist_ok=True)
            self.why_file.replace(self.logs / f"why-before-attempt-{attempt}.txt")

    def try_again(self) -> None:
        """Note that the run goes on without a job, after those that have ended."""
        events = self.attempts()
        with writing(self.logs):
            self.put_why_aside(attempts.last_attempt(events) + 1)
            if events and events[-1]["event"] in ("end", "stop"):
                json_lines.append(self.attempts_file, {"event": "again"})

    def last_step(self) -> int:
        """Return the last step in metrics.jsonl, reading only the file's end; 0 if there is none."""

        def counts(record: dict[str, Any]) -> bool:  # an evaluation has the step of its checkpoint, long passed
            return isinstance(record.get("step"), int) and record.get("kind") != "evaluation"

        found = json_lines.last(self.metrics_file, 1, counts)
        return found[0]["step"] if found else 0

    def incident_file(self, step: int, sample: int) -> Path:
        """Return the file for the report on a bad step. Its first sample distinguishes retries after a rollback.

        A job that resumes from an earlier checkpoint and reaches the step again writes the same file."""
        return self.incidents / f"step_{step:08d}_sample_{sample:010d}.json"

    def bad_steps(self) -> int:
        """Count the steps that the training loop did not accept."""
        return len(list(self.incidents.glob("step_*.json")))


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write a configuration that `load_config` reads back as equal. Raises `UserError` if it cannot be written."""
    with writing(path):
        write_text(Path(path), dump_config(config))


def load_run(path: str | os.PathLike[str], overrides: Sequence[str]) -> RunConfig:
    """Load a run's configuration, which may lie in its folder. Raises `UserError` if that folder has been moved: it
    would begin anew where it was."""
    config = load_config(path, overrides)
    here, own = Path(path).parent.absolute(), RunFolder.of(config)
    is_named = any(text.startswith(("name=", "output_dir=")) for text in overrides)
    is_run = Path(path).name == CONFIG and checkpoints.checkpoint_folders(here / own.checkpoints.name)
    if is_run and not is_named and here.resolve() != own.path.resolve():
        seen = "" if own.path.is_absolute() else f" (seen from {Path.cwd()})"
        raise UserError(
            f"{here} is not where its configuration says, {own.path}{seen}, where the run would begin anew; to "
            f"continue it, add {shlex.join([f'name={here.name}', f'output_dir={here.parent}'])}"
        )
    return config


def runs_named(names: Sequence[str], output_dir: str, on_unreadable: Callable[[OSError], None]) -> list[Path]:
    """Return the named run folders, or those in the named folders; without names, all below `output_dir`. Calls
    `on_unreadable` with the error of each folder that cannot be read.

    Raises:
        UserError: a name is not a run folder and contains none, or there is no such folder.
    """
    if not names:
        return _find_runs(Path(output_dir), on_unreadable)
    runs: list[Path] = []
    for name in names:
        path = Path(name) if Path(name).is_dir() or os.sep in name else Path(output_dir) / name
        found = _find_runs(path, on_unreadable)
        if not found:
            raise UserError(f"{path} is not a run folder and contains none: there is no {CONFIG}{_unpack_hint(path)}")
        runs += found
    return list(dict.fromkeys(runs))


def _unpack_hint(folder: Path) -> str:
    """Return how to unpack the runs of an archived sweep or study; empty if the folder has no archive."""
    return f" outside of {ARCHIVE}: {unpack_command(folder)}" if (folder / ARCHIVE).is_file() else ""


def _find_runs(folder: Path, on_unreadable: Callable[[OSError], None]) -> list[Path]:
    if folder.is_file():
        raise UserError(f"{folder} is a file: name its run's folder, as {folder.parent}")
    if not folder.is_dir():
        raise UserError(f"{folder} not found: name run folders, or give --output-dir")
    found: dict[Path, Path] = {}  # by the real path, since a link may lead to a run that is here too
    for at, folders, files in folder.walk(on_error=on_unreadable, follow_symlinks=True):
        is_run = CONFIG in files
        if is_run:
            found.setdefault(at.resolve(), at)
        below = [] if is_run or len(at.relative_to(folder).parts) == _DEPTH else folders
        # Real folders first, whose runs are then listed by their own names.
        folders[:] = sorted(folders_with_runs(below, files), key=lambda name: ((at / name).is_symlink(), name))
    return list(found.values())
