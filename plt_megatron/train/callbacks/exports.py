"""Hugging Face exports beside the run while it trains (`checkpoint.exports`), and their evaluation.

Work beside training runs in processes at low priority, without a GPU, and not as part of the job.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from plt_megatron.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, describe_os_error
from plt_megatron.installation import own_python, python_path
from plt_megatron.run_folder.checkpoints import (
    MANIFEST,
    PROGRESS,
    checkpoint_folders,
    read_verified_progress,
    step_of,
    trained_tokens,
)
from plt_megatron.run_folder.metrics import read_scores
from plt_megatron.runtime.environment import environment_of_no_rank
from plt_megatron.storage.queue import COPYING_S, clear_leftovers, link_folder, remove
from plt_megatron.train.callbacks.base import Callback, Run

_EXPORT, _EVALUATION = "export", "evaluation"
_LONGEST_WAIT_S = 3600.0  # for evaluations after the last step, while all ranks wait
_SENDING_CPU_S = 0.2  # CPU time that a process which waits does not use in minutes
_GRACE_S = 10.0  # for a process to clean up after it was asked to end
# Ends with its run: a killed run cannot end it, and the next job would do the same work beside it. (A preexec_fn would
# have subprocess fork the whole run, whose memory network cards may write to.)
_MAIN = (
    "import sys; from plt_megatron.runtime.local_processes import die_with_parent; die_with_parent(); "
    "from plt_megatron.commands import main; sys.exit(main())"
)


class BesideProcess:
    """A `plt` command that runs beside training, and ends with it. `log` receives its stderr."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        self._counters: tuple[float, ...] = ()
        self._moved = time.monotonic()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", *own_python(), "-c", _MAIN, *command],
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
        """Return for how long it has neither read nor written anything, nor sent it: what leaves by a socket counts as
        the computing that it takes. 0 if the system does not say."""
        try:
            process = psutil.Process(self._process.pid)
            computed = sum(process.cpu_times()[:2])
            counters = (*process.io_counters(), computed // _SENDING_CPU_S)
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


def environment() -> dict[str, str]:
    """Return the environment of a process beside training."""
    return environment_of_no_rank() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}


@dataclass
class _Job:
    checkpoint: Path  # in `exporting`
    process: BesideProcess


class Exports(Callback):
    """Exports checkpoints to `<run folder>/exports/step_00000100`, and evaluates the exports (`evaluation.tasks`): one
    export and one evaluation at a time.

    For each, the first rank starts a low-priority process without a GPU; an export reads the checkpoint one tensor at a
    time. A checkpoint waiting for its turn is also kept in `<run folder>/exporting`, as hard links: the run may remove
    its own, and the next job redoes an export that a kill or a time limit cut short. Once exported, only its
    progress.json stays there, until the evaluation is done. A failure is reported and does not end the run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert run.config.checkpoint.exports is not None
        self._interval = run.config.checkpoint.exports.interval
        self._jobs: dict[str, _Job] = {}  # under way: an export, an evaluation
        self._rolled_back_to: int | None = None
        self._waits_until: float | None = None  # after the last step
        self._cut_short: set[str] = set()  # checkpoints that are left to the next job

    def on_start(self) -> None:
        """Continue with what an earlier job left."""
        for folder in (self.run.folder.exporting, self.run.folder.exports):
            clear_leftovers(folder)
        for checkpoint in checkpoint_folders(self.run.folder.exporting):
            if _waits_for_export(checkpoint) and self._export(checkpoint).is_dir():  # the job ended before it noticed
                self._have_exported(checkpoint)
        self._start_next()

    def after_step(self, *_: Any) -> None:
        """Handle what the processes have done."""
        self._advance()

    def on_save(self, checkpoint: Path) -> None:
        """Queue the checkpoint if its step is due. A rollback saves its checkpoint again, unchanged: do not queue that
        one twice."""
        step = step_of(checkpoint)
        if not self.run.is_due(self._interval, step):
            return
        run = self.run.folder
        known = any((folder / checkpoint.name).is_dir() for folder in (run.exporting, run.exports))
        if step != self._rolled_back_to or not known:
            self._queue(checkpoint)
            self._start_next()

    def is_working(self) -> bool:
        """Return whether an export or evaluation is under way. After the last step, say once what the run waits for;
        give up evaluations that keep it waiting too long."""
        self._advance()
        if self._jobs and self._waits_until is None:
            self._waits_until = time.monotonic() + _LONGEST_WAIT_S
            what = " and ".join(_words(what, job.checkpoint) for what, job in self._jobs.items())
            self.run.say(f"waiting for {what}; {self.run.folder.stop_file} leaves the rest to the next job")
        if self._waits_until is not None and time.monotonic() > self._waits_until and _EXPORT not in self._jobs:
            self._give_up_evaluations()
        return bool(self._jobs)

    def _give_up_evaluations(self) -> None:
        self._cancel(*self._jobs)
        for checkpoint in checkpoint_folders(self.run.folder.exporting):
            if not _waits_for_export(checkpoint):
                command = shlex.join(["plt", *self._command(_EVALUATION, checkpoint)])
                late = f"{_LONGEST_WAIT_S / 60:.0f} minutes after the last step"
                self.run.say(f"warning: {_words(_EVALUATION, checkpoint)} is left out, {late}; to do it: {command}")
                self._finish(checkpoint)

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Drop waiting checkpoints of later steps, which belong to abandoned training."""
        step = self._rolled_back_to = self.run.clock.step
        self._cancel(*(what for what, job in self._jobs.items() if step_of(job.checkpoint) > step))
        for waiting in checkpoint_folders(self.run.folder.exporting):
            if step_of(waiting) > step:
                self._forget(waiting)
        self._start_next()

    def close(self) -> None:
        """End unfinished processes; the next job does their work again."""
        self._cancel(*self._jobs)

    def _cancel(self, *jobs: str) -> None:
        for what in jobs:
            self._jobs.pop(what).process.end()

    def _queue(self, checkpoint: Path) -> None:
        waiting = self.run.folder.exporting / checkpoint.name
        self._cancel(*(what for what, job in self._jobs.items() if job.checkpoint == waiting))  # trained again
        try:
            remove(self._export(checkpoint))  # from before the step was trained again
            link_folder(checkpoint, waiting, COPYING_S)
        except OSError as error:
            self.run.say(f"warning: {checkpoint} is not exported, since keeping it for the export failed: {error}")

    def _start_next(self) -> None:
        for checkpoint in checkpoint_folders(self.run.folder.exporting):
            what = _EXPORT if _waits_for_export(checkpoint) else _EVALUATION
            if what in self._jobs or checkpoint.name in self._cut_short:
                continue
            if not (checkpoint / PROGRESS).is_file():  # it was being removed when an earlier job was killed
                self._forget(checkpoint)
                continue
            if what == _EVALUATION and self.run.config.evaluation is None:  # asked for by an earlier job
                self._finish(checkpoint)
                continue
            try:
                self._jobs[what] = _Job(checkpoint, BesideProcess(self._command(what, checkpoint), _log(checkpoint)))
            except OSError as error:
                self._leave(what, checkpoint, f"could not be started: {describe_os_error(error)}")

    def _advance(self) -> None:
        ended = [(what, job) for what, job in self._jobs.items() if job.process.poll() is not None]
        for what, job in ended:
            del self._jobs[what]
            self._handle_end(what, job.checkpoint, job.process)
        if ended:
            self._start_next()

    def _handle_end(self, what: str, checkpoint: Path, process: BesideProcess) -> None:
        status = process.poll()
        if status is None or status < 0 or status in (EXIT_INTERRUPTED, EXIT_TERMINATED):
            self._leave(what, checkpoint, "was killed")
            return
        if status != 0:
            self.run.say(f"warning: {_words(what, checkpoint)} failed: {process.last_words()}")
        elif what == _EXPORT:
            self._have_exported(checkpoint)
        else:
            self._report_scores(checkpoint)
        if what == _EVALUATION:
            self._finish(checkpoint)
        elif status != 0:
            self._forget(checkpoint)

    def _have_exported(self, checkpoint: Path) -> None:
        self.run.say(f"exported {self._export(checkpoint)}")
        if self.run.config.evaluation is None:
            self._finish(checkpoint)
        else:
            self._keep_for_evaluation(checkpoint)

    def _keep_for_evaluation(self, checkpoint: Path) -> None:
        """Give back the space of an exported checkpoint's weights, which it may wait long to be evaluated without."""
        try:
            (checkpoint / MANIFEST).unlink()  # first: it now counts as exported
            for path in checkpoint.iterdir():
                if path.name != PROGRESS:
                    path.unlink()
        except OSError as error:
            self._leave(_EVALUATION, checkpoint, f"cannot begin: {describe_os_error(error)}")

    def _leave(self, what: str, checkpoint: Path, why: str) -> None:
        self.run.say(f"warning: {_words(what, checkpoint)} {why}: the next job does it")
        self._cut_short.add(checkpoint.name)

    def _finish(self, checkpoint: Path) -> None:
        """Pass on an export, to which nothing will be added."""
        for callback in self.run.callbacks:
            callback.on_export(self._export(checkpoint))
        self._forget(checkpoint)

    def _forget(self, checkpoint: Path) -> None:
        with contextlib.suppress(OSError):
            (checkpoint / PROGRESS).unlink()  # first: what an interrupted removal leaves is no export then
        shutil.rmtree(checkpoint, ignore_errors=True)
        with contextlib.suppress(OSError):
            _log(checkpoint).unlink()

    def _report_scores(self, checkpoint: Path) -> None:
        try:
            progress = read_verified_progress(checkpoint)  # its export has verified it
            scores = read_scores(self._export(checkpoint))
        except (OSError, ValueError) as error:
            self.run.say(f"warning: the scores of step {step_of(checkpoint)} cannot be read: {error}")
            return
        clock = {"step": progress["step"], "tokens": trained_tokens(progress)}
        self.run.report({"kind": "evaluation", **clock, "scores": scores})

    def _export(self, checkpoint: Path) -> Path:
        return self.run.folder.exports / checkpoint.name

    def _command(self, what: str, checkpoint: Path) -> list[str]:
        export, settings = str(self._export(checkpoint)), self.run.config.evaluation
        if what == _EXPORT:
            return ["export", "--checkpoint", str(checkpoint), "--output", export]
        assert settings is not None, "the caller asks"
        command = ["evaluate", "--model", export, "--tasks", ",".join(settings.tasks)]
        if settings.include_path is not None:
            command += ["--include-path", settings.include_path]
        return command + ([] if settings.limit is None else ["--limit", str(settings.limit)])


def _waits_for_export(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).is_file()


def _words(what: str, checkpoint: Path) -> str:
    return f"the {what} of step {step_of(checkpoint)}"


def _log(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".log")
