"""Speed of a run: throughput, traces of `torch.profiler`, and GPUs that are slower than the others.

MFU is model FLOP/s over the devices' dense peak: the data sheet's on a GPU, the measured rate of a large matrix product
on a CPU, or `logging.peak_tflops`.

A trace is a Chrome trace (open it in Perfetto or chrome://tracing): `profile/rank_0000_steps_5-7.json.gz` in the run's
folder.
"""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import time
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from plt_megatron.config import derived
from plt_megatron.config.schema import ProfileConfig, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.model.transformer_config import DTYPES
from plt_megatron.predict import cards, flops, parameters
from plt_megatron.runtime.cpu_runtime import is_cpu_runtime
from plt_megatron.train.callbacks.base import Callback, Run, Step
from plt_megatron.train.engine import StepResult


class Throughput(Callback):
    """Accumulates steps between two records. Rates are those of the whole job. Construction is collective."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.peak, self.peak_source = _job_peak(run.config)
        tp = run.config.parallel.tensor_model_parallel_size
        padded = derived.padded_vocab_size(run.config.model, run.data.vocab_size, tp)
        # Training FLOPs by loop count and row length.
        self.flops_per_token = cache(lambda *kind: flops.step_flops_per_token(run.config, padded, *kind).total)
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0

    def on_start(self) -> None:
        """Print a line about the model and the peak that its MFU is based on."""
        config = self.run.config
        peak = f"{self.peak:.3g} TFLOP/s ({self.peak_source})" if self.peak else f"unknown ({self.peak_source})"
        counted = parameters.count_parameters(
            config.model, self.run.data.vocab_size, config.parallel.tensor_model_parallel_size
        )
        flops_per_token = self.flops_per_token(config.model.loop_count, config.data.sequence_length)
        active = f"{counted.active:,} active, " if counted.active != counted.total else ""
        self.run.say(
            f"model: {counted.total:,} parameters ({active}{counted.non_embedding:,} without embeddings), "
            f"{flops_per_token:.3g} training FLOPs per token; peak of the job: {peak}"
        )

    def after_step(self, step: Step, result: StepResult) -> None:
        tokens = step.global_batch_size * self.run.config.data.sequence_length
        self._tokens += tokens
        self._flops += tokens * self.flops_per_token(step.loop_count, step.sequence_length)
        self._seconds += step.seconds

    def on_log(self) -> dict[str, Any]:
        """Return rates since the last record (`mfu` is None if the peak is unknown), memory, and time by part of a
        step; what is timed has six digits."""
        seconds = self._seconds or 1.0
        achieved = _six_digits(self._flops / seconds / 1e12)
        rate = _six_digits(self._tokens / seconds)
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0
        return {
            "tokens_per_second": rate,
            "model_tflops": achieved,
            "mfu": _six_digits(achieved / self.peak) if self.peak else None,
            "peak_memory_bytes": peak_memory_bytes(),
            "step_seconds": {part: _six_digits(seconds) for part, seconds in self.run.engine.times.take().items()},
        }


def _six_digits(measured: float) -> float:
    """Return what a clock measured without the digits that say nothing: a third of a packed `metrics.jsonl`."""
    return float(f"{measured:.6g}")


def _job_peak(config: RunConfig) -> tuple[float | None, str]:
    """Return the dense peak TFLOP/s of all devices together, and its source."""
    devices, precision = dist.get_world_size(), config.training.precision
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops * devices, "logging.peak_tflops"
    if is_cpu_runtime():
        total = torch.tensor(measure_matmul_tflops(DTYPES[precision]), dtype=torch.float64)
        dist.all_reduce(total)
        return float(total), "measured matrix product"
    name = torch.cuda.get_device_name()
    peak = cards.lookup(name, precision if config.training.fp8 is None else "fp8")
    if peak is None:
        return None, f"no data sheet for {name}; set logging.peak_tflops"
    return peak * devices, f"data sheet, {name}"


def peak_memory_bytes() -> int:
    """Return the highest peak memory of any rank: its GPU's or, on a CPU, its process's. Collective."""
    if is_cpu_runtime():
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        own = torch.cuda.max_memory_allocated()
    largest = torch.tensor(own, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def measure_matmul_tflops(dtype: torch.dtype, size: int = 1024, repetitions: int = 5) -> float:
    """Measure the rate of a `size` cubed matrix product on this process's CPU threads, in TFLOP/s: the best of a few.

    All ranks measure at the same time, so that shared cores are counted once.
    """
    a, b = (torch.randn(size, size, dtype=torch.float32).to(dtype) for _ in range(2))
    torch.mm(a, b)
    if dist.is_initialized():
        dist.barrier()
    best = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


class Profiling(Callback):
    """Traces the steps (step_start, step_end] of `logging.profile` on the chosen ranks."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        settings, rank = run.config.logging.profile or ProfileConfig(0, ranks=[]), dist.get_rank()
        self._first, self._last = settings.step_start, settings.step_end
        self._wanted = rank in settings.ranks
        self._traced = (0, 0)
        self._profiler: Any = None

    def before_step(self, step: Step) -> None:
        if not self._wanted:
            return
        if self._profiler is not None and step.number > self._last:
            self.on_end()
        elif self._profiler is None and self._first < step.number <= self._last:
            self._traced = (step.number, step.number)
            self._profiler = torch.profiler.profile(profile_memory=True)  # the CPU and, if there is one, the GPU
            self._profiler.start()
        elif self._profiler is not None:
            self._traced = (self._traced[0], max(self._traced[1], step.number))  # a rollback repeats some

    def on_rollback(self, state: dict[str, Any]) -> None:
        """Drop a trace that would repeat all its steps, or go on over earlier ones; another starts there."""
        if self._profiler is not None and self.run.clock.step < self._traced[0]:
            self._profiler.stop()
            self._profiler = None

    def on_end(self) -> None:
        """Write the current trace, complete or not: a run that is stopped within it traces the rest when resumed."""
        if self._profiler is None:
            return
        self._wanted = False
        self._profiler.stop()
        name = f"rank_{dist.get_rank():04d}_steps_{self._traced[0]}-{self._traced[1]}.json.gz"
        path = self.run.folder.profile / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        self.run.say(f"wrote profiler trace {path}")


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
