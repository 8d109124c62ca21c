"""Uploads of exports and checkpoints while the run trains (`checkpoint.exports.upload_to`, `checkpoint.uploads`)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.rules.uploads import checkpoints_of, destinations, exports_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import EXIT_USER_ERROR, AttemptFailed, UserError, describe_os_error
from plt_megatron.installation import own_python
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.checkpoints import step_of
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import plural
from plt_megatron.storage.queue import CHECKPOINT, COPYING_S, EXPORT, UploadQueue, Waiting
from plt_megatron.train.callbacks.base import Callback, Run
from plt_megatron.train.callbacks.exports import BesideProcess, environment
from plt_megatron.train.checkpoint.collective import on_rank_0

_LOOK_S = 5.0  # between checks of whether an upload still makes progress
_SHARE = 0.8  # of the longest time that the other ranks wait


class Uploads(Callback):
    """Queues uploads, and runs a process beside the first rank that performs them (plt upload).

    Waiting folders are kept in `<run folder>/uploading` as hard links: the run may remove its own, and the next job
    finishes an upload that a kill or a time limit cut short. A failure is reported, does not end the run, and is
    retried when something is added, and once more after the last step.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._process: BesideProcess | None = None
        self._queue = UploadQueue(run.folder)
        self._looked = 0.0
        self._reported = 0  # number of records of uploads.jsonl
        self._trying_again = False  # after the last step
        self._failed: set[tuple[str, int]] = set()  # since something was added
        self._heard_error = False  # the current process has recorded a failure
        # An upload is stuck if it makes no progress for as long as a rank may be silent while it saves. So is one that
        # waits as long for an upload by hand, which may itself be stuck: the run does not wait for that for ever.
        self._patience_s = 60 * run.config.parallel.distributed_timeout_minutes

    def on_start(self) -> None:
        """Continue with what an earlier job left."""
        self._reported = len(self._records())
        self._queue.clear_leftovers()
        self._start()

    def after_step(self, *_: Any) -> None:
        """Handle what the process has done."""
        self._advance()

    def on_export(self, export: Path) -> None:
        if exports_of(self.run.config) is not None:
            self._add(EXPORT, export)

    def on_save(self, checkpoint: Path) -> None:
        """Queue the checkpoint, in place of earlier ones whose upload has not started."""
        if checkpoints_of(self.run.config) is not None:
            self._add(CHECKPOINT, checkpoint)

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Drop waiting folders of later steps, which belong to abandoned training."""
        self._cancel()
        self._queue.drop_after(self.run.clock.step)
        self._start()

    def is_working(self) -> bool:
        """Return whether an upload is under way. After the last step, retry what failed once more."""
        if not self._trying_again:
            self._trying_again = True
            self._failed.clear()
            self._start()
            if self._process is not None:
                self.run.say(f"waiting for the upload of {self._what_waits()}")
        self._advance()
        return self._process is not None

    def on_end(self) -> None:
        """Report what has failed, unless the run stops while an upload is under way."""
        if self._trying_again and self._process is None and self._queue.waiting():
            self.run.say(
                f"warning: {self._what_waits()} could not be uploaded; retry with plt upload {self.run.folder.path}"
            )

    def close(self) -> None:
        """End an unfinished process; the next job does its work again."""
        self._cancel()

    def _add(self, kind: str, folder: Path) -> None:
        step = step_of(folder)
        if any((entry.kind, entry.step) == (kind, step) for entry in self._queue.waiting()):
            self._cancel()  # the step was trained again: its upload may be under way
        try:
            self._queue.add(kind, folder, COPYING_S)
        except OSError as error:
            self.run.say(f"warning: {folder} is not uploaded, since keeping it for the upload failed: {error}")
            return
        if kind == CHECKPOINT:
            self._queue.drop_older_checkpoints(step, self.run.config.checkpoint.keep_every)
        self._failed.clear()
        self._start()

    def _start(self) -> None:
        if self._process is None and self._untried():
            command = ["upload", str(self.run.folder.path), "--waiting"]
            self._heard_error = False
            try:
                self._process = BesideProcess(command, self._queue.path / "log")
            except OSError as error:
                self._fail_all(f"it could not be started: {describe_os_error(error)}")

    def _advance(self) -> None:
        if self._process is None:
            return
        status = self._process.poll()
        self._report()
        if status is None:
            self._look()
            return
        process, self._process = self._process, None
        # It could not start, or died: a Python exception has the status of an upload that failed, and records nothing.
        if status and not (status == 1 and self._heard_error):
            self._fail_all(process.last_words())
        self._start()  # with what was added while it was ending

    def _report(self) -> None:
        """Pass on what the process has recorded since the last call."""
        for record in self._records()[self._reported :]:
            self._reported += 1
            if "error" in record:
                self._heard_error = True
                self._failed.add((record["what"], record["step"]))
                of = f"the {record['what']} of step {record['step']}"
                self.run.say(f"warning: the upload of {of} failed: {record['error']}")
            else:
                self.run.say(f"uploaded {record['to']}")
            self._note({key: value for key, value in record.items() if key != "time"})

    def _note(self, record: dict[str, Any]) -> None:
        """Report the record to the metrics at the current step; `of_step` is the export's or checkpoint's step."""
        clock = {"step": self.run.clock.step, "tokens": self.run.clock.tokens}
        self.run.report({"kind": "upload", **clock, "of_step": record.pop("step"), **record})

    def _fail_all(self, reason: str) -> None:
        left = self._untried()
        if left:
            self.run.say(f"warning: the upload of {self._what_waits()} failed: {reason}")
        for entry in left:
            self._failed.add((entry.kind, entry.step))
            self._note({"what": entry.kind, "step": entry.step, "error": reason})

    def _look(self) -> None:
        """Stop a process that is stuck."""
        if time.monotonic() - self._looked < _LOOK_S or self._process is None:
            return
        self._looked = time.monotonic()
        quiet = self._process.quiet_seconds()
        if quiet > self._patience_s:
            self._cancel()
            self._fail_all(f"no progress for {quiet:.0f} seconds")

    def _cancel(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None
            self._report()

    def _untried(self) -> list[Waiting]:
        return [entry for entry in self._queue.waiting() if (entry.kind, entry.step) not in self._failed]

    def _records(self) -> list[dict[str, Any]]:
        return json_lines.read(self.run.folder.uploads_file, skip_broken=True)

    def _what_waits(self) -> str:
        counts = {kind: sum(entry.kind == kind for entry in self._queue.waiting()) for kind in (EXPORT, CHECKPOINT)}
        return " and ".join(plural(count, kind) for kind, count in counts.items() if count)


def check_destinations(config: RunConfig) -> None:
    """Raise `UserError` on all ranks if an upload destination cannot be written to. Collective.

    A separate process checks this: remote-storage libraries bring threads and connections that training can do without.
    """
    if destinations(config):
        on_rank_0(lambda: _check(config))


def _check(config: RunConfig) -> None:
    folder = RunFolder.of(config)
    if not folder.config_file.is_file():  # started without plt train; the command below reads it
        folder.save_config(config)
    command = [*own_python(), "-m", "plt_megatron", "upload", str(folder.path), "--check"]
    # A day at most: Python can wait for no more than 24.
    minutes = min(_SHARE * config.parallel.distributed_timeout_minutes, 24 * 60)
    try:
        found = subprocess.run(
            command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60 * minutes
        )
        status, words = found.returncode, found.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        status, words = 1, [f"the upload destination has not answered within {minutes:g} minutes"]
    said = words[-1].removeprefix("error: ") if words else f"plt upload --check: exit status {status}"
    if status == EXIT_USER_ERROR:
        raise UserError(said)
    if status and not derived.has_checkpoints(config):
        raise AttemptFailed(said)
    if status:
        print(f"warning: {said}; uploads are tried again after each checkpoint", file=sys.stderr)  # as during the run
