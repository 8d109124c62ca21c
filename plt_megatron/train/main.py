"""The training process: `python -m plt_megatron.train.main CONFIG.yaml [key=value ...]`, one per rank.

Launchers (plt train on one machine) start it with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
Exit status: 0 finished, 2 something for the user to fix, 75 stopped on request, 1 failed, 130 interrupted before the
first step.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import validate
from plt_megatron.errors import (
    EXIT_INTERRUPTED,
    AttemptFailed,
    BadTokens,
    UserError,
    first_line,
    go_on_without_readers,
    hear_every_interrupt,
    print_error,
    quiet_streams,
)
from plt_megatron.run_folder.attempts import ExitStatus
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.runtime.environment import quiet_imports, set_cuda_environment
from plt_megatron.runtime.local_processes import local_gpus, query_gpus


def main(arguments: list[str]) -> int:
    """Train one rank's part of the run and return the exit status."""
    hear_every_interrupt()
    go_on_without_readers()  # metrics.jsonl has everything that is printed
    if not arguments:
        print("usage: python -m plt_megatron.train.main CONFIG.yaml [key=value ...]", file=sys.stderr)
        return ExitStatus.USER_ERROR
    first = os.environ.get("RANK", "0") == "0"  # the other ranks would print the same
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # a file may be missing on one node alone
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by plt train
        config = load_config(arguments[0], arguments[1:])
        on_gpus = config.parallel.context_parallel_size == 1 or bool(local_gpus())  # asked for where it matters: slow
        have_te = None if on_gpus else False  # on a CPU it is not used
        validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1")), have_te=have_te)
        return train(config)
    except UserError as error:
        if first_here or isinstance(error, BadTokens):
            print_error(error)
        if isinstance(error, AttemptFailed):  # before the first step: the next attempt may fare better
            return ExitStatus.FAILED
        if first:
            RunFolder(Path(arguments[0]).parent).restore_config()
        return ExitStatus.USER_ERROR
    except KeyboardInterrupt:  # before the training loop handles signals
        if first:
            print("interrupted before the first step: run the same command to start again", file=sys.stderr)
            RunFolder(Path(arguments[0]).parent).restore_config()
        return EXIT_INTERRUPTED


def train(config: RunConfig) -> int:
    """Set up this process, train, and leave the job."""
    set_cuda_environment(config)
    import torch

    _check_gpus()
    quiet_imports()
    quiet_streams()
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime, keep_freed_memory

    if enter_cpu_runtime():
        keep_freed_memory()
        if config.training.threads_per_process is not None:
            torch.set_num_threads(config.training.threads_per_process)
    torch.set_float32_matmul_precision("highest")  # images of NGC set an environment that allows TF32
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)

    from plt_megatron.data.datasets import INDEX_TIMEOUT_MINUTES
    from plt_megatron.launcher.watchdog import start_watchdog
    from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups
    from plt_megatron.train.callbacks.base import TrainingFailed
    from plt_megatron.train.callbacks.uploads import check_destinations
    from plt_megatron.train.trainer import Trainer

    faulthandler.enable()  # a data file truncated under its memory map raises SIGBUS
    init_process_groups(config.parallel)
    check_destinations(config)
    watchdog = start_watchdog(
        derived.run_folder(config),
        patience=config.parallel.distributed_timeout_seconds_after_init,
        slow_patience=60 * config.parallel.distributed_timeout_minutes,
        index_patience=60 * (INDEX_TIMEOUT_MINUTES + 1),  # the ranks' own time-out comes first, and names the index
    )
    trainer = Trainer(config, watchdog.beat)
    try:
        finished = trainer.run()
    except (TrainingFailed, AttemptFailed) as error:
        if trainer.is_first_rank:
            print_error(error)
        return ExitStatus.FAILED
    except (OSError, RuntimeError) as error:
        problem = _describe_failure(error)
        if problem is None:
            raise
        print_error(f"rank {trainer.rank}: {problem}. {trainer.what_is_saved()}")
        return ExitStatus.FAILED
    finally:
        trainer.close()
        watchdog.close()
    torch.distributed.barrier()  # rank 0 hosts the store that the others' watchdogs use
    destroy_process_groups()
    return ExitStatus.FINISHED if finished else ExitStatus.PREEMPTED


def _check_gpus() -> None:
    """Raise `UserError` if there are GPUs that a CUDA build of torch cannot use: the run would go on on the CPU."""
    import torch

    if torch.version.cuda and not torch.cuda.is_available() and query_gpus("index") and local_gpus():
        raise UserError(
            f"torch, built for CUDA {torch.version.cuda}, can use none of the GPUs that nvidia-smi lists: plt doctor "
            "says why, unless CUDA_VISIBLE_DEVICES names others; with CUDA_VISIBLE_DEVICES= the run trains on the CPU"
        )


def _describe_failure(error: OSError | RuntimeError) -> str | None:
    """Describe what went wrong on this rank, or return None if that needs a traceback."""
    if isinstance(error, OSError):
        return str(error)
    text = str(error)
    if any(mark in text for mark in ("onnection closed by peer", "onnection reset by peer", "Broken pipe")):
        return f"lost the connection to another rank, which has ended ({first_line(error)[:200]})"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
