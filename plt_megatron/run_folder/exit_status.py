"""Exit statuses of commands. Job scripts and users' wrappers depend on these numbers."""

from __future__ import annotations

import signal
from enum import IntEnum

from plt_megatron.errors import EXIT_USER_ERROR


class ExitStatus(IntEnum):
    """Statuses of trainers, launchers and jobs."""

    FINISHED = 0
    FAILED = 1
    USER_ERROR = EXIT_USER_ERROR  # something for the user to fix
    PREEMPTED = 75  # asked to stop, and saved: the same command continues (sysexits' EX_TEMPFAIL)
    # Of a Slurm job's launchers:
    BAD_NODE = 76  # a node failed the checks
    NODE_LOST = 77
    RUN_BUSY = 78  # another job has the run


# Statuses of a process that do not make the run's other processes stop.
PEACEFUL = (ExitStatus.FINISHED, ExitStatus.PREEMPTED)


def describe_exit(returncode: int) -> str:
    """How a process ended, in words: `exited with status 1`, `was killed by SIGKILL (out of memory?)`.

    Args:
        returncode: as subprocess has it: below zero for a signal.
    """
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}" + (" (out of memory?)" if -returncode == signal.SIGKILL else "")
