"""Jobs that run or wait: two trainings in one folder would overwrite each other's work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from plt_megatron.errors import UserError
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.slurm import client, run_files


def active_jobs() -> list[client.Job]:
    """This user's running and pending jobs; none without Slurm. Raises `client.SlurmError` if it does not answer."""
    return [job for job in client.my_jobs() if job.active] if client.is_installed() else []


def job_of(folder: Path, jobs: Callable[[], Sequence[client.Job]]) -> client.Job | None:
    """The first of `jobs` that belongs to a run's or an array's folder, an absolute path.

    Slurm is not asked about a folder that was never submitted.
    """
    if not RunFolder(folder).job_script.is_file():
        return None
    known = run_files.submitted_jobs(folder)
    mine = (job for job in jobs() if job.id in known or job.name.endswith(run_files.name_suffix(folder)))
    return next(mine, None)


def advice(run: Path, job: client.Job) -> str:
    """Why a run cannot be started, and what to do."""
    return f"{run}: its job {job.id} is {job.state.lower()}: wait for it, or scancel {job.id}"


def check_no_active_job(run: Path) -> None:
    """Raise `UserError` where a run is about to be trained here although it has a job, or Slurm does not answer."""
    job = job_of(run, active_jobs)
    if job is not None:
        raise UserError(advice(run, job))
