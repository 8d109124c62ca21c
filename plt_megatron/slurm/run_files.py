"""Writes a run's folder before its job is submitted, reads what an earlier submission left, and finds its jobs."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.differences import config_differences
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.launcher.job import JobSettings, save_settings
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import plural
from plt_megatron.slurm import client
from plt_megatron.slurm.snapshot import describe_environment, describe_git, link_code, snapshot_code


def job_name(run: Path, name: str) -> str:
    """A job name unique to the run folder, for `singleton`.

    Args:
        run: absolute path of the run's folder.
        name: the run's.
    """
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:48] or "run"
    return readable + name_suffix(run)


def name_suffix(run: Path) -> str:
    """The suffix of the names of a run folder's jobs, whatever the run's name."""
    return f"-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"


# Earlier submissions.


def resume_problems(config: RunConfig, run: Path, accept_changes: bool) -> list[str]:
    """Why this configuration cannot resume in a folder where another has trained; one line each."""
    folder = RunFolder(run)
    if not folder.has_trained():
        return []
    try:
        saved = folder.config()
    except UserError as error:
        return [f"{run} holds a run whose configuration cannot be read ({error}): give another --name"]
    changed = config_differences(saved, config)
    if not changed or accept_changes:
        return []
    return [
        f"{run} holds a run with another configuration ({plural(len(changed), 'setting')}): give another --name, or "
        "--accept-changes",
        *(f"  {line}" for line in changed.values()),
    ]


# Writing.


def write_run(
    config: RunConfig, run: Path, settings: JobSettings, script: str, *, root: Path, code: Path | None = None
) -> None:
    """Fill a run's folder with everything its job needs, and a record of what it was made from.

    Args:
        run: absolute path of the folder.
        script: the text of its job.sbatch.
        root: the checkout whose code is to run.
        code: an array's snapshot to share; None: make one.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = RunFolder(run)
    with writing(run):
        folder.logs.mkdir(parents=True, exist_ok=True)
        if code is None:
            snapshot_code(root, run)
        else:
            link_code(run, code)
        write_text(folder.git_file, describe_git(root))
        write_text(folder.environment_file, describe_environment())
        save_settings(settings, run)
        write_script(run, script)
    folder.save_config(config)


def write_script(folder: Path, text: str) -> Path:
    """Write `folder`/job.sbatch; its path."""
    path = RunFolder(folder).job_script
    write_text(path, text)
    path.chmod(0o755)
    return path


def record_submission(run: Path, job_ids: Sequence[str]) -> None:
    """Append to submissions.jsonl."""
    json_lines.append(RunFolder(run).submissions_file, {"time": time.time(), "job_ids": list(job_ids)})


def submitted_jobs(run: Path) -> list[str]:
    """Ids of all jobs that were submitted for this run, the oldest first."""
    records = json_lines.read(RunFolder(run).submissions_file, skip_broken=True)
    return [job_id for record in records for job_id in record["job_ids"]]


# Jobs that run or wait: two trainings in one folder would overwrite each other's work.


def active_jobs() -> list[client.Job]:
    """This user's running and pending jobs; none without Slurm. Raises `client.SlurmError` if it does not answer."""
    return [job for job in client.my_jobs() if job.active] if client.is_installed() else []


def jobs_of(folder: Path, jobs: Sequence[client.Job]) -> list[client.Job]:
    """Those of `jobs` that are a run's or an array's. By name, to include those submitted by hand; by id, since members
    of an array share its name."""
    known, suffix = set(submitted_jobs(folder)), name_suffix(Path(os.path.abspath(folder)))
    return [job for job in jobs if job.id in known or job.name.endswith(suffix)]


def job_of(folder: Path, jobs: Callable[[], Sequence[client.Job]]) -> client.Job | None:
    """The first of `jobs` that belongs to a folder. Slurm is not asked about one that was never submitted."""
    return next(iter(jobs_of(folder, jobs())), None) if RunFolder(folder).job_script.is_file() else None


def advice(run: Path, job: client.Job) -> str:
    """Why a run cannot be started, and what to do."""
    return f"{run}: its job {job.id} is {job.state.lower()}: wait for it, or scancel {job.id}"


def check_no_active_job(run: Path) -> None:
    """Raise `UserError` where a run is about to be trained here although it has a job, or Slurm does not answer."""
    job = job_of(run, active_jobs)
    if job is not None:
        raise UserError(advice(run, job))


# Paths.


def log_of(run: Path, job_id: str) -> Path:
    """The output of a run's job, which for a member of an array is in the array's folder, as its code is."""
    folder = RunFolder(run)
    if "_" in job_id:
        folder = RunFolder(folder.code.resolve().parent)
    return folder.logs / f"slurm-{job_id}.out"


def absolute_run_folder(config: RunConfig) -> Path:
    """The run's folder as an absolute path, with links kept: nodes may know no other path."""
    return Path(os.path.normpath(working_directory() / derived.run_folder(config)))


def working_directory() -> Path:
    """The current directory as the user entered it ($PWD), or without links."""
    pwd = os.environ.get("PWD")
    try:
        if pwd and os.path.isabs(pwd) and os.path.samefile(pwd, "."):
            return Path(os.path.normpath(pwd))
    except OSError:  # $PWD is gone
        pass
    return Path.cwd()
