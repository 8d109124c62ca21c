"""Runs commands to their end, and waits for that of processes and for anything else."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]


def run(
    command: Sequence[str | Path], folder: Path = ROOT, *, status: int | None = 0, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run it in `folder`, and assert that it ends with `status`, if one is given."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, **options)
    assert status in (None, done.returncode), (
        f"{command}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-4000:]}"
    )
    return done


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended; a zombie, whose parent has not asked for its status, has."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(*pids: int) -> None:
    """Wait until processes have ended, for a minute at most."""
    wait_for(lambda: not alive(pids), "the end of processes", details=lambda: alive(pids))


def alive(pids: Iterable[int]) -> list[int]:
    """Those of the processes that have not ended."""
    return [pid for pid in pids if not is_gone(pid)]


def wait_for(
    condition: Callable[[], Any],
    what: str = "what comes next",
    seconds: float = 60,
    details: Callable[[], Any] = str,
    interval: float = 0.02,
) -> None:
    """Wait until a condition holds; `interval`: seconds between looks."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}: {details()}"
        time.sleep(interval)
