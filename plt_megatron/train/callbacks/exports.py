"""Hugging Face exports beside the run, while it trains (`checkpoint.export_interval`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plt_megatron.run_folder.checkpoints import checkpoint_folders, step_of
from plt_megatron.train.callbacks.base import Callback, Run

_TURN_S = 0.5  # between two looks at an export, once training is over


class Exports(Callback):
    """Exports checkpoints to `<run folder>/exports/step_00000100`, one after the other.

    The first rank starts a process of low priority for it that reads the checkpoint one tensor at a time and has no
    GPU. A checkpoint that waits for its turn lies in `<run folder>/exporting` too, as hard links: the run may remove
    its own, and an export that a kill or a time limit cut short is made by the job that goes on. A failed export is
    reported and does not end the run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._interval = run.config.checkpoint.export_interval
        self._works = run.is_first_rank and self._interval > 0
        self._process: subprocess.Popen[bytes] | None = None
        self._exported: Path | None = None  # the checkpoint that the process reads

    def on_start(self) -> None:
        """Go on with what an earlier job has left."""
        if self._works:
            self._start_next()

    def on_save(self, checkpoint: Path) -> None:
        """Queue the checkpoint if its step is due."""
        if self._works and self.run.is_due(self._interval, step_of(checkpoint)):
            self._queue(checkpoint)
            self._start_next()

    def after_step(self, *_: Any) -> None:
        """Report an export that has ended, and start the next."""
        if self._works:
            self._advance()

    def on_rollback(self, state: dict[str, Any]) -> None:
        """What waits belongs to a course of training that is given up."""
        if self._works:
            self._cancel()
            shutil.rmtree(self.run.folder.exporting, ignore_errors=True)

    def on_end(self) -> None:
        """After the last step, wait for what is left: on all ranks, since a rank that ends early would be missed."""
        if self._interval == 0 or self.run.clock.step < self.run.last_step:
            return
        while self._anything_left():
            self.run.beat("exporting")
            time.sleep(_TURN_S)

    def close(self) -> None:
        """End an export that is not done; the next job makes it."""
        self._cancel()

    def _anything_left(self) -> bool:
        if self._works:
            self._advance()
        left = torch.tensor(float(self._process is not None), device=torch.cuda.current_device())
        dist.all_reduce(left, op=dist.ReduceOp.MAX)
        return bool(left.item())

    # The first rank's queue.

    def _queue(self, checkpoint: Path) -> None:
        waiting = self.run.folder.exporting / checkpoint.name
        if self._exported == waiting:
            self._cancel()  # the step was trained again
        partial = waiting.with_suffix(".tmp")
        for path in (partial, waiting):
            shutil.rmtree(path, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, partial, copy_function=os.link)
            partial.rename(waiting)
        except (OSError, shutil.Error) as error:
            self.run.say(f"warning: {checkpoint} is not exported, since it cannot be kept for that: {error}")

    def _start_next(self) -> None:
        waiting = checkpoint_folders(self.run.folder.exporting)
        if self._process is not None or not waiting:
            return
        self._exported = waiting[0]
        target = self._target(self._exported)
        shutil.rmtree(target, ignore_errors=True)  # of the same step, before it was trained again
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self._log(self._exported).open("wb") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", sys.executable, "-m", *_command(self._exported, target)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )

    def _advance(self) -> None:
        if self._process is None or self._process.poll() is None:
            return
        assert self._exported is not None
        checkpoint, log = self._exported, self._log(self._exported)
        if self._process.returncode == 0:
            self.run.say(f"exported {self._target(checkpoint)}")
        else:
            words = log.read_text(errors="replace").strip().splitlines()
            reason = words[-1].removeprefix("error: ") if words else f"exit status {self._process.returncode}"
            self.run.say(f"warning: the export of step {step_of(checkpoint)} failed: {reason}")
        self._process = self._exported = None
        shutil.rmtree(checkpoint, ignore_errors=True)
        log.unlink(missing_ok=True)
        self._start_next()

    def _cancel(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = self._exported = None

    def _target(self, checkpoint: Path) -> Path:
        return self.run.folder.exports / checkpoint.name

    def _log(self, checkpoint: Path) -> Path:
        return checkpoint.with_suffix(".log")


def _command(checkpoint: Path, target: Path) -> list[str]:
    return ["plt_megatron.commands.export_hf", "--checkpoint", str(checkpoint), "--output", str(target)]
