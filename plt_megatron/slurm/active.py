"""Jobs that run or wait: two trainings in one folder would overwrite each other's work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm import client, run_files


def active_jobs() -> list[client.Job]:
    """This user's running and pending jobs; none without Slurm. Raises `client.SlurmError` if it does not answer."""
    return [job for job in client.my_jobs() if job.active] if client.is_installed() else []


def was_submitted(folder: Path) -> bool:
    """Whether a run's or an array's folder may have jobs."""
    return RunFolder(folder).job_script.is_file()


def job_of(folder: Path, jobs: Sequence[client.Job]) -> client.Job | None:
    """The first of `jobs` that belongs to a run's or an array's folder, an absolute path."""
    known = run_files.submitted_jobs(folder)
    mine = (job for job in jobs if job.id in known or job.name.endswith(run_files.name_suffix(folder)))
    return next(mine, None)


def check_no_active_job(run: Path) -> None:
    """Raise `UserError` where a run is about to be trained here although it has a job, or Slurm does not answer."""
    if was_submitted(run) and (job := job_of(run, active_jobs())) is not None:
        raise UserError(f"{run}: its job {job.id} is {job.state.lower()}: wait for it, or scancel {job.id}")
