"""Write a run's folder before its job is submitted, read what earlier submissions left there, and find its jobs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
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
    """Return a job name unique to a run's folder, an absolute path, for `--dependency=singleton`."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:48] or "run"
    return readable + name_suffix(run)


def name_suffix(run: Path) -> str:
    """Return the suffix that all job names of a run folder share, whatever the run's name."""
    return f"-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"


# Earlier submissions.


def resume_problems(config: RunConfig, run: Path, accept_changes: bool) -> list[str]:
    """List why this configuration cannot resume in a folder where another has trained, one line each."""
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
    """Write everything a job needs into its run's folder, with a record of code and environment.

    Args:
        run: absolute path of the folder.
        script: the text of its job.sbatch.
        root: the checkout whose code the job runs.
        code: an array's snapshot to share; None: make a new one.

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


def write_script(folder: Path, text: str) -> None:
    """Write `folder`/job.sbatch."""
    path = RunFolder(folder).job_script
    write_text(path, text)
    path.chmod(0o755)


def record_submission(run: Path, job_id: str) -> None:
    """Append a job's id to the run's submissions.jsonl."""
    json_lines.append(RunFolder(run).submissions_file, {"time": time.time(), "job_ids": [job_id]})


def submitted_jobs(run: Path) -> list[str]:
    """Return the ids of all jobs submitted for this run, oldest first."""
    records = json_lines.read(RunFolder(run).submissions_file, skip_broken=True)
    return [job_id for record in records for job_id in record["job_ids"]]


# Running and pending jobs: two trainings in one folder would overwrite each other's work.


def active_jobs() -> list[client.Job]:
    """Return this user's running and pending jobs, none without Slurm. Raises `client.SlurmError` if Slurm does not
    answer."""
    return [job for job in client.my_jobs() if job.active] if shutil.which("sbatch") else []


def jobs_of(folder: Path, jobs: Sequence[client.Job]) -> list[client.Job]:
    """Select the jobs of a run or an array: by name, to include those submitted by hand, and by id, since members of an
    array share its name."""
    known, suffix = set(submitted_jobs(folder)), name_suffix(Path(os.path.abspath(folder)))
    return [job for job in jobs if job.id in known or job.name.endswith(suffix)]


def job_of(folder: Path, jobs: Callable[[], Sequence[client.Job]]) -> client.Job | None:
    """Return the first of `jobs` that belongs to a folder. A folder without a job script is not looked up in Slurm."""
    return next(iter(jobs_of(folder, jobs())), None) if RunFolder(folder).job_script.is_file() else None


def advice(run: Path, job: client.Job) -> str:
    """Return one line that says why a run cannot be started and what to do."""
    return f"{run}: its job {job.id} is {job.state.lower()}: wait for it, or scancel {job.id}"


def check_no_active_job(run: Path) -> None:
    """Raise `UserError` if a run that is to be trained here has an active job, or if Slurm does not answer."""
    job = job_of(run, active_jobs)
    if job is not None:
        raise UserError(advice(run, job))


# Paths.


def log_of(run: Path, job_id: str) -> Path:
    """Return the output file of a run's job; for a member of an array it is in the array's folder, like the code."""
    folder = RunFolder(run)
    if "_" in job_id:
        folder = RunFolder(folder.code.resolve().parent)
    return folder.logs / f"slurm-{job_id}.out"


def absolute_run_folder(config: RunConfig) -> Path:
    """Return the run's folder as an absolute path with symlinks kept: nodes may not know the resolved path."""
    return Path(os.path.normpath(working_directory() / derived.run_folder(config)))


def working_directory() -> Path:
    """Return the current directory as the user entered it ($PWD), or else with symlinks resolved."""
    pwd = os.environ.get("PWD")
    try:
        if pwd and os.path.isabs(pwd) and os.path.samefile(pwd, "."):
            return Path(os.path.normpath(pwd))
    except OSError:  # $PWD is gone
        pass
    return Path.cwd()
