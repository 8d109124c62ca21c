"""Bad steps: detected before the optimizer runs, reported, then skipped, rolled back, or fatal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from plt_megatron.config.data_stages import stage_of_sample
from plt_megatron.config.schema import RunConfig
from plt_megatron.run_folder.files import write_json
from plt_megatron.train.callbacks.base import Callback, Run, Step, TrainingFailed
from plt_megatron.train.engine import StepResult
from plt_megatron.train.guard import StepGuard, StepKind


class Incidents(Callback):
    """Acts on the verdicts of `guard`."""

    name = "guard"
    _current: Step

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.guard = StepGuard(run.config.training)
        self._settings = _digest_of_settings(run.config)
        self._first_sample = 0

    def state_dict(self) -> dict[str, Any]:
        return self.guard.state() | {"settings": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the guard's state. A run with other settings resets the count of bad steps: someone has addressed
        their cause."""
        self.guard.restore(state)
        if state.get("settings") != self._settings:
            self.guard.forgive()

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Restore only the guard's losses. It still remembers the bad step: too many of them end the run."""
        self.guard.restore_losses(state)

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
            write_json(path, _jsonable(report))
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
            "training.max_skipped_steps, and restart the run, which then counts anew"
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


def _digest_of_settings(config: RunConfig) -> str:
    """Return a digest of the settings that losses and verdicts depend on; not of name, layout, checkpoints, logs."""
    parts = [dataclasses.asdict(part) for part in (config.model, config.data, config.training, config.optimizer)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _jsonable(value: Any) -> Any:
    """Replace non-finite numbers by strings."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
