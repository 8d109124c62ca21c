"""Train a configuration on this machine, with as many processes as its layout asks for.

    plt train configs/runs/plt2_tiny.yaml parallel.tensor_model_parallel_size=2
    plt train --branch-from runs/trunk@2000 name=shorter

Exit status: 0 finished, 1 failed, 2 something for you to fix, 75 preempted (run it again to continue), 128 + N if
signal N ended a process.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import signal
import sys

from plt_megatron.commands import CommandParser, command
from plt_megatron.config import derived
from plt_megatron.config.layout import layout_of, num_microbatches
from plt_megatron.config.loader import dump_config
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schedules import BatchSchedule, LengthSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import processes_on, validate
from plt_megatron.errors import RAISE_OPEN_FILES, UserError, go_on_without_readers
from plt_megatron.installation import own_python, python_path
from plt_megatron.predict.flops import run_flops_per_token
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.run_folder import resuming
from plt_megatron.run_folder.checkpoints import checkpoint_folders, trained_tokens
from plt_megatron.run_folder.files import locked
from plt_megatron.run_folder.folder import RunFolder, load_run
from plt_megatron.run_folder.resuming import add_branch_options, branch_config
from plt_megatron.run_folder.text import format_table, plural
from plt_megatron.runtime.local_processes import local_gpus, rank_environment, run_processes, threads_per_process
from plt_megatron.slurm import run_files
from plt_megatron.slurm.run_files import check_no_active_job
from plt_megatron.storage.queue import UploadQueue

_OPEN_FILES = 128  # enough for a training process, as far as observed


def _arguments(parser: CommandParser) -> None:
    parser.epilog = (
        "Starts tensor x pipeline x context x data parallel size processes. Unless set, the last fills this machine's "
        "GPUs; without a GPU it is 1, or what experts need."
    )
    parser.add_config("model.loop_count=1", nargs="?")
    add_branch_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")


def _load(arguments: argparse.Namespace) -> RunConfig:
    if arguments.branch_from is None:
        return load_run(arguments.config, arguments.overrides)
    settings = [*([arguments.config] if arguments.config else []), *arguments.overrides]
    return branch_config(arguments.branch_from, settings, arguments.decay_steps)


@command("train", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> int:
    if arguments.branch_from is None and (arguments.config is None or arguments.decay_steps is not None):
        words = "give a CONFIG.yaml, or --branch-from RUN@STEP; --decay-steps goes with the latter"
        raise argparse.ArgumentError(None, words)
    config = _load(arguments)
    if arguments.print_config:
        print(dump_config(config), end="")
        validate(config, check_files=False)
        return 0
    gpus = len(local_gpus())
    validate(config, have_te=None if gpus else False)  # on a CPU it is not used
    count = processes_on(config, gpus)
    if 0 < gpus < count:
        raise UserError(
            f"{count} processes ({layout_of(config, count).in_words()}) need a GPU each, this machine has {gpus}: set "
            "smaller parallel sizes, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    _check_environment()
    folder, start = RunFolder.of(config), resuming.find_start(config)
    done = start is not None and start.is_own and _has_nothing_to_do(config, start, folder)
    if start is not None and done:  # nothing reads the data, so numpy is not imported
        problems = resuming.start_problems(start, config, config.model.vocab_size)
    else:
        problems = _start_problems(config)
    if problems:
        raise UserError("\n".join(problems))
    command = [*own_python(), "-m", "plt_megatron.train.main", str(folder.config_file)]
    threads = thread_settings(config, count)
    if arguments.dry_run:
        print(describe(config, count, gpus, threads, command))
        return 0
    if count < gpus:
        print(f"using {count} of {gpus} GPUs: {layout_of(config, count).in_words()}", file=sys.stderr)
    if start is not None and done:
        print(_finished(config, start, folder))
        return 0
    check_no_active_job(run_files.absolute_run_folder(config))
    with locked(folder.path, "training") as lock:
        # Until the processes can clean up after themselves: else Ctrl-C would leave a half-started run.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        folder.try_config(config)
        folder.try_again()
        of_a_rank = rank_environment(0, 0, 1, 1, "", 0)  # in shells that have started another job
        env = {name: value for name, value in os.environ.items() if name not in of_a_rank}
        env |= threads | {"PYTHONPATH": python_path()}
        if count > 1:
            go_on_without_readers()  # as the training processes do
            return run_processes(command, count, env=env, pass_fds=[lock.fileno()])
        sys.stdout.flush()
        os.set_inheritable(lock.fileno(), True)  # held until the training ends
        os.execve(command[0], command, env)


def _check_environment() -> None:
    """Raise `UserError` under another launcher, each process of which would start the whole run, and if libraries could
    not open their files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _OPEN_FILES:
        raise UserError(f"the limit of open files is {files}, training needs {_OPEN_FILES}: {RAISE_OPEN_FILES}")
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"WORLD_SIZE={processes} is set, as launchers of several processes do, but plt train starts its own on "
            "this machine: unset WORLD_SIZE, or have the launcher start python -m plt_megatron.train.main CONFIG.yaml"
        )


def _start_problems(config: RunConfig) -> list[str]:
    """Return why the run's data or starting checkpoint cannot be used, one line each."""
    from plt_megatron.slurm.start_checks import data_problems, open_tokenizer, start_problems

    tokenizer, problems = open_tokenizer(config)
    problems += data_problems(config, tokenizer)
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    return problems or start_problems(config, tokenizer, vocab_size)


def _has_nothing_to_do(config: RunConfig, start: resuming.Start, folder: RunFolder) -> bool:
    """Return whether the last step is done and no export or upload is waiting."""
    waiting = checkpoint_folders(folder.exporting) or UploadQueue(folder).waiting()
    return not waiting and resuming.is_finished(config, start.progress)


def _finished(config: RunConfig, start: resuming.Start, folder: RunFolder) -> str:
    step, tokens = start.progress["step"], trained_tokens(start.progress)
    name = "train_iters" if config.training.train_iters is not None else "train_tokens"
    return (
        f"{folder.path} is finished: step {step:,} of {derived.last_step(config, step, tokens):,}\n"
        f"a higher training.{name} trains it longer; name=NEW checkpoint.load={folder.path} "
        "checkpoint.weights_only=true starts another run from its weights"
    )


def thread_settings(config: RunConfig, count: int) -> dict[str, str]:
    """Return the threads of one process: the configured number, else the environment's, else a fair share."""
    threads = config.training.threads_per_process
    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(threads or threads_per_process(count))}


def describe(config: RunConfig, count: int, gpus: int, threads: dict[str, str], command: list[str]) -> str:
    """Describe what the run would do, for --dry-run."""
    on = f"on {count} of {gpus} GPUs" if gpus else "on the CPU"
    rows = [
        ("run folder", str(derived.run_folder(config))),
        ("processes", f"{count} ({layout_of(config, count).in_words()}) {on}"),
        ("steps", f"{derived.train_iters(config):,} of {BatchSchedule(config).step_in_words} tokens"),
        ("tokens", f"{derived.run_tokens(config):,}"),
        *_batches(config),
        *_lengths(config),
        ("microbatches", f"{num_microbatches(config, count)} per step and data-parallel rank"),
    ]
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    if model.vocab_size is not None:
        vocab = derived.padded_vocab_size(model, model.vocab_size, tp)
        flops = run_flops_per_token(config, vocab)
        rows += [
            ("parameters", f"{count_parameters(model, tensor_model_parallel_size=tp).total:,}"),
            ("training FLOPs", f"{flops.total:.4g} per token"),
        ]
    environment = " ".join(f"{key}={value}" for key, value in threads.items())
    rows.append(("command", f"{environment} {shlex.join(command)}".strip()))
    return format_table(rows)


def _batches(config: RunConfig) -> list[tuple[str, str]]:
    """Return the steps of each batch size, if there are several."""
    stretches = BatchSchedule(config).stretches(steps=derived.train_iters(config))
    rows = [f"{plural(steps, 'step')} of {plural(size, 'sequence')}" for size, steps in stretches]
    return _under("batches", rows) if len(rows) > 1 else []


def _lengths(config: RunConfig) -> list[tuple[str, str]]:
    """Return the steps of each row length, if there are several."""
    if not config.data.length_schedule:
        return []
    steps = dict.fromkeys(LengthSchedule(config).lengths, 0.0)
    for kind, share in LoopSchedule(config).step_shares().items():
        steps[kind.sequence_length] += share * derived.train_iters(config)
    rows = [f"{round(number):,} steps with rows of {length:,} tokens" for length, number in steps.items() if number]
    return _under("lengths", rows)


def _under(title: str, rows: list[str]) -> list[tuple[str, str]]:
    return [(title if number == 0 else "", row) for number, row in enumerate(rows)]
