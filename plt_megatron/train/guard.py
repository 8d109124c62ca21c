"""Detects bad steps: non-finite losses or gradients, and loss spikes.

The guard looks at each step's loss and gradient norm before the optimizer does. Both are the same on all ranks, so all
reach the same verdict without communication.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from plt_megatron.config.schema import TrainingConfig
from plt_megatron.train.engine import finite_step

_PER_STEPS = 1000  # max_skipped_steps is also a rate


class StepGuard:
    """Judges steps and counts those that were not accepted.

    Attributes:
        problem: what was wrong with the last judged step, as text; None if nothing.
        action: what to do about it: `fail`, `skip` or `rollback`.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._training = training
        self._losses: deque[float] = deque(maxlen=training.spike_window)
        self._skipped: deque[int] = deque(maxlen=training.max_skipped_steps + 1)
        self._step = 0
        self._in_a_row = 0
        self.problem: str | None = None
        self.action = "skip"

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the weights may be updated with this step's gradients. One call per step."""
        self._step += 1
        self.problem = self._judge(loss, grad_norm)
        if self.problem is None:
            self._losses.append(loss)
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self._skipped.append(self._step)
        if self._too_many():
            self.action = "fail"
        return False

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        if not finite_step(loss, grad_norm):
            self.action = self._training.on_nonfinite
            return f"not finite: loss {loss}, gradient norm {grad_norm}"
        if self._training.on_spike == "ignore" or len(self._losses) < max(2, self._training.spike_window // 4):
            return None
        mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
        if loss <= mean + self._training.spike_threshold * max(deviation, 1e-6 * abs(mean)):
            return None
        self.action = self._training.on_spike
        return f"loss spike: {loss:.4f}, {mean:.4f} +- {deviation:.4f} over the last {len(self._losses)} steps"

    def _too_many(self) -> bool:
        limit = self._training.max_skipped_steps
        recent = sum(step > self._step - _PER_STEPS for step in self._skipped)
        return self._in_a_row > limit or recent > limit

    def statistics(self) -> dict[str, Any]:
        """The recent accepted losses, for a report."""
        if not self._losses:
            return {"steps": 0}
        return {
            "steps": len(self._losses),
            "mean": statistics.fmean(self._losses),
            "min": min(self._losses),
            "max": max(self._losses),
            "skipped_in_a_row": self._in_a_row,
        }

    def state(self) -> dict[str, Any]:
        """The state for a resumed run."""
        return {
            "losses": list(self._losses),
            "skipped": list(self._skipped),
            "step": self._step,
            "in_a_row": self._in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._losses.extend(state["losses"])
        self._skipped.extend(state["skipped"])
        self._step, self._in_a_row = state["step"], state["in_a_row"]
