"""Bad steps (non-finite values, loss spikes): detected before the optimizer runs, then skipped, rolled back, or fatal.

The guard looks at each step's loss and gradient norm before the optimizer does. Both are the same on all ranks, so all
reach the same verdict without communication.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections import deque
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state

from plt_megatron.config.schedules import stage_of_sample
from plt_megatron.config.schema import RunConfig, TrainingConfig
from plt_megatron.run_folder import json_lines
from plt_megatron.run_folder.files import write_json
from plt_megatron.train.callbacks.base import Callback, Run, Step, TrainingFailed
from plt_megatron.train.engine import StepResult, finite_step

_PER_STEPS = 1000  # max_skipped_steps also limits the rejected steps among this many
_REPORTED = 128  # recent losses that a report summarizes if nothing is done about spikes


class StepKind(NamedTuple):
    """The properties that a run's schedules give a step; losses of different kinds of steps are not comparable."""

    first_stage: int = 0  # of `data.stages`, which the step's first sample belongs to
    last_stage: int = 0
    sequence_length: int = 0
    loop_count: int = 0
    global_batch_size: int = 0  # losses of smaller batches scatter more, so they can judge larger batches too

    def can_be_judged_by(self, other: StepKind) -> bool:
        """Return whether losses of the kind `other` can judge those of this kind."""
        return self[:-1] == other[:-1] and self.global_batch_size >= other.global_batch_size


class StepGuard:
    """Judges steps and counts the rejected ones.

    Attributes:
        kind: kind of the step to be judged.
        problem: what was wrong with the last judged step, as text; None if nothing.
        action: what to do about the problem: `fail`, `skip` or `rollback`.
        too_many: whether so many steps were rejected that the run must end.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        window = _REPORTED if training.spikes is None else training.spikes.window
        self._recent: deque[tuple[StepKind, float]] = deque(maxlen=window)  # accepted losses
        self._skipped: deque[int] = deque(maxlen=training.max_skipped_steps + 1)
        self._step = 0
        self._in_a_row = 0
        self.kind = StepKind()
        self.problem: str | None = None
        self.action = "skip"
        self.too_many = False

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Return whether the weights may be updated with this step's gradients. Call this once per step."""
        self._step += 1
        self.problem = self._judge(loss, grad_norm)
        if self.problem is None:
            if loss:  # exactly 0: no token of the step counts
                self._recent.append((self.kind, loss))
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self._skipped.append(self._step)
        recent = sum(step > self._step - _PER_STEPS for step in self._skipped)
        self.too_many = max(self._in_a_row, recent) > self._training.max_skipped_steps
        if self.too_many:
            self.action = "fail"
        return False

    def _losses(self) -> list[float]:
        """Return the recent accepted losses that a step of the current kind is judged by."""
        return [loss for kind, loss in self._recent if self.kind.can_be_judged_by(kind)]

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        if not finite_step(loss, grad_norm):
            self.action = self._training.on_nonfinite
            return f"not finite: loss {loss}, gradient norm {grad_norm}"
        spikes = self._training.spikes
        if spikes is None:
            return None
        losses = self._losses()
        if len(losses) < max(2, spikes.window // 4):
            return None
        mean, deviation = statistics.fmean(losses), statistics.stdev(losses)
        if loss <= mean + spikes.threshold * max(deviation, 1e-6 * abs(mean)):
            return None
        self.action = spikes.action
        return f"loss spike: {loss:.4f}, {mean:.4f} +- {deviation:.4f} over the last {len(losses)} comparable steps"

    def statistics(self) -> dict[str, Any]:
        """Summarize the recent accepted losses that the last step was judged by, for a report."""
        losses = self._losses()
        if not losses:
            return {"steps": 0}
        return {
            "steps": len(losses),
            "mean": statistics.fmean(losses),
            "min": min(losses),
            "max": max(losses),
            "skipped_in_a_row": self._in_a_row,
        }

    def state(self) -> dict[str, Any]:
        """Return the state for a resumed run."""
        return {
            "recent": [[list(kind), loss] for kind, loss in self._recent],
            "skipped": list(self._skipped),
            "step": self._step,
            "in_a_row": self._in_a_row,
        }

    def restore(self, state: dict[str, Any], *, count: bool = True) -> None:
        """Restore what `state` returned in a new guard; without `count`, rejected steps count anew."""
        self.restore_losses(state)
        if count:
            self._skipped.extend(state["skipped"])
            self._in_a_row = state["in_a_row"]

    def restore_losses(self, state: dict[str, Any]) -> None:
        """Restore the losses that `state` returned, and the step, from which rejected ones are counted; keep these."""
        self._step = state.get("step", self._step)
        self._recent.clear()
        # Older checkpoints have losses without their kinds.
        self._recent.extend((StepKind(*kind), loss) for kind, loss in state.get("recent", []))


class Incidents(Callback):
    """Acts on the verdicts of `StepGuard`."""

    name = "guard"
    _current: Step

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.guard = StepGuard(run.config.training)
        # Without `sampling`: a longer run reads the same data.
        data = {name: part for name, part in run.data.fingerprint.items() if name not in ("sha256", "sampling")}
        self._data, self._settings = _digest(data), _digest_of_settings(run.config, data)
        self._first_sample = 0

    def state_dict(self) -> dict[str, Any]:
        return self.guard.state() | {"settings": self._settings, "data": self._data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the guard's state. A run with other settings resets the count of bad steps: someone has addressed
        their cause."""
        self.guard.restore(self._comparable(state), count=state.get("settings") == self._settings)

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Restore only the guard's losses. It still remembers the bad step: too many of them end the run."""
        self.guard.restore_losses(self._comparable(state))

    def _comparable(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state without losses on other data, which cannot judge this run's."""
        return state if state.get("data", self._data) == self._data else state | {"recent": []}

    def before_step(self, step: Step) -> None:
        self._first_sample = self.run.clock.samples
        self._current = step

    def accept(self, loss: float, grad_norm: float) -> bool:
        step, data = self._current, self.run.config.data
        ends = self._first_sample, self._first_sample + step.global_batch_size - 1
        first, last = (stage_of_sample(data, sample) for sample in ends)
        self.guard.kind = StepKind(first, last, step.sequence_length, step.loop_count, step.global_batch_size)
        return self.guard.accept(loss, grad_norm)

    def on_rejected(self, step: Step, result: StepResult) -> bool:
        """Report the step, then skip it, roll back or end the run."""
        action, problem = self.guard.action, self.guard.problem
        report: dict[str, Any] = {"step": step.number, "first_sample": self._first_sample}
        report |= {"problem": problem, "action": action, **dataclasses.asdict(result)}
        report["recent_losses"] = self.guard.statistics()
        report["microbatches"] = self._describe_microbatches(step)
        if self.run.is_first_rank:
            path = self.run.folder.incident_file(step.number, self._first_sample)
            write_json(path, json_lines.finite(report, str))
            self.run.say(f"step {step.number}: {problem}; {action}; see {path}")
        if action == "rollback":
            self.run.roll_back()
        elif action == "fail":
            raise TrainingFailed(f"step {step.number}: {problem}{self._why_it_ends()}. {self.run.what_is_saved()}")
        return action == "rollback"

    def _why_it_ends(self) -> str:
        if not self.guard.too_many:
            return ""
        return (
            f"; more steps than training.max_skipped_steps {self.run.config.training.max_skipped_steps} were "
            f"rejected, see {self.run.folder.incidents}: fix their cause, or change training.spikes or "
            "training.max_skipped_steps, and restart the run: it counts anew with other settings only"
        )

    def _describe_microbatches(self, step: Step) -> list[dict[str, Any]]:
        """Return loss and documents of each of the step's microbatches on all data-parallel ranks. Collective."""
        own, train = [], self.run.data.train
        losses = self.run.engine.microbatch_losses
        for number, ((loss, tokens), batch) in enumerate(zip(losses, step.batches, strict=False)):
            assert batch.sample_ids is not None
            samples = [train.documents(index) for index in batch.sample_ids.tolist()]
            documents = [{"source": source, "documents": documents} for source, documents in samples]
            row = {"rank": dist.get_rank(), "microbatch": number, "loss": loss / max(tokens, 1), "tokens": tokens}
            own.append(row | {"samples": documents})
        if parallel_state.get_tensor_model_parallel_rank() > 0 or parallel_state.get_context_parallel_rank() > 0:
            own = []  # the same rows as the first tensor-parallel and context-parallel rank's
        rows: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(rows, own)
        return [row for part in rows for row in part]


def _digest_of_settings(config: RunConfig, data: dict[str, Any]) -> str:
    """Return a digest of what losses and verdicts depend on, `data` the fingerprint of the training samples; not of
    paths, name, layout, checkpoints, logs."""
    training = dataclasses.replace(config.training, micro_batch_size=1, threads_per_process=None)
    parts: list[Any] = [dataclasses.asdict(part) for part in (config.model, training, config.optimizer)]
    parts += [data, [dataclasses.asdict(stage) for stage in config.data.length_schedule]]
    return _digest(parts)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
