"""Detection of GPUs that are slower than the others (`logging.straggler`), with nvidia-resiliency-ext."""

from __future__ import annotations

import contextlib
import math
import statistics
from typing import Any

import torch

from plt_megatron.errors import UserError
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.engine import StepResult

_TIMED = 10  # steps with timed kernels per report


class Stragglers(Callback):
    """Names the ranks with a slow GPU.

    The CUDA kernels of some steps are timed on every rank, except for NCCL's, which wait for the slowest rank. A rank's
    score is the fastest rank's time for the same kernels divided by its own; or, for a GPU that has become slower, its
    own best time so far divided by its current one.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        settings = run.config.logging.straggler
        assert settings is not None
        self._interval, self._threshold = settings.interval, settings.threshold
        self._section = contextlib.ExitStack()
        self._detector = _start_detector(self._interval)

    def before_step(self, step: Step) -> None:
        self._section.enter_context(self._detector.detection_section("step"))

    def on_rejected(self, step: Step, result: StepResult) -> bool:
        self._section.close()
        return False

    def after_step(self, step: Step, result: StepResult) -> None:
        """Stop timing the step, and compare the ranks if due. Collective."""
        self._section.close()
        if step.number % self._interval == 0:
            report = self._detector.generate_report()
            if self.run.is_first_rank:
                self._tell(report)

    def close(self) -> None:
        """Release CUPTI."""
        self._section.close()
        self._detector.shutdown()

    def _tell(self, report: Any) -> None:
        """Record the scores, and warn of low ones."""
        known = [score for score in report.gpu_relative_perf_scores.values() if not math.isnan(score)]
        if not known:
            return
        slow = report.identify_stragglers(gpu_rel_threshold=self._threshold, gpu_indiv_threshold=self._threshold)
        clock, numbers = self.run.clock, {"slowest": min(known), "median": statistics.median(known)}
        ranks: dict[str, float] = {}
        for kind, scores, than in (
            ("straggler_gpus_relative", report.gpu_relative_perf_scores, "the fastest GPU's"),
            ("straggler_gpus_individual", report.gpu_individual_perf_scores, "its own earlier"),
        ):
            for found in sorted(slow[kind], key=lambda each: each.rank):
                name, score = f"rank_{found.rank}", scores[found.rank]
                ranks[name] = min(score, ranks.get(name, score))  # slow by both measures: the worse one
                self.run.say(f"warning: the GPU of rank {found.rank} on {found.node} is at {score:.0%} of {than} speed")
        record = {"kind": "stragglers", "step": clock.step, "tokens": clock.tokens, **numbers}
        self.run.report(record | ({"slow": ranks} if ranks else {}))


def _start_detector(interval: int) -> Any:
    """Start the process's detector and return it. Raises `UserError` without a GPU."""
    if not _has_gpu():
        raise UserError("logging.straggler times the kernels of NVIDIA GPUs, but there is none: remove the setting")
    from nvidia_resiliency_ext.attribution.straggler import Detector

    Detector.initialize(gather_on_rank0=True, profiling_interval=max(1, interval // _TIMED))
    return Detector


def _has_gpu() -> bool:
    return torch.cuda.is_available()
