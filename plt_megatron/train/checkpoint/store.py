"""A training run's checkpoints: where to resume, what to save besides the engine, what to keep."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from plt_megatron.config.rules.uploads import is_url
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.mix import check_data
from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.run_folder import checkpoints
from plt_megatron.run_folder.files import write_text
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.storage.copies import Index, download_part, find_checkpoint, read_manifest
from plt_megatron.storage.places import Place
from plt_megatron.train.checkpoint.collective import any_rank, describe, first_of_all_ranks, on_rank_0, say
from plt_megatron.train.checkpoint.loading import load_checkpoint, load_weights
from plt_megatron.train.checkpoint.saving import PendingSave, begin_save
from plt_megatron.train.checkpoint.state import Kept
from plt_megatron.train.engine import Engine

_SOURCE = "source"  # name of a file with the URL
_TURN_S = 0.2


class CheckpointStore:
    """The checkpoints of one run. All methods are collective.

    With `checkpoint.async_save` a save returns once its data is copied; `poll` at a later step boundary, the next save
    or `close` publishes it. Only one is in flight at a time.

    Args:
        directory: the run's folder of checkpoints.
        data_fingerprint: from `data.mix.fingerprint`; a run resumes only with the data it was saved with.
        on_publish: called with each published checkpoint of this run, on all ranks.
        beat: called while a checkpoint to start from is fetched, and with "saving" before one is published.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        data_fingerprint: dict[str, Any],
        on_publish: Callable[[Path], Any] = lambda checkpoint: None,
        beat: Callable[..., Any] = lambda phase=None: None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.data_fingerprint = json.loads(json.dumps(data_fingerprint))
        self._on_publish, self._beat = on_publish, beat
        self._fetched = RunFolder(directory.parent).loaded
        self._inherited: dict[str, Any] = {}
        self._origin: Path | None = None  # the checkpoint that the run started from
        self._pending: tuple[PendingSave, threading.Thread] | None = None

    def load(self, engine: Engine, kept: Kept | None = None) -> dict[str, Any] | None:
        """Restore the run's last state in the engine or, for a new run, load from `checkpoint.load`. See
        `load_checkpoint`; returns None if training starts at step 0."""
        settings = self.config.checkpoint
        self.close()
        resumes = settings.enabled and on_rank_0(self._look_for_own)
        if not resumes and settings.load is None:
            return None
        source = self.directory if resumes else self._start(settings.load or "")
        if not resumes and settings.weights_only:
            progress = load_weights(engine, source)
            self._inherited = checkpoints.inherited(progress, self.config.data.sequence_length)
            say(f"starting from the weights of {source}, step {progress['step']}")
            return None
        progress = load_checkpoint(engine, source, kept=kept, allow_other_schedule=settings.allow_other_schedule)
        self._origin = _of_step(source, progress["step"])
        check_data(source, progress, self.data_fingerprint, self.config)
        self._inherited = checkpoints.inherited(progress, self.config.data.sequence_length)
        say(f"resuming from {source}, step {progress['step']}")
        if progress.get("data_fingerprint") != self.data_fingerprint:
            say("warning: it was saved with other data or another order: some samples may repeat or be missed")
        return progress

    def _start(self, load: str) -> Path:
        """Return the checkpoint elsewhere that the run started from, or what `load` names: the first time, and where
        the other run has removed it since."""
        if self._origin is not None and self._origin.is_dir():
            return self._origin
        if not is_url(load):
            return Path(load)
        say(f"fetching {load}")
        return fetch_checkpoint(load, self._fetched, self._beat)

    def save(self, engine: Engine, progress: dict[str, Any], kept: Kept | None = None) -> Path:
        """Save the engine's state and the trainer's `progress`, which holds `step`. See `begin_save`."""
        self.close()
        progress = {**self._inherited, **progress, "data_fingerprint": self.data_fingerprint}
        staged = self.config.checkpoint.async_save
        pending = begin_save(engine, self.directory, progress, kept, staged=staged)
        if not staged:
            pending.write()
            return self._publish(pending)
        # Not a daemon: a process that exits normally has written its part.
        thread = threading.Thread(target=pending.write, name="checkpoint writer")
        self._pending = pending, thread
        thread.start()
        return self.directory / checkpoints.folder_name(progress["step"])

    def poll(self) -> Path | None:
        """Publish an asynchronous save if all ranks have written their parts; returns its folder if so."""
        return None if self._pending is None or any_rank(self._pending[1].is_alive()) else self.close()

    def close(self) -> Path | None:
        """Wait for an asynchronous save and publish it; returns its folder if there was one.

        Raises:
            AttemptFailed: on all ranks. It could not be written, or took longer than
                `parallel.distributed_timeout_minutes`; the last checkpoint is intact.
        """
        if self._pending is None:
            return None
        (pending, thread), self._pending = self._pending, None
        self._beat("saving")
        minutes = self.config.parallel.distributed_timeout_minutes
        thread.join(minutes * 60 * 0.9)  # the other ranks wait in a collective, which must not time out first
        if thread.is_alive():
            pending.error = f"writing took longer than {0.9 * minutes:g} minutes (rank {dist.get_rank()})"
        return self._publish(pending)

    def _look_for_own(self) -> bool:
        checkpoints.recover(self.directory)
        for path in checkpoints.leftovers(self.directory):
            say(f"{path}: left incomplete by a run that was stopped; not used", logging.WARNING)
        return bool(checkpoints.candidates(self.directory))

    def _publish(self, pending: PendingSave) -> Path:
        path = pending.publish(self.config.checkpoint.keep_last, self.config.checkpoint.keep_every, self._on_publish)
        if dist.get_rank() == 0:
            shutil.rmtree(self._fetched, ignore_errors=True)  # this run has one of its own now
        return path


# Fetching a remote checkpoint that a run starts from into the run's folder. The ranks divide the files among them.
# Files that an earlier start has fetched are checked: a kill, or a lost node, may have left any of them damaged.


def fetch_checkpoint(url: str, directory: Path, beat: Callable[[], Any]) -> Path:
    """Fetch the checkpoint that `url` refers to into `directory`, which all ranks share; return its folder. Collective.

    `url` is a checkpoint's; or a run's or a folder of checkpoints', for its last complete one. `directory` is for this
    checkpoint alone: files of another one are removed. `beat` is called while files arrive.

    Raises:
        UserError: on all ranks, if there is no complete checkpoint or it could not be read; an AttemptFailed if that
            may pass.
    """
    at, index, folder = on_rank_0(partial(_begin, url, directory))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    _in_turns(lambda: download_part(Place(at), index, folder, rank, ranks), beat)
    on_rank_0(partial(write_text, folder / index.name, index.text))
    return folder


def _begin(url: str, directory: Path) -> tuple[str, Index, Path]:
    """Return the checkpoint's URL, its index, and its local folder."""
    place = find_checkpoint(url)
    folder, source = directory / place.url.rpartition("/")[2], directory / _SOURCE
    if not source.is_file() or source.read_text(encoding="utf-8").strip() != place.url:
        shutil.rmtree(directory, ignore_errors=True)
        write_text(source, place.url + "\n")
    index = read_manifest(place)
    manifest = folder / index.name
    if manifest.is_file() and manifest.read_text(encoding="utf-8") != index.text:
        shutil.rmtree(folder, ignore_errors=True)  # from before the same step was trained again
    folder.mkdir(exist_ok=True)
    return place.url, index, folder


def _in_turns(work: Callable[[], None], beat: Callable[[], Any]) -> None:
    """Do the work in a thread, however long it takes. Collective; raises the lowest rank's problem on all ranks."""
    problems: list[Exception] = []

    def try_it() -> None:
        try:
            work()
        except Exception as error:  # the other ranks must hear of it, whatever it is
            problems.append(error)

    thread = threading.Thread(target=try_it, name="download", daemon=True)
    thread.start()
    while any_rank(thread.is_alive()):
        beat()
        time.sleep(_TURN_S)  # on all ranks alike, whether their own work is done or not
    problem = first_of_all_ranks(describe(problems[0]) if problems else None)
    if problem is not None:
        may_pass = any_rank(any(isinstance(error, OSError | AttemptFailed) for error in problems))
        raise (AttemptFailed if may_pass else UserError)(problem)


def _of_step(path: Path, step: int) -> Path:
    """Return the checkpoint of this step that `path` refers to, to which a rollback returns: another run may have saved
    later ones there since."""
    found = checkpoints.candidates(path)
    return next((each for each in found if each == path or checkpoints.step_of(each) == step), path)
