"""What is written into a run's folder before its job is submitted, and what an earlier submission left there."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import plt_megatron
from plt_megatron.config import derived
from plt_megatron.config.loader import load_config, save_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.installation import is_checkout
from plt_megatron.launcher.job import CODE_NAME, LOGS_NAME, SCRIPT_NAME, SUBMISSIONS_NAME, JobSettings, save_settings

CONFIG_NAME = "config.yaml"
_PACKAGE = "plt_megatron"
_CHECKOUT = (_PACKAGE, "launch", "tools", "configs", "pyproject.toml")
_RECORDED = (
    "CUDA",
    "NCCL",
    "TORCH",
    "PYTORCH",
    "OMP",
    "MKL",
    "PYTHON",
    "LD_LIBRARY",
    "PATH",
    "LOADEDMODULES",
    "SLURM_CONF",
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_GIT_SECONDS = 10


def job_name(run: Path, name: str) -> str:
    """A name for Slurm that no other run folder has: what `singleton` goes by.

    Args:
        run: absolute path of the run's folder.
        name: the run's.
    """
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:48] or "run"
    return readable + name_suffix(run)


def name_suffix(run: Path) -> str:
    """How the names of a run folder's jobs end, whatever the run is called."""
    return f"-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"


# What is there already.


def has_trained(run: Path) -> bool:
    """Whether a run in this folder got as far as a logged step or a checkpoint."""
    metrics = run / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or any((run / "checkpoints").glob("step_*"))


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that are not the same, one line each."""
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(now))
    return [f"{key} is {new.get(key)!r}, was {old.get(key)!r}" for key in new if new.get(key) != old.get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def resume_problems(config: RunConfig, run: Path, accept_changes: bool) -> list[str]:
    """Why this configuration cannot go on in a folder where another one has trained; one line each."""
    if not has_trained(run):
        return []
    try:
        saved = load_config(run / CONFIG_NAME, accept_old_names=True)
    except UserError as error:
        return [f"{run} holds a run whose configuration cannot be read ({error}): give another --name"]
    changed = differences(saved, config)
    if not changed or accept_changes:
        return []
    count = f"{len(changed)} setting{'s' if len(changed) > 1 else ''}"
    return [
        f"{run} holds a run with another configuration ({count}): give another --name, or --accept-changes to go on so",
        *(f"  {line}" for line in changed),
    ]


# Writing.


def write_run(
    config: RunConfig, run: Path, settings: JobSettings, script: str, *, root: Path, code: Path | None = None
) -> None:
    """Fill a run's folder: all that its job needs, and what it was made from.

    Args:
        run: absolute path of the folder.
        script: the text of its job.sbatch.
        root: the checkout whose code is to run.
        code: an array's snapshot to share; None: make one.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        (run / LOGS_NAME).mkdir(parents=True, exist_ok=True)
        if code is None:
            snapshot_code(root, run)
        else:
            _link_code(run, code)
        (run / "git.txt").write_text(describe_git(root), encoding="utf-8")
        (run / "environment.txt").write_text(describe_environment(), encoding="utf-8")
        save_settings(settings, run)
        write_script(run, script)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or run}: {error.strerror or error}") from error
    save_config(config, run / CONFIG_NAME)


def write_script(folder: Path, text: str) -> Path:
    """Write `folder`/job.sbatch; its path."""
    path = folder / SCRIPT_NAME
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def record_submission(run: Path, job_ids: Sequence[str]) -> None:
    """Append to submissions.jsonl."""
    record = {"time": time.time(), "job_ids": list(job_ids)}
    with (run / SUBMISSIONS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def submitted_jobs(run: Path) -> list[str]:
    """Ids of all jobs that were submitted for this run, the oldest first."""
    path = run / SUBMISSIONS_NAME
    if not path.is_file():
        return []
    ids: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += json.loads(line)["job_ids"]
    return ids


# The code.


def snapshot_code(root: Path, run: Path) -> None:
    """Copy the code to `run`/code. Another version that is there already is kept, as code.1, code.2, ..."""
    target = run / CODE_NAME
    if target.exists() and target.resolve() == root.resolve():  # submitted from a run's own snapshot
        return
    files = dict(_code_files(root))
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        if files == dict(_code_files(target)):
            return
        target.rename(_free_name(target))
    temporary = run / f".{CODE_NAME}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    for name, (content, executable) in files.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if executable:
            path.chmod(0o755)
    temporary.rename(target)


def _link_code(run: Path, code: Path) -> None:
    target = run / CODE_NAME
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        target.rename(_free_name(target))
    target.symlink_to(os.path.relpath(code, run), target_is_directory=True)


def _free_name(target: Path) -> Path:
    number = 1
    while target.with_name(f"{target.name}.{number}").exists():
        number += 1
    return target.with_name(f"{target.name}.{number}")


def _code_files(root: Path) -> Iterator[tuple[str, tuple[bytes, bool]]]:
    """Path below `root` -> content, and whether it is executable."""
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
    """Commit, branch, changed files and their difference; of an installed package its version."""
    if not is_checkout(root):
        return f"plt-megatron {plt_megatron.__version__}, installed in {root}; {CODE_NAME}/ holds the code.\n"
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return f"{root} is no git checkout, or there is no git; {CODE_NAME}/ holds the code.\n"
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD") or ""
    status = _git(root, "status", "--porcelain", "--", *_CHECKOUT) or ""
    changes = _git(root, "diff", "HEAD", "--", *_CHECKOUT) or ""
    state = f"changed files:\n{status}\n{changes}" if status.strip() else "no changes\n"
    return f"commit {commit.strip()}\nbranch {branch.strip()}\n{state}"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # looking changes nothing in the checkout
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def describe_environment() -> str:
    """Machine, interpreter, packages, and those variables that matter. No variable whose name sounds like a secret."""
    packages = {
        f"{distribution.metadata['Name']}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
    }
    variables = sorted(
        f"{name}={value!r}"
        for name, value in os.environ.items()
        if name.startswith(_RECORDED) and not _SECRET.search(name)
    )
    user = os.environ.get("USER") or os.getuid()
    lines = [
        f"submitted {time.strftime('%Y-%m-%dT%H:%M:%S%z')} by {user} on {platform.node()}",
        f"python {platform.python_version()} {sys.executable}",
        f"system {platform.platform()}",
        *("", "variables:", *variables),
        *("", "packages:", *sorted(packages, key=str.lower)),
    ]
    return "\n".join(lines) + "\n"


def absolute_run_folder(config: RunConfig) -> Path:
    """The run's folder as an absolute path, links kept: nodes may know the path by these only."""
    return Path(os.path.normpath(working_directory() / derived.run_folder(config)))


def working_directory() -> Path:
    """The current directory by the path the user came by, as $PWD has it, or without links."""
    pwd = os.environ.get("PWD")
    try:
        if pwd and os.path.isabs(pwd) and os.path.samefile(pwd, "."):
            return Path(os.path.normpath(pwd))
    except OSError:  # $PWD is gone
        pass
    return Path.cwd()
