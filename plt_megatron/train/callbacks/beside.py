"""Work beside training, in processes at low priority, without a GPU, and not as part of the job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from plt_megatron.train.callbacks.base import Callback, Run

_GRACE_S = 10.0  # for a process to clean up after it was asked to end
# Variables set by a rank's launcher: with them a library might join the run's job and wait for its other ranks.
_OF_A_RANK = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PMI", "OMPI_", "MV2_")


class BesideProcess:
    """A `plt` command that runs beside training.

    Args:
        command: the command's name and arguments.
        log: file that receives its stderr.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        self._counters: tuple[int, ...] = ()
        self._moved = time.monotonic()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", sys.executable, "-m", "plt_megatron", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment(),
            )

    def poll(self) -> int | None:
        """Return its exit status, or None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """Return the last line of its log, as the reason for its exit status."""
        words = self._log.read_text(errors="replace").strip().splitlines()
        return words[-1].removeprefix("error: ") if words else f"exit status {self._process.returncode}"

    def quiet_seconds(self) -> float:
        """Return for how long it has neither read nor written anything; 0 if the system does not say."""
        try:
            counters = tuple(psutil.Process(self._process.pid).io_counters())
        except (psutil.Error, AttributeError, OSError):
            return 0.0
        if counters != self._counters:
            self._counters, self._moved = counters, time.monotonic()
        return time.monotonic() - self._moved

    def end(self) -> None:
        """Ask it to end, and kill it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:  # stuck in something that ignores signals
            self._process.kill()
            self._process.wait()


class WorkBeside(Callback):
    """Work of the first rank in one `BesideProcess` at a time, which subclasses start."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._process: BesideProcess | None = None

    def after_step(self, *_: Any) -> None:
        """Handle what the process has done."""
        self._advance()

    def is_working(self) -> bool:
        """Return whether a process runs."""
        self._advance()
        return self._process is not None

    def close(self) -> None:
        """End an unfinished process; the next job does its work again."""
        self._cancel()

    def _advance(self) -> None:
        """Handle what the process has done; if it has ended, start the next."""
        raise NotImplementedError

    def _cancel(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


def environment() -> dict[str, str]:
    """Return this process's environment, for a process that is not a rank."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    return own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
