"""The training loop: a run from its first step to its last.

Validation, metrics, incidents and the like are in `callbacks`.

A signal, or a file named STOP or SAVE in the run folder, asks it to stop or save. Ranks receive a signal at different
times, so they agree at the step boundary: if any rank was asked, all save at the same step. STOP saves and exits, SAVE
saves and continues; rank 0 looks for the files and removes them.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from plt_megatron.config import derived
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schedules import BatchSchedule, LengthSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder.checkpoints import sequence_length, trained_tokens
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.runtime.local_processes import stop_signals
from plt_megatron.train.build_engine import build_engine
from plt_megatron.train.callbacks.base import Callback, Clock, Step, TrainingFailed
from plt_megatron.train.callbacks.registry import CALLBACKS, is_needed
from plt_megatron.train.checkpoint.collective import any_rank
from plt_megatron.train.checkpoint.state import Kept
from plt_megatron.train.checkpoint.store import CheckpointStore
from plt_megatron.train.data import RunData

_NOTHING, _SAVE, _STOP = 0, 1, 2


class StopRequest:
    """Listens for requests to stop or to save."""

    def __init__(self, folder: RunFolder) -> None:
        self.requested = False  # whether the ranks have agreed to stop
        self.by_file = False  # whether a file asked to stop; on the first rank
        self._folder = folder
        self._signaled = False  # never reset: a signal during a collective counts at the next step boundary
        self._previous = {number: signal.signal(number, self._hear) for number in stop_signals()}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signaled = True

    def agree(self) -> bool:
        """Agree with all ranks at a step boundary; return True if a checkpoint is due now. Collective."""
        asked = _STOP if self._signaled else _NOTHING
        if dist.get_rank() == 0:
            asked = max(asked, self._look_for_files())
        flag = torch.tensor(asked, dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        agreed = int(flag)
        self.requested |= agreed == _STOP  # for good: the run may wait for callbacks after its last step
        return agreed != _NOTHING

    def _look_for_files(self) -> int:
        asked = _NOTHING
        for file, meaning in ((self._folder.save_file, _SAVE), (self._folder.stop_file, _STOP)):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
                asked = max(asked, meaning)
        self.by_file |= asked == _STOP
        return asked

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_TURN_S = 0.5  # between checks of whether callbacks are still working


class Trainer:
    """A run: its model, data and progress; its callbacks see it as a `Run`. Process groups must exist.

    `heartbeat` is called at every sign of life with this rank's phase and step.
    """

    def __init__(self, config: RunConfig, heartbeat: Callable[[str, int], Any] = lambda phase, step: None) -> None:
        self._heartbeat, self._phase = heartbeat, "starting"
        self.config = config
        self.folder = RunFolder.of(config)
        self.clock = Clock()
        self.loops, self.batch_sizes, self.lengths = LoopSchedule(config), BatchSchedule(config), LengthSchedule(config)
        self.stop = StopRequest(self.folder)
        self.beat("indexing")
        self.data = RunData(config)
        self.beat("starting")
        self.engine = build_engine(config, self.data.vocab_size)
        self.engine.on_progress = self.beat
        self.checkpoints = CheckpointStore(
            self.folder.checkpoints, config, self.data.fingerprint, on_publish=self._saved, beat=self.beat
        )
        self.rank = dist.get_rank()
        self.is_first_rank = self.rank == 0
        self.callbacks = [callback(self) for callback in CALLBACKS if is_needed(callback, self)]

    def run(self) -> bool:
        """Train to the end, or until asked to stop; return whether the run is finished."""
        self._resume()
        if self.is_first_rank:
            if not self.folder.config_file.is_file():  # started without plt train
                self.folder.save_config(self.config)
            self.folder.keep_config()
        self._each(Callback.on_start)
        self._batches = self.data.training_batches(self.clock.samples, self.clock.tokens)
        try:
            while not self.is_finished and not self.stop.requested:
                self._train_step()
        finally:
            self._batches.close()
        self.beat("saving")
        self.checkpoints.close()
        finished = self.is_finished and self._wait_for_callbacks()
        if finished:
            self.stop.agree()  # a file written since would stop a run made longer
        self._each(Callback.on_end)
        if self.stop.by_file and not finished:
            goes_on = ": started again, the run continues" if self.config.checkpoint.enabled else ""
            self.say(f"stopped by {self.folder.stop_file}, which is removed{goes_on}")
        return finished

    def _train_step(self) -> None:
        self.beat("training")
        started = time.perf_counter()
        step = self._next_step()
        self._each(Callback.before_step, step)
        result = self.engine.train_step(step.batches, self._accept, step.loop_count)
        torch.cuda.synchronize()  # the update still runs on a GPU; `agree` below would wait for it anyway
        step.seconds = time.perf_counter() - started
        self._move_clock(step)
        if not result.updated:
            self.beat("saving")
            self.checkpoints.close()  # an asynchronous save is of an earlier step: publish it before the run may end
            if any(self._each(Callback.on_rejected, step, result)):
                return
        self._each(Callback.after_step, step, result)
        self.checkpoints.poll()
        asked = self.stop.agree()
        if asked and not self.config.checkpoint.enabled:
            self.say("warning: nothing is saved, since checkpoint.enabled=false")
        if asked or self.is_due(self.config.checkpoint.save_interval):
            self._save()

    def _wait_for_callbacks(self) -> bool:
        """Wait on all ranks until the callbacks of every rank have finished their work, since a rank that ends early
        would be missed. Return False if the run is asked to stop before that."""
        while any_rank(any(self._each(Callback.is_working))):
            self.beat("waiting")
            self.stop.agree()
            if self.stop.requested:
                return False
            time.sleep(_TURN_S)
        return True

    def _next_step(self) -> Step:
        with self.engine.times.measure("data"):
            loop_count = self.loops.loop_count(self.clock.step, self.clock.tokens)
            size = self.batch_sizes.global_batch_size(self.clock.tokens)
            length = self.lengths.sequence_length(self.clock.tokens)
            return Step(self.clock.step + 1, next(self._batches), loop_count, size, length)

    def _accept(self, loss: float, grad_norm: float) -> bool:
        return all(self._each(Callback.accept, loss, grad_norm))

    def _each(self, hook: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call one method of each callback, in order, and return the results."""
        return [getattr(callback, hook.__name__)(*arguments) for callback in self.callbacks]

    def _move_clock(self, step: Step) -> None:
        self.clock.step = step.number
        self.clock.samples += step.global_batch_size
        self.clock.tokens += step.global_batch_size * self.config.data.sequence_length

    @property
    def last_step(self) -> int:
        return derived.last_step(self.config, self.clock.step, self.clock.tokens)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        return self.clock.step >= self.last_step

    def is_due(self, interval: int, step: int | None = None) -> bool:
        step = self.clock.step if step is None else step
        return step == self.last_step or (interval > 0 and step % interval == 0)

    # Checkpoints.

    def _resume(self) -> None:
        progress = self._load()
        if progress is None:
            return
        length = self.config.data.sequence_length
        self.clock.samples = progress["consumed_samples"] * (sequence_length(progress) or length) // length
        for callback in self.callbacks:
            if callback.name in progress:
                callback.load_state_dict(progress[callback.name])

    def roll_back(self) -> None:
        step = self.clock.step
        progress = self._load()
        if progress is None:
            raise TrainingFailed(f"step {step}: there is no checkpoint to roll back to")
        for callback in self.callbacks:
            callback.on_rollback(progress.get(callback.name, {}))
        self._save()  # otherwise a crash before the next save would repeat the bad data
        self.checkpoints.close()
        self._batches.close()  # the next batches may have another size
        self._batches = self.data.training_batches(self.clock.samples, self.clock.tokens)

    def _load(self) -> dict[str, Any] | None:
        """Restore engine and clock, but not the data, from the checkpoint; return its progress, or None without one."""
        self.beat("loading")
        progress = self.checkpoints.load(self.engine, self._kept())
        if progress is not None:
            self.clock.step, self.clock.tokens = progress["step"], trained_tokens(progress)
        return progress

    def _save(self) -> None:
        if not self.config.checkpoint.enabled:
            return
        clock = self.clock
        progress = {"step": clock.step, "consumed_samples": clock.samples, "consumed_tokens": clock.tokens}
        states = {callback.name: callback.state_dict() for callback in self.callbacks if callback.name}
        self.beat("saving")
        with self.engine.times.measure("checkpoint"):
            self.checkpoints.save(self.engine, progress | self.data.document_record | states, self._kept())

    def _kept(self) -> Kept:
        """Return the tensors that callbacks keep of the parameters."""
        kept = {callback.name: callback.parameter_state() for callback in self.callbacks}
        return {name: tensors for name, tensors in kept.items() if tensors}

    def _saved(self, checkpoint: Path) -> None:
        self.say(f"saved {checkpoint}")
        self._each(Callback.on_save, checkpoint)

    def what_is_saved(self) -> str:
        try:
            latest = self.folder.latest_checkpoint(verify=False)
        except UserError as error:  # a file system that is away
            return str(error)
        return f"The last checkpoint is intact: {latest}" if latest else "There is no checkpoint yet"

    # Signs of life.

    def beat(self, phase: str | None = None) -> None:
        """Report a sign of life; without `phase`, in the current phase."""
        self._phase = phase or self._phase
        self._heartbeat(self._phase, self.clock.step)

    def say(self, line: str) -> None:
        self._each(Callback.say, line)

    def report(self, record: dict[str, Any]) -> None:
        self._each(Callback.on_record, record)

    def close(self) -> None:
        """Release the run's resources: trackers, terminal, signals."""
        with contextlib.ExitStack() as last:  # all of them, if one fails too
            last.callback(self.stop.close)
            for callback in reversed(self.callbacks):
                last.callback(callback.close)
