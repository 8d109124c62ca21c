"""Write a run's folder, with a copy of its code, before its job is submitted; read what earlier jobs left there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import plt_megatron
from plt_megatron.config import derived
from plt_megatron.config.loader import config_differences
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.installation import is_checkout
from plt_megatron.launcher.job import JobSettings, save_settings
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.attempts import unended_jobs
from plt_megatron.run_folder.files import write_text, writing
from plt_megatron.run_folder.folder import CODE, RunFolder
from plt_megatron.run_folder.text import SECRET_NAME, plural
from plt_megatron.runtime.local_processes import output_of
from plt_megatron.slurm import client

_PACKAGE = "plt_megatron"
_CHECKOUT = (_PACKAGE, "launch", "tools", "configs", "pyproject.toml")
_RECORDED = (
    *("CUDA", "NCCL", "TORCH", "PYTORCH", "OMP", "MKL"),
    *("PYTHON", "LD_LIBRARY", "PATH", "LOADEDMODULES", "SLURM_CONF"),
)
_GIT_SECONDS = 10
RUNS = "runs.txt"  # in an array's folder; line i is the run folder of member i


def snapshot_code(root: Path, run: Path) -> None:
    """Copy the code to `run`/code; keep earlier versions as code.1, code.2, ..."""
    target = run / CODE
    if target.exists() and target.resolve() == root.resolve():  # submitted from the run's own snapshot
        return
    files = dict(_code_files(root))
    if target.is_dir() and not target.is_symlink() and files == dict(_code_files(target)):
        return
    temporary = run / f".{CODE}.{secrets.token_hex(4)}"
    try:
        for name, (content, executable) in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if executable:
                _make_executable(path)
        _make_way(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_code(run: Path, code: Path) -> None:
    """Link `run`/code to another folder's snapshot."""
    target = run / CODE
    _make_way(target)
    # From where the link really is: `run` may be a link itself.
    target.symlink_to(os.path.relpath(os.path.realpath(code), os.path.realpath(run)), target_is_directory=True)


def _make_way(target: Path) -> None:
    """Remove a link to code, or keep code under the next free number."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        kept = (target.with_name(f"{target.name}.{number}") for number in itertools.count(1))
        target.rename(next(path for path in kept if not path.exists()))


def _code_files(root: Path) -> Iterator[tuple[str, tuple[bytes, bool]]]:
    """Yield (path below `root`, (content, whether it is executable)) for each file of the code."""
    for part in _CHECKOUT if is_checkout(root) else (_PACKAGE,):
        top = root / part
        paths = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in paths:
            relative = path.relative_to(root)
            hidden = any(name.startswith(".") or name == "__pycache__" for name in relative.parts)
            if path.is_file() and not hidden:
                yield str(relative), (path.read_bytes(), os.access(path, os.X_OK))


# Records.


def describe_git(root: Path) -> str:
    """Describe commit, branch, changed files and their diff; for an installed package its version."""
    if not is_checkout(root):
        return f"plt-megatron {plt_megatron.__version__}, installed in {root}; {CODE}/ holds the code.\n"
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return f"{root} is not a git checkout, or git is missing; {CODE}/ holds the code.\n"
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD") or ""
    status = _git(root, "status", "--porcelain", "--", *_CHECKOUT) or ""
    changes = _git(root, "diff", "HEAD", "--", *_CHECKOUT) or ""
    state = f"changed files:\n{status}\n{changes}" if status.strip() else "no changes\n"
    return f"commit {commit.strip()}\nbranch {branch.strip()}\n{state}"


def _git(root: Path, *arguments: str) -> str | None:
    unlocked = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # do not change the checkout
    return output_of(["git", "-C", str(root), *arguments], _GIT_SECONDS, unlocked)


@functools.cache  # a file to parse per package, and called for each member of an array
def _packages() -> list[str]:
    """List installed packages as NAME==VERSION, sorted."""
    names = {f"{found.metadata['Name']}=={found.version}" for found in importlib.metadata.distributions()}
    return sorted(names, key=str.lower)


def describe_environment() -> str:
    """Describe machine, interpreter, packages and relevant variables, except those whose names suggest a secret."""
    variables = sorted(
        f"{name}={value!r}"
        for name, value in os.environ.items()
        if name.startswith(_RECORDED) and not SECRET_NAME.search(name)
    )
    user = os.environ.get("USER") or os.getuid()
    lines = [
        f"submitted {time.strftime('%Y-%m-%dT%H:%M:%S%z')} by {user} on {platform.node()}",
        f"python {platform.python_version()} {sys.executable}",
        f"system {platform.platform()}",
        *("", "variables:", *variables),
        *("", "packages:", *_packages()),
    ]
    return "\n".join(lines) + "\n"


def job_name(run: Path, name: str) -> str:
    """Return a job name unique to a run's folder, for `--dependency=singleton`."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:48] or "run"
    return readable + name_suffix(run)


def name_suffix(run: Path) -> str:
    """Return the suffix that all job names of a run folder share, whatever the run's name and the links to it."""
    return f"-{hashlib.sha256(os.fsencode(os.path.realpath(run))).hexdigest()[:8]}"


# Earlier submissions.


def resume_problems(config: RunConfig, run: Path, accept_changes: bool) -> list[str]:
    """List why this configuration cannot resume in a folder where another has trained, one line each."""
    folder = RunFolder(run)
    if not folder.has_trained():
        return []
    try:
        saved = dataclasses.replace(folder.config(), name=config.name, output_dir=config.output_dir)  # moved?
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
    """Write everything a job needs into its run's folder (`run`, absolute), with a record of code and environment. The
    code is the checkout `root`'s, or an array's snapshot, `code`. Raises `UserError` if the folder cannot be written.
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
    path = RunFolder(folder).job_script
    write_text(path, text)
    _make_executable(path)


def _make_executable(path: Path) -> None:
    """Let all who may read a file execute it, where the file system lets its modes be changed: sbatch needs none."""
    mode = path.stat().st_mode
    with contextlib.suppress(PermissionError):
        path.chmod(mode | (mode & 0o444) >> 2)


def record_submission(run: Path, job_id: str) -> None:
    """Append a job's id to the run's submissions.jsonl, or warn: the job is queued."""
    path = RunFolder(run).submissions_file
    try:
        json_lines.append(path, {"time": time.time(), "job_ids": [job_id]})
    except OSError as error:
        print(f"warning: job {job_id} is submitted, but {path} cannot be written: {error.strerror or error}")


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
    """Select the jobs of a run or an array: by name, to include those submitted by hand, by id, since members of an
    array share its name, and a member of an array submitted by hand by its number."""
    known, suffix, member = set(submitted_jobs(folder)), name_suffix(folder), _membership(folder)
    return [
        job
        for job in jobs
        if job.id in known
        or job.name.endswith(suffix)
        or (member is not None and job.name.endswith(member[0]) and job.id.endswith(member[1]))
    ]


def _membership(run: Path) -> tuple[str, str] | None:
    """Return how the names, and the ids, of its array's jobs end that are this run's; None unless it is a member."""
    array = RunFolder(run).code.resolve().parent
    for number, member in enumerate(members_of(array), 1):
        if member.name == run.name and member.resolve() == run.resolve():
            return name_suffix(array), f"_{number}"
    return None


def members_of(array: Path) -> list[Path]:
    """Return the runs of an array's folder; none if it is not there, or no array's."""
    listing = array / RUNS
    return [Path(line) for line in listing.read_text(encoding="utf-8").splitlines()] if listing.is_file() else []


def job_of(folder: Path, jobs: Callable[[], Sequence[client.Job]]) -> client.Job | None:
    """Return the first of `jobs` that belongs to a folder. A folder without a job script is not looked up in Slurm."""
    return next(iter(jobs_of(folder, jobs())), None) if RunFolder(folder).job_script.is_file() else None


def advice(run: Path, job: client.Job) -> str:
    """Return one line that says why a run cannot be started and what to do."""
    return f"{run}: its job {job.id} is {job.state.lower()}: wait for it, or scancel {job.id}"


def check_no_active_job(run: Path) -> None:
    """Raise `UserError` if a run that is to be trained here has an active job, another user's too, or if Slurm does not
    answer."""
    job = job_of(run, active_jobs)
    if job is not None:
        raise UserError(advice(run, job))
    other = client.job_at_work(unended_jobs(RunFolder(run).attempts(), but=os.environ.get("SLURM_JOB_ID")))
    if other is not None:
        raise UserError(f"{run}: job {other}, another user's, is training it: wait for it, or have it cancelled")


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
