"""Hugging Face exports beside the run while it trains (`checkpoint.exports`), and their evaluation.

Work beside training runs in processes at low priority, without a GPU, and not as part of the job.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from plt_megatron.config.schema import EvaluationConfig
from plt_megatron.errors import first_line
from plt_megatron.installation import python_path
from plt_megatron.run_folder.checkpoints import checkpoint_folders, read_verified_progress, step_of, trained_tokens
from plt_megatron.run_folder.metrics import read_scores
from plt_megatron.storage.queue import clear_leftovers, link_folder
from plt_megatron.train.callbacks.base import Callback, Run

_KILLED = (130, 143)  # exit statuses of a command that a signal has ended
_SENDING_CPU_S = 0.2  # CPU time that a process which waits does not use in minutes
_GRACE_S = 10.0  # for a process to clean up after it was asked to end
# Ends with its run: a killed run cannot end it, and the next job would do the same work beside it. (A preexec_fn would
# have subprocess fork the whole run, whose memory network cards may write to.)
_MAIN = (
    "import sys; from plt_megatron.runtime.local_processes import die_with_parent; die_with_parent(); "
    "from plt_megatron.commands import main; sys.exit(main())"
)
# Variables set by a rank's launcher: with them a library might join the run's job and wait for its other ranks.
_OF_A_RANK = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PMI", "OMPI_", "MV2_")


class BesideProcess:
    """A `plt` command that runs beside training, and ends with it.

    Args:
        command: the command's name and arguments.
        log: file that receives its stderr.
    """

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


class WorkBeside(Callback):
    """Work of the first rank in one `BesideProcess` at a time, which subclasses start."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._process: BesideProcess | None = None

    def after_step(self, *_: Any) -> None:
        """Handle what the process has done."""
        self._advance()

    def is_working(self) -> bool:
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


def own_python() -> list[str]:
    """Return the command of a Python that imports this process's code, a run's snapshot in a job: not what the folder
    that the job runs in has become."""
    return [sys.executable, "-P"]


def environment() -> dict[str, str]:
    """Return this process's environment, for a process that is not a rank."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    return own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}


class Exports(WorkBeside):
    """Exports checkpoints to `<run folder>/exports/step_00000100`, and evaluates the exports (`evaluation.tasks`), one
    after the other.

    For each, the first rank starts a low-priority process without a GPU, which reads the checkpoint one tensor at a
    time. A checkpoint waiting for its turn is also kept in `<run folder>/exporting`, as hard links: the run may remove
    its own, and the next job redoes an export that a kill or a time limit cut short. A failure is reported and does not
    end the run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert run.config.checkpoint.exports is not None
        self._interval = run.config.checkpoint.exports.interval
        self._checkpoint = Path()  # the one that the process works on
        self._evaluates = False  # False while the process exports
        self._rolled_back_to: int | None = None
        self._said = False
        self._cut_short: set[str] = set()  # checkpoints that the next job exports

    def on_start(self) -> None:
        """Continue with what an earlier job left."""
        clear_leftovers(self.run.folder.exporting)
        self._start_next()

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
        """Return whether an export or evaluation is under way. After the last step, say once what the run waits for."""
        working = super().is_working()
        if working and not self._said:
            self._said = True
            self.run.say(f"waiting for {self._what}; {self.run.folder.stop_file} leaves the rest to the next job")
        return working

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Drop waiting checkpoints of later steps, which belong to abandoned training."""
        step = self._rolled_back_to = self.run.clock.step
        if self._process is not None and step_of(self._checkpoint) > step:
            self._cancel()
        for waiting in checkpoint_folders(self.run.folder.exporting):
            if step_of(waiting) > step:
                shutil.rmtree(waiting, ignore_errors=True)
                waiting.with_suffix(".log").unlink(missing_ok=True)
        self._start_next()

    def _queue(self, checkpoint: Path) -> None:
        waiting = self.run.folder.exporting / checkpoint.name
        if self._process is not None and self._checkpoint == waiting:
            self._cancel()  # the step was trained again
        try:
            link_folder(checkpoint, waiting)
        except OSError as error:
            self.run.say(f"warning: {checkpoint} is not exported, since keeping it for the export failed: {error}")

    def _start_next(self) -> None:
        folders = checkpoint_folders(self.run.folder.exporting)
        waiting = [folder for folder in folders if folder.name not in self._cut_short]
        if self._process is not None or not waiting:
            return
        self._checkpoint = waiting[0]
        shutil.rmtree(self._export, ignore_errors=True)  # from before the same step was trained again
        command = ["export", "--checkpoint", str(self._checkpoint), "--output", str(self._export)]
        self._start(command, evaluates=False)

    def _start(self, command: list[str], *, evaluates: bool) -> None:
        self._evaluates = evaluates
        try:
            self._process = BesideProcess(command, self._log)
        except OSError as error:
            self.run.say(f"warning: {self._what} could not be started: {first_line(error)}: the next job does it")
            self._cut_short.add(self._checkpoint.name)
            self._start_next()

    def _advance(self) -> None:
        if self._process is None:
            return
        process, status = self._process, self._process.poll()
        if status is None:
            return
        self._process = None
        what = self._what
        if status < 0 or status in _KILLED:
            self.run.say(f"warning: {what} was killed: the next job does it again")
            self._cut_short.add(self._checkpoint.name)
            self._start_next()
            return
        if status != 0:
            self.run.say(f"warning: {what} failed: {process.last_words()}")
        elif self._evaluates:
            self._report_scores()
        else:
            self.run.say(f"exported {self._export}")
            evaluation = self.run.config.evaluation
            if evaluation is not None:
                self._start(_evaluation_command(self._export, evaluation), evaluates=True)
                return
        if status == 0 or self._evaluates:
            for callback in self.run.callbacks:
                callback.on_export(self._export)
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        self._log.unlink(missing_ok=True)
        self._start_next()

    def _report_scores(self) -> None:
        progress = read_verified_progress(self._checkpoint)  # its export has verified it
        clock = {"step": progress["step"], "tokens": trained_tokens(progress)}
        self.run.report({"kind": "evaluation", **clock, "scores": read_scores(self._export)})

    @property
    def _what(self) -> str:
        return f"the {'evaluation' if self._evaluates else 'export'} of step {step_of(self._checkpoint)}"

    @property
    def _export(self) -> Path:
        return self.run.folder.exports / self._checkpoint.name

    @property
    def _log(self) -> Path:
        return self._checkpoint.with_suffix(".log")


def _evaluation_command(export: Path, settings: EvaluationConfig) -> list[str]:
    command = ["evaluate", "--model", str(export), "--tasks", ",".join(settings.tasks)]
    if settings.include_path is not None:
        command += ["--include-path", settings.include_path]
    return command + ([] if settings.limit is None else ["--limit", str(settings.limit)])
