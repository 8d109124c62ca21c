"""Processes beside training: of low priority, without a GPU, and no part of the job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_GRACE_S = 10.0  # to tidy up, once it is to end
# What a rank's launcher sets: a library might join the run's job, and wait for its other ranks.
_OF_A_RANK = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PMI", "OMPI_", "MV2_")


class BesideProcess:
    """A command of `plt`.

    Args:
        command: its name and its arguments.
        log: gets what it says on stderr.
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
        """Its exit status; None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The last line of its log, as a reason for its exit status."""
        words = self._log.read_text(errors="replace").strip().splitlines()
        return words[-1].removeprefix("error: ") if words else f"exit status {self._process.returncode}"

    def quiet_seconds(self) -> float:
        """For how long it has neither read nor written anything; 0 where the system does not say."""
        try:
            counters = tuple(psutil.Process(self._process.pid).io_counters())
        except (psutil.Error, AttributeError, OSError):
            return 0.0
        if counters != self._counters:
            self._counters, self._moved = counters, time.monotonic()
        return time.monotonic() - self._moved

    def end(self) -> None:
        """Have it end: on request, else by force."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:  # it waits for something that hears no signals
            self._process.kill()
            self._process.wait()


def environment() -> dict[str, str]:
    """This process's, for one that is no rank."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    return own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
