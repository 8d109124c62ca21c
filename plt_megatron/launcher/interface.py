"""The launcher, as the rest of the code sees it: it keeps a run's processes running, and names the one at fault.

Three functions: `launch_node` and `finalize_job`, which a run's job.sbatch calls through
in_job.py, and `start_watchdog`, on whose result a trainer calls `beat` and `close`. Another launcher can replace this
one by providing these three: docs/launcher.md. Does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Heartbeat(Protocol):
    """The watchdog, as a trainer sees it."""

    def beat(self, phase: str, step: int) -> None:
        """The training loop is alive: called at every phase (starting, loading, training, validating, saving), step and
        microbatch. In the phases named `starting`, `loading` and `saving` a rank may be quiet for longer."""

    def close(self) -> None:
        """The run is over."""


def launch_node(run: Path) -> int:
    """Start one node's processes of the run and watch over them until all nodes are done.

    Called once on each node of the job. Each process is `python -m plt_megatron.train.main RUN/config.yaml` with RANK,
    LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS set. SIGUSR1, SIGTERM and
    SIGINT make all of them save and exit. Writes attempts.jsonl and the logs.

    Returns:
        The exit status, the same on every node: 0 finished, 75 saved and asked to stop, 1 failed, 2 something for
        the user to fix, 76 a node failed the checks, 77 a node was lost, 78 another job trains the run.

    Raises:
        UserError: this is not a Slurm job, or plt submit did not make the run's folder.
    """
    from plt_megatron.launcher.node import launch_node

    return launch_node(run)


def finalize_job(run: Path, status: int) -> int:
    """After all launchers have exited: finish, requeue, let the chain continue, or give up with the reason in why.txt.

    Args:
        status: of the srun that ran the launchers.

    Returns:
        The job's exit status: 0 if the run is finished, 75 if it has saved and can continue, else a failure's.
    """
    from plt_megatron.launcher.finalize import finalize_job

    return finalize_job(run, status)


def start_watchdog(folder: Path, *, patience: float, slow_patience: float) -> Heartbeat:
    """Start this rank's watchdog: it ends the process, with status 1, if any rank of the job hangs or is gone.

    Args:
        folder: the run's; `incidents/` in it gets every rank's stack.
        patience: seconds a rank may be quiet once the first step is done.
        slow_patience: seconds before that, and while it reads or writes checkpoints.
    """
    from plt_megatron.launcher.watchdog import start_watchdog

    return start_watchdog(folder, patience=patience, slow_patience=slow_patience)
