"""Copy the code that a job runs into its run's folder, and record where it came from."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import plt_megatron
from plt_megatron.installation import is_checkout
from plt_megatron.run_folder.folder import CODE

_PACKAGE = "plt_megatron"
_CHECKOUT = (_PACKAGE, "launch", "tools", "configs", "pyproject.toml")
_RECORDED = (
    *("CUDA", "NCCL", "TORCH", "PYTORCH", "OMP", "MKL"),
    *("PYTHON", "LD_LIBRARY", "PATH", "LOADEDMODULES", "SLURM_CONF"),
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_GIT_SECONDS = 10


def snapshot_code(root: Path, run: Path) -> None:
    """Copy the code to `run`/code; keep earlier versions as code.1, code.2, ..."""
    target = run / CODE
    if target.exists() and target.resolve() == root.resolve():  # submitted from the run's own snapshot
        return
    files = dict(_code_files(root))
    if target.is_symlink():
        target.unlink()
    elif target.is_dir():
        if files == dict(_code_files(target)):
            return
        target.rename(_free_name(target))
    temporary = run / f".{CODE}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    for name, (content, executable) in files.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if executable:
            path.chmod(0o755)
    temporary.rename(target)


def link_code(run: Path, code: Path) -> None:
    """Link `run`/code to another folder's snapshot."""
    target = run / CODE
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
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # do not change the checkout
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


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
        if name.startswith(_RECORDED) and not _SECRET.search(name)
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
