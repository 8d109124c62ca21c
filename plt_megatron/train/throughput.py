"""Tokens per second, model FLOP/s and MFU, all from one loop-aware formula (`estimate/flops.py`).

MFU is model FLOP/s over the devices' dense peak: the data sheet's on a GPU, the measured rate of a large matrix product
on a CPU, or `logging.peak_tflops`.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
import torch.distributed as dist

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.estimate import flops, parameters, peaks
from plt_megatron.model.transformer_config import DTYPES
from plt_megatron.runtime.cpu_runtime import is_cpu_runtime


class Throughput:
    """Adds up steps between two log lines. Rates are of the whole job. Building it is collective."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        tp = config.parallel.tensor_model_parallel_size
        padded = derived.padded_vocab_size(config.model, vocab_size, tp)
        self.flops_per_token = flops.training_flops_per_token(config.model, config.data.sequence_length, padded).total
        self.parameters = parameters.count_parameters(
            config.model, vocab_size=vocab_size, tensor_model_parallel_size=tp
        )
        self.peak, self.peak_source = _job_peak(config)
        self._tokens = 0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One optimizer step: the job's tokens and its duration."""
        self._tokens += tokens
        self._seconds += seconds

    def take(self) -> dict[str, float | None]:
        """Rates since the last call; `mfu` is None where the peak is unknown."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self._tokens, self._seconds = 0, 0.0
        achieved = rate * self.flops_per_token / 1e12
        return {
            "tokens_per_second": rate,
            "model_tflops": achieved,
            "mfu": achieved / self.peak if self.peak else None,
        }

    def describe(self) -> str:
        """One line for the log."""
        peak = f"{self.peak:.3g} TFLOP/s ({self.peak_source})" if self.peak else f"unknown ({self.peak_source})"
        counted = self.parameters
        active = f"{counted.active:,} active, " if counted.active != counted.total else ""
        return (
            f"model: {counted.total:,} parameters ({active}{counted.non_embedding:,} without embeddings), "
            f"{self.flops_per_token:.3g} training FLOPs per token; peak of the job: {peak}"
        )


def _job_peak(config: RunConfig) -> tuple[float | None, str]:
    """Dense peak TFLOP/s of all devices together, and where the figure comes from."""
    devices, precision = dist.get_world_size(), config.training.precision
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops * devices, "logging.peak_tflops"
    if is_cpu_runtime():
        total = torch.tensor(measure_matmul_tflops(DTYPES[precision]), dtype=torch.float64)
        dist.all_reduce(total)
        return float(total), "measured matrix product"
    name = torch.cuda.get_device_name()
    peak = peaks.lookup(name, precision if config.training.fp8 == "none" else "fp8")
    if peak is None:
        return None, f"no data sheet for {name}; set logging.peak_tflops"
    return peak * devices, f"data sheet, {name}"


def peak_memory_bytes() -> int:
    """The most that any rank has held at once: on its GPU, or on a CPU as a whole process. Collective."""
    if is_cpu_runtime():
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        own = torch.cuda.max_memory_allocated()
    largest = torch.tensor(own, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def measure_matmul_tflops(dtype: torch.dtype, size: int = 1024, repetitions: int = 5) -> float:
    """Rate of a `size` cubed matrix product on this process's CPU threads, in TFLOP/s: the best of a few.

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
