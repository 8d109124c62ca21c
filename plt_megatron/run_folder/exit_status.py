"""What the status that a command ends with means. Job scripts and wrappers of users act on these numbers."""

from __future__ import annotations

from enum import IntEnum

from plt_megatron.errors import EXIT_USER_ERROR


class ExitStatus(IntEnum):
    """Statuses of trainers, launchers and jobs."""

    FINISHED = 0
    FAILED = 1
    USER_ERROR = EXIT_USER_ERROR  # something for the user to put right
    PREEMPTED = 75  # asked to stop, and saved: the same command goes on (sysexits' EX_TEMPFAIL)
    # Of a Slurm job's launchers:
    BAD_NODE = 76  # a node failed the checks
    NODE_LOST = 77
    RUN_BUSY = 78  # another job has the run


# Statuses of a process that do not make the run's other processes stop.
PEACEFUL = (ExitStatus.FINISHED, ExitStatus.PREEMPTED)
