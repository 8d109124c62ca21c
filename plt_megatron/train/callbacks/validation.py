"""Validation loss on the same held-out text at each configured loop count, of the weights and of their average."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from plt_megatron.config import derived
from plt_megatron.run_folder.metrics import bits_per_byte
from plt_megatron.train.callbacks.base import Callback, Step
from plt_megatron.train.engine import StepResult


class Validation(Callback):
    """Validates every `validation.interval` steps and after the last one."""

    def after_step(self, step: Step, result: StepResult) -> None:
        if not self.run.is_due(self.run.config.validation.interval):
            return
        self.run.beat("validating")
        clock = self.run.clock
        with self.run.engine.times.measure("validation"):
            counts = derived.validation_loop_counts(self.run.config)
            measured = {loop_count: self._measure(loop_count) for loop_count in counts}
            for callback in self.run.callbacks:
                for name, weights in callback.other_weights().items():
                    with weights:
                        for loop_count in counts:
                            own = self._measure(loop_count)
                            measured[loop_count] |= {f"{name}_{field}": value for field, value in own.items()}
        for loop_count, values in measured.items():
            record = {"kind": "validation", "step": clock.step, "tokens": clock.tokens, "loop_count": loop_count}
            self.run.report({**record, **values})

    def _measure(self, loop_count: int) -> dict[str, Any]:
        """Measure nats per token and, with `validation.by_source`, nats per token and bits per byte of each source."""
        sources = list(self.run.data.by_source)
        if not sources:
            loss_sum, tokens = self._losses(loop_count)
            return {"loss": loss_sum / tokens if tokens else math.nan}
        sums = {source: self._losses(loop_count, source) for source in sources}
        total, tokens = (sum(part) for part in zip(*sums.values(), strict=True))
        measured: dict[str, Any] = {"loss": total / tokens if tokens else math.nan}
        sources = [source for source in sources if sums[source][1]]  # in which a token counts
        measured["source_loss"] = {source: sums[source][0] / sums[source][1] for source in sources}
        sizes = {source: self.run.data.validation_bytes(source) for source in sources}
        known = {source: size for source, size in sizes.items() if size}
        if known and len(known) == len(sources):
            measured["bits_per_byte"] = bits_per_byte(total, sum(known.values()))
            measured["source_bits_per_byte"] = {s: bits_per_byte(sums[s][0], size) for s, size in known.items()}
        return measured

    def _losses(self, loop_count: int, source: str | None = None) -> tuple[float, int]:
        """Return (sum of token losses, tokens that count)."""
        loss_sum, tokens = 0.0, 0
        with contextlib.closing(self.run.data.validation_batches(source)) as data:
            for _ in range(self.run.config.validation.iters):
                losses, counted = self.run.engine.evaluate(next(data), loop_count)
                loss_sum, tokens = loss_sum + losses, tokens + counted
        return loss_sum, tokens
