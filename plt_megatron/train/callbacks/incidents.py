"""Bad steps: detected before the optimizer runs, reported, then skipped, rolled back, or fatal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from plt_megatron.run_folder.files import write_json
from plt_megatron.train.callbacks.base import Callback, Run, Step, TrainingFailed
from plt_megatron.train.engine import StepResult
from plt_megatron.train.guard import StepGuard


class Incidents(Callback):
    """Acts on what `guard` finds."""

    name = "guard"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.guard = StepGuard(run.config.training)

    def state_dict(self) -> dict[str, Any]:
        """The guard's."""
        return self.guard.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The guard's."""
        self.guard.restore(state)

    def on_rollback(self, state: dict[str, Any]) -> None:
        """The guard remembers the bad step: too many of them end the run."""

    def accept(self, loss: float, grad_norm: float) -> bool:
        """The guard's verdict."""
        return self.guard.accept(loss, grad_norm)

    def on_rejected(self, step: Step, result: StepResult) -> bool:
        """Report the step, then skip it, roll back or end the run."""
        action, problem = self.guard.action, self.guard.problem
        report = {"step": step.number, "problem": problem, "action": action, **dataclasses.asdict(result)}
        report["recent_losses"] = self.guard.statistics()
        report["microbatches"] = self._describe_microbatches(step)
        if self.run.is_first_rank:
            path = self.run.folder.incident_file(step.number)
            write_json(path, _jsonable(report))
            self.run.say(f"step {step.number}: {problem}; {action}; see {path}")
        if action == "rollback":
            self.run.roll_back()
        elif action == "fail":
            raise TrainingFailed(f"step {step.number}: {problem}. {self.run.what_is_saved()}")
        return action == "rollback"

    def _describe_microbatches(self, step: Step) -> list[dict[str, Any]]:
        """Loss and documents of each of the step's microbatches, on all data-parallel ranks. Collective."""
        own, train = [], self.run.data.train
        losses = self.run.engine.microbatch_losses
        for number, ((loss, tokens), batch) in enumerate(zip(losses, step.batches, strict=False)):
            assert batch.sample_ids is not None
            samples = [train.documents(index) for index in batch.sample_ids.tolist()]
            documents = [{"source": source, "documents": documents} for source, documents in samples]
            row = {"rank": dist.get_rank(), "microbatch": number, "loss": loss / max(tokens, 1), "tokens": tokens}
            own.append(row | {"samples": documents})
        if parallel_state.get_tensor_model_parallel_rank() > 0 or parallel_state.get_context_parallel_rank() > 0:
            own = []  # the same rows as its first tensor-parallel and context-parallel rank
        rows: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(rows, own)
        return [row for part in rows for row in part]


def _jsonable(value: Any) -> Any:
    """Numbers that are not finite as strings."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
