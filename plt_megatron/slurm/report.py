"""What plt submit prints about a run before it submits it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from plt_megatron.config.batch_schedule import BatchSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.run_folder.text import format_bytes, format_duration, format_memory, plural
from plt_megatron.slurm.checks import Forecast
from plt_megatron.slurm.resources import Resources


def describe_run(config: RunConfig, run: Path, resources: Resources, ahead: Forecast) -> list[tuple[str, str]]:
    """Name and value of each line about one run."""
    estimate, layout = ahead.estimate, ahead.estimate.layout
    rows = [
        ("run folder", str(run)),
        ("layout", layout.in_words()),
        ("microbatches", f"{layout.microbatches} per step and data-parallel rank"),
        (
            "parameters",
            f"{estimate.parameters_total:,} ({estimate.parameters_total - estimate.parameters_embedding:,} without "
            "embeddings)",
        ),
        ("tokens", f"{estimate.tokens:,} in {plural(ahead.steps, 'step')} of {BatchSchedule(config).step_in_words}"),
        ("FLOPs", f"{estimate.total_flops:.3g}, {estimate.flops_per_token:.3g} per token"),
    ]
    if ahead.start_step:
        rows.append(("resumes", f"after step {ahead.start_step:,} of {ahead.steps:,}"))
    rows += _time(ahead, resources)
    rows.append(("bubble", f"{100 * estimate.bubble_fraction:.1f} % of a step's work"))
    rows += _memory(ahead, resources)
    rows.append(("checkpoints", _storage(ahead)))
    return rows


def _time(ahead: Forecast, resources: Resources) -> Iterator[tuple[str, str]]:
    if ahead.step_seconds is None or ahead.remaining_seconds is None:
        yield "step time", "not known: set tflops_per_process in the cluster's profile, or logging.peak_tflops"
        return
    source = "measured in this run's earlier steps" if ahead.measured else "estimated"
    device = "process-hours" if resources.card == "cpu" else "GPU-hours"
    hours = ahead.remaining_seconds * resources.world_size / 3600
    yield "step time", f"{ahead.step_seconds:.3g} s ({source})"
    yield "run time", f"{format_duration(ahead.remaining_seconds)}, {hours:,.1f} {device}"


def _memory(ahead: Forecast, resources: Resources) -> Iterator[tuple[str, str]]:
    estimate = ahead.estimate
    stages = [format_memory(stage.total_bytes) for stage in estimate.memory]
    card, there = resources.card, format_memory(estimate.device_memory_bytes)
    has = "" if card == "cpu" else f"; {card.upper()}: {there}"
    if len(stages) == 1:
        yield "memory", f"{stages[0]} per rank (estimated){has}"
    else:
        yield "memory", f"per rank of each pipeline stage (estimated): {', '.join(stages)}{has}"


def _storage(ahead: Forecast) -> str:
    if not ahead.checkpoint_bytes:
        return "none: checkpoint.enabled is false, so nothing can be resumed"
    return (
        f"{format_bytes(ahead.checkpoint_bytes)} each, up to {format_bytes(ahead.storage_bytes)} more in all; "
        f"{format_bytes(ahead.free_bytes)} free"
    )


def describe_job(resources: Resources, limit: int, chain: int, requeue: bool, cluster: str | None) -> str:
    """One line about the requested job."""
    devices = plural(resources.processes_per_node, "GPU" if resources.gpus_per_node else "process")
    parts = [f"{plural(resources.nodes, 'node')} x {devices}, {plural(resources.cpus_per_process, 'CPU')} each"]
    parts.append(format_duration(limit) + (f" x {chain} jobs, one after another" if chain > 1 else ""))
    if requeue:
        parts.append("requeued until it is finished")
    parts.append(f"partition {resources.partition or '(the default)'}")
    if cluster:
        parts.append(f"cluster {cluster}")
    return "; ".join(parts)
