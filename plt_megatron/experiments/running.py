"""Runs the runs of a sweep or study: on this machine, or submitted to a Slurm cluster as one job array.

Here several run at once if asked, and are stopped cleanly. Each run is `plt train` on its resolved configuration, in a
process group of its own, its output in `train.log` in its folder. A run that fails is noted and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from plt_megatron.config.layout import layout_of
from plt_megatron.errors import UserError
from plt_megatron.experiments.sweep_plan import PlannedRun, SweepPlan, config_path
from plt_megatron.experiments.sweep_status import (
    RunRecord,
    data_fingerprint,
    measured_flops_rate,
    read_record,
    remaining_seconds,
    state_of,
    write_record,
)
from plt_megatron.installation import ROOT, python_path
from plt_megatron.run_folder.attempts import ExitStatus, describe_exit
from plt_megatron.run_folder.folder import save_config
from plt_megatron.run_folder.text import format_duration
from plt_megatron.runtime.local_processes import die_with_parent, local_gpus, signals_handled, usable_cores
from plt_megatron.slurm import submission

LIST = "array.txt"
TRAIN = (sys.executable, "-m", "plt_megatron", "train")
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 60.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class RunOptions:
    """What the command line says of where runs run, and whether they do.

    Attributes:
        submit: submit to Slurm with these options; None: run on this machine.
        jobs: runs at once on this machine.
        gpu: the card that times are estimated for; None: on a cluster its profile's, else h100; here a core of this
            machine's CPU.
    """

    dry_run: bool = False
    submit: submission.Options | None = None
    jobs: int = 1
    gpu: str | None = None


def launch(plan: SweepPlan, todo: Sequence[PlannedRun], options: RunOptions) -> tuple[int, LocalSweep] | None:
    """Run `todo` here: its exit status, and what became of each; None: submitted. Raises `UserError` as both do."""
    if options.submit is not None:
        submit(plan, todo, options.submit)
        return None
    local = LocalSweep(plan, todo, options.jobs)
    return local.run(), local


@dataclass
class _Running:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float
    record: RunRecord
    gpu: str | None


class LocalSweep:
    """The runs of a plan that are not finished, on this machine.

    Args:
        plan: saved.
        runs: those of the plan to run, in this order.
        jobs: runs at once. More than one asks for single-process runs.
    """

    def __init__(self, plan: SweepPlan, runs: Sequence[PlannedRun], jobs: int = 1) -> None:
        large = [run.name for run in runs if layout_of(run.config).world_size > 1]
        if jobs > 1 and large:
            raise UserError(f"--jobs {jobs} is for runs of one process each; {large[0]} asks for more: use --jobs 1")
        self.plan = plan
        self.jobs = jobs
        self.waiting = list(runs)
        self.running: list[_Running] = []
        self.outcome: dict[str, str] = {}
        self._gpus = local_gpus() if jobs > 1 else []
        self._numbers = {run.name: number for number, run in enumerate(runs, start=1)}
        self._signals: list[int] = []
        self._reported = time.monotonic()

    def run(self) -> int:
        """Run them all, or until asked to stop.

        Returns the exit status: 0 all finished, 75 stopped with the running ones saved, 1 some failed. A second SIGINT
        kills what runs.
        """
        with signals_handled(_SIGNALS, self._hear):
            try:
                while self.running or (self.waiting and not self._signals):
                    self._start_some()
                    self._collect()
                    self._report()
                    if self._signals.count(signal.SIGINT) > 1:
                        break
                    time.sleep(_POLL_SECONDS)
            finally:
                self._kill()
        if self._signals:
            return ExitStatus.PREEMPTED
        has_failed = any(status != "finished" for status in self.outcome.values())
        return ExitStatus.FAILED if has_failed else ExitStatus.FINISHED

    def _start_some(self) -> None:
        while self.waiting and len(self.running) < self.jobs and not self._signals:
            run = self.waiting.pop(0)
            record = read_record(run.folder) or RunRecord()
            record.status, record.reason, record.exit_status = "started", "", None
            record.attempts += 1
            record.fingerprint = data_fingerprint(run)
            write_record(run.folder, record)
            log, gpu = run.folder.sweep_log.open("ab"), self._least_used_gpu()
            own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
            process = subprocess.Popen(
                [*TRAIN, str(config_path(self.plan, run))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._threads() | own | {"PYTHONPATH": python_path()},
                process_group=0,
                preexec_fn=die_with_parent,
            )
            self.running.append(_Running(run, process, log, time.monotonic(), record, gpu))
            print(f"{self._place(run)} {run.name}: started, {run.tokens:,} tokens", flush=True)

    def _least_used_gpu(self) -> str | None:
        """Several runs at once have one GPU each, where there are some; a single one has them all."""
        used = [item.gpu for item in self.running]
        return min(self._gpus, key=used.count, default=None)

    def _threads(self) -> dict[str, str]:
        """Each run's share of the cores, unless the user has said how many threads there should be."""
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.jobs))}

    def _collect(self) -> None:
        for item in [item for item in self.running if item.process.poll() is not None]:
            self.running.remove(item)
            self._note_end(item)

    def _note_end(self, item: _Running) -> None:
        item.log.close()
        run, record, status = item.run, item.record, item.process.returncode
        record.exit_status = status
        record.seconds += time.monotonic() - item.started
        record.status = {0: "finished", int(ExitStatus.PREEMPTED): "interrupted"}.get(status, "failed")
        if self._signals and (status < 0 or status > 128):
            record.status = "interrupted"  # asked to stop before it could listen, or killed by a second request
        if record.status == "finished" and state_of(run) != "finished":
            record.status, record.reason = "failed", "ended with status 0 before its last step was validated and saved"
        elif record.status == "failed":
            record.reason = _reason(run.folder.sweep_log, status)
        write_record(run.folder, record)
        self.outcome[run.name] = record.status
        detail = _final_loss(run) if record.status == "finished" else record.reason
        print(
            f"{self._place(run)} {run.name}: {record.status} after {format_duration(record.seconds)}"
            f"{f', {detail}' if detail else ''}",
            flush=True,
        )

    def _place(self, run: PlannedRun) -> str:
        return f"[{self._numbers[run.name]}/{len(self._numbers)}]"

    def _report(self) -> None:
        """Once a minute: how far the running ones are, and how long the rest takes."""
        if time.monotonic() - self._reported < _REPORT_SECONDS or not self.running:
            return
        self._reported = time.monotonic()
        runs = [item.run for item in self.running]
        parts = [_progress(run) for run in runs]
        rate = measured_flops_rate(self.plan.runs)
        left = (
            f"; about {format_duration(remaining_seconds([*runs, *self.waiting], rate, self.jobs))} left"
            if rate
            else ""
        )
        print(f"      {', '.join(parts)}{left}", flush=True)

    # Being stopped.

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if len(self._signals) == 1:
            # os.write: print is not safe in a signal handler.
            os.write(2, b"stopping: waiting for the running runs to save; again: kill them\n")
            for item in self.running:
                item.process.send_signal(signal.SIGTERM)

    def _kill(self) -> None:
        for item in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(item.process.pid, signal.SIGKILL)
            item.process.wait()
            self._note_end(item)
        self.running = []


def _progress(run: PlannedRun) -> str:
    train = run.folder.metrics().train
    if not train:
        return f"{run.name} begins"
    return f"{run.name} {train[-1]['tokens'] / run.tokens:.0%} (loss {train[-1]['loss']:.3f})"


def _final_loss(run: PlannedRun) -> str:
    own = run.folder.metrics().final_validation_losses().get(run.config.model.loop_count)
    return "" if own is None else f"validation loss {own:.4f}"


def _reason(log: Path, status: int) -> str:
    """The run's own last error line, else how it ended."""
    lines = log.read_bytes()[-20000:].decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
    how = describe_exit(status)
    if status == ExitStatus.USER_ERROR and not errors:
        how += " (a setting)"
    return f"{how}: {errors[-1].removeprefix('error: ')}" if errors else f"{how}; see {log}"


# ---------------------------------------------------------------- Slurm


def submit(plan: SweepPlan, runs: Sequence[PlannedRun], options: submission.Options) -> None:
    """Submit `runs`; the list of their configurations stays in the sweep's folder.

    Raises `UserError` if the submission is refused or fails.
    """
    _submit_list([config_path(plan, run) for run in runs], plan.folder, plan.name, options)


def submit_dry(plan: SweepPlan, runs: Sequence[PlannedRun], options: submission.Options) -> None:
    """Check `runs` as a submission does and show the job script; nothing is written or submitted.

    Raises `UserError` if the submission is refused.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-dry-run-") as folder:
        paths = [Path(folder) / f"{run.name}.yaml" for run in runs]
        for run, path in zip(runs, paths, strict=True):
            save_config(run.config, path)
        _submit_list(paths, Path(folder), plan.name, dataclasses.replace(options, dry_run=True))


def _submit_list(configs: Sequence[Path], folder: Path, name: str, options: submission.Options) -> None:
    listing = folder / LIST
    listing.write_text("".join(f"{path.resolve()}\n" for path in configs), encoding="utf-8")
    submission.submit(dataclasses.replace(options, config=None, array=str(listing), name=name), ROOT)
