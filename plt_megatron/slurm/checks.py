"""Forecast of a run's memory, storage and time, and checks of it against the job's allocation."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.rules.uploads import is_url
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.launcher.job import load_settings
from plt_megatron.launcher.preflight import LEAST_RUN_FOLDER
from plt_megatron.predict.flops import run_flops_per_token, step_flops_per_token
from plt_megatron.predict.layout import BYTES
from plt_megatron.predict.run_estimate import RunEstimate, estimate_run
from plt_megatron.run_folder.checkpoints import (
    checkpoint_folders,
    latest_checkpoint,
    latest_step,
    read_verified_progress,
    step_of,
    trained_tokens,
)
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.metrics import median_speed
from plt_megatron.run_folder.status import last_train_records
from plt_megatron.run_folder.text import format_bytes, format_duration, format_memory, plural
from plt_megatron.slurm.client import LONGEST_MARGIN, time_option
from plt_megatron.slurm.resources import Resources
from plt_megatron.storage.copies import read_progress

# Slurm may send the signal this much earlier than requested.
SIGNAL_EARLY_SECONDS = 60
# Time before the first step: preflight, imports, NCCL, reading a checkpoint. A guess that matters only in close calls.
START_SECONDS = 120
_CPU_SHARE = 0.5  # share of a CPU's matrix product rate that training reaches


@dataclass(frozen=True)
class Forecast:
    """What is known about a run before it starts. Seconds are None if unknown."""

    estimate: RunEstimate
    steps: int  # the step it ends at, which depends on the tokens of earlier steps if its length is given in tokens
    start_step: int  # the step it resumes from
    step_seconds: float | None  # mean time of the steps after `start_step`
    slowest: float  # time of the largest step with all loops, relative to the mean: 1 unless a schedule changes them
    measured: bool  # whether the step time was measured in this run's earlier steps instead of estimated
    checkpoint_bytes: int  # size of one checkpoint; 0 if none are written
    storage_bytes: int  # space that exports and further checkpoints, beyond the existing ones, will need
    free_bytes: int  # free space on the file system of the run's folder

    @property
    def steps_left(self) -> int:
        """Steps until the last one."""
        return max(0, self.steps - self.start_step)

    @property
    def remaining_seconds(self) -> float | None:
        """Time until the last step."""
        return None if self.step_seconds is None else self.steps_left * self.step_seconds


def forecast(
    config: RunConfig, run: Path, resources: Resources, vocab_size: int, tflops_per_process: float | None
) -> Forecast:
    """Forecast a run whose configuration is valid for `resources.world_size` processes. `tflops_per_process`: matrix
    product rate on a CPU cluster; None: unknown."""
    estimate = estimate_run(
        config,
        gpu=resources.card,
        world_size=resources.world_size,
        gpus_per_node=resources.processes_per_node,
        vocab_size=vocab_size,
    )
    kept = _checkpoint_steps(run)
    begun = _begins_after(config)
    start, tokens = _clock(config, run) if kept else begun
    steps = derived.last_step(config, start, tokens)
    padded = derived.padded_vocab_size(config.model, vocab_size, config.parallel.tensor_model_parallel_size)
    position = start if config.training.train_tokens is None else BatchSchedule(config).steps(tokens)
    flops = run_flops_per_token(config, padded, position).total  # of the remaining steps, which may have more loops
    mean_tokens = derived.mean_step_tokens(config, start, tokens)
    work = flops * mean_tokens
    most_tokens = _most_tokens(config, steps - start, tokens)
    most = step_flops_per_token(config, padded, config.model.loop_count).total * most_tokens
    step_seconds: float | None = estimate.step_seconds * work * derived.train_iters(config) / estimate.total_flops
    if resources.card == "cpu":
        rate = config.logging.peak_tflops or tflops_per_process
        step_seconds = work / (rate * 1e12 * _CPU_SHARE * resources.world_size) if rate else None
    measured = _measured_step_seconds(config, run, resources.world_size, work, mean_tokens)
    step_seconds = measured or step_seconds
    size = estimate.checkpoint_bytes if config.checkpoint.enabled else 0
    return Forecast(
        estimate=estimate,
        steps=steps,
        start_step=start,
        step_seconds=step_seconds,
        slowest=most / work,
        measured=bool(measured),
        checkpoint_bytes=size,
        storage_bytes=max(0, _checkpoints_at_most(config, begun[0], steps) - len(kept)) * size
        + _export_bytes(config, estimate, start, steps),
        free_bytes=shutil.disk_usage(_existing(run)).free,
    )


def _most_tokens(config: RunConfig, left: int, tokens: int) -> int:
    """Return the tokens of the largest of the `left` steps that follow `tokens`; if none is left, of one more."""
    sizes = (size for size, _ in BatchSchedule(config).stretches(tokens, steps=max(1, left)))
    return max(sizes) * config.data.sequence_length


def _measured_step_seconds(
    config: RunConfig, run: Path, world_size: int, work: float, step_tokens: float
) -> float | None:
    """Return the step time scaled from the run's earlier jobs on as many processes; None if there is nothing to go by.
    `work` and `step_tokens` are a step's FLOPs and tokens, since the measured steps may have had fewer."""
    folder = RunFolder(run)
    if not folder.job_file.is_file():
        return None
    try:
        settings = load_settings(run)
    except UserError:
        return None
    records = last_train_records(folder)
    if settings.world_size != world_size or len(records) <= 2:
        return None
    if not derived.has_equal_steps(config):
        rates = [record["model_tflops"] for record in records if record.get("model_tflops")]
        return work / (1e12 * statistics.median(rates)) if rates else None
    speed = median_speed(records)
    return step_tokens / speed if speed else None


def _checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of existing checkpoints, ascending, without those of a course that was rolled back."""
    last = latest_step(run)
    return [step for step in map(step_of, checkpoint_folders(RunFolder(run).checkpoints)) if step <= last]


def _begins_after(config: RunConfig) -> tuple[int, int]:
    """Return the step after which a new run begins, and the tokens trained on until then: those of the checkpoint it
    continues, as a decay branch does."""
    source = config.checkpoint
    if source.load is None or source.weights_only:
        return 0, 0
    if not is_url(source.load):
        return _clock(config, Path(source.load))
    try:
        _, progress = read_progress(source.load)
    except UserError as error:
        raise UserError(f"checkpoint.load: {error}") from error
    return progress["step"], trained_tokens(progress)


def _clock(config: RunConfig, path: Path) -> tuple[int, int]:
    """Return the step of the last checkpoint at a path, and the tokens trained on until then."""
    found = latest_checkpoint(path, verify=False)
    if found is None:
        return 0, 0
    try:
        progress = read_verified_progress(found)
        return progress["step"], trained_tokens(progress)
    except UserError:
        raise
    except (OSError, ValueError, KeyError):  # damaged, which the job reports
        return step_of(found), BatchSchedule(config).tokens(step_of(found))


def _checkpoints_at_most(config: RunConfig, begun: int, steps: int) -> int:
    """Return the maximum number of checkpoints at any time of a run from one step to another: the last ones, those
    being written, exported and uploaded, and the permanent ones."""
    checkpoint = config.checkpoint
    interval = checkpoint.save_interval or steps
    for_good = 0
    if checkpoint.keep_every:
        every = math.lcm(interval, checkpoint.keep_every)
        for_good = steps // every - begun // every
    beside = (checkpoint.exports is not None) + (checkpoint.uploads is not None)  # each keeps one while it works
    at_once = checkpoint.keep_last + 1 + beside
    return min(at_once + for_good, -(-steps // interval) - begun // interval + 1)


def _export_bytes(config: RunConfig, estimate: RunEstimate, start: int, steps: int) -> int:
    """Return the bytes of the exports still to come, all of which are kept."""
    exports = config.checkpoint.exports
    if exports is None:
        return 0
    to_come = max(0, -(-steps // exports.interval) - start // exports.interval)
    return to_come * estimate.parameters_total * BYTES[config.training.precision]


def memory_problems(ahead: Forecast, resources: Resources) -> list[str]:
    """Check that the worst rank fits its device."""
    estimate = ahead.estimate
    if resources.card == "cpu":
        needed, there = resources.processes_per_node * estimate.peak_memory_bytes, resources.node_memory_bytes
        if there is None or needed <= there:
            return []
        return [
            f"memory: {plural(resources.processes_per_node, 'process')} of {format_memory(estimate.peak_memory_bytes)} "
            f"each: {format_memory(needed)} per node, which has {format_memory(there)}; {_MEMORY_ADVICE}"
        ]
    if estimate.fits:
        return []
    worst, card = max(estimate.memory, key=lambda stage: stage.total_bytes), resources.card.upper()
    largest = sorted(worst.components.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {format_memory(size)}" for name, size in largest)
    return [
        f"memory: a rank needs {format_memory(estimate.peak_memory_bytes)} ({parts}), the card ({card}) "
        f"has {format_memory(estimate.device_memory_bytes)}, part of which must stay free; {_MEMORY_ADVICE}"
    ]


_MEMORY_ADVICE = (
    "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size, set "
    "parallel.recompute_granularity=full, or lower training.micro_batch_size"
)


def storage_problems(ahead: Forecast, run: Path) -> list[str]:
    """Check that checkpoints fit the file system, with the free space a job needs to start. Ignores quotas."""
    if ahead.storage_bytes <= ahead.free_bytes:
        if ahead.free_bytes >= LEAST_RUN_FOLDER:
            return []
        return [
            f"output_dir: the file system of {run} has {format_memory(ahead.free_bytes)} free, and a job starts only "
            f"where it has {format_memory(LEAST_RUN_FOLDER)}: make room, or choose another output_dir"
        ]
    return [
        f"output_dir: checkpoints of {format_bytes(ahead.checkpoint_bytes)} will need "
        f"{format_bytes(ahead.storage_bytes)}, the file system of {run} has {format_bytes(ahead.free_bytes)} free: "
        "lower checkpoint.keep_last, keep_every or export less often, or choose another output_dir"
    ]


def storage_problems_of_all(runs: Sequence[tuple[Path, Forecast]]) -> list[str]:
    """Check that the checkpoints of several runs fit their file systems together, if each would fit alone."""
    on_one: dict[int, list[Forecast]] = {}
    for run, ahead in runs:
        on_one.setdefault(_existing(run).stat().st_dev, []).append(ahead)
    problems = []
    for group in on_one.values():
        needed, free = sum(ahead.storage_bytes for ahead in group), min(ahead.free_bytes for ahead in group)
        if needed > free >= max(ahead.storage_bytes for ahead in group):
            problems.append(
                f"output_dir: the checkpoints of {len(group)} runs will need {format_bytes(needed)} together, their "
                f"file system has {format_bytes(free)} free: lower checkpoint.keep_last or checkpoint.keep_every, or "
                "submit fewer runs"
            )
    return problems


def _existing(path: Path) -> Path:
    """Return the path, or its nearest existing parent folder."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def usable_seconds(limit: int, margin: int) -> int:
    """Return the part of a job's time limit that is left for steps."""
    return limit - margin - SIGNAL_EARLY_SECONDS - START_SECONDS


def time_problems(config: RunConfig, ahead: Forecast, limit: int, margin: int) -> list[str]:
    """Check that one job reaches a checkpoint; otherwise jobs might start over forever."""
    usable = usable_seconds(limit, margin)
    given = f"--time {time_option(limit)}"
    if usable <= 0:
        return [
            f"{given} leaves no time for steps: it takes about {START_SECONDS} s to start, and the job is told to save "
            f"{margin} s before the limit, which Slurm may do {SIGNAL_EARLY_SECONDS} s early; give more time or a "
            "smaller --signal-margin"
        ]
    if ahead.step_seconds is None:
        return []
    checkpoint, left = config.checkpoint, ahead.steps_left
    steps, what = left, "the run, which writes no checkpoints to resume from"
    advice = "set checkpoint.enabled=true"
    if checkpoint.enabled:
        steps, what = min(checkpoint.save_interval or left, left), "one checkpoint interval"
        advice = f"{'lower' if checkpoint.save_interval else 'set'} checkpoint.save_interval"
    step_seconds = ahead.step_seconds * (1 if steps == left else ahead.slowest)
    needed = steps * step_seconds
    if needed <= usable:
        return []
    return [
        f"{given} is too short for {what}: {plural(steps, 'step')} of {step_seconds:.3g} s take "
        f"{format_duration(needed)}, and {format_duration(limit)} leaves {format_duration(usable)} for steps; {advice} "
        "or give more time"
    ]


def time_warnings(ahead: Forecast, limit: int, margin: int, *, requeue: bool, chain: int) -> list[str]:
    """List warnings if one job is not enough, or if the margin before its limit is short, one line each."""
    remaining, step_seconds = ahead.remaining_seconds, ahead.step_seconds
    if remaining is None or step_seconds is None:
        return []
    warnings, slowest = [], step_seconds * ahead.slowest
    if 2 * slowest > margin:
        warnings.append(
            f"a step takes about {slowest:.3g} s, and the job is told to save {margin} s before its limit: "
            f"give --signal-margin {min(round(3 * slowest) + margin, LONGEST_MARGIN)}"
        )
    usable = max(1, usable_seconds(limit, margin))  # a run with no usable time is refused
    jobs = max(1, math.ceil(remaining / usable))
    if jobs > chain and not requeue:
        reached = min(ahead.steps, ahead.start_step + int(chain * usable / step_seconds))
        given = "one job" if chain == 1 else f"--chain {chain}"
        warnings.append(
            f"the run needs about {format_duration(remaining)}, so {given} of {format_duration(limit)} ends at about "
            f"step {reached:,} of {ahead.steps:,}: give --chain {jobs} or --requeue"
        )
    return warnings


# The summary of plt submit.


def describe_run(config: RunConfig, run: Path, resources: Resources, ahead: Forecast) -> Iterator[tuple[str, str]]:
    """Yield name and value of each line of the summary about one run."""
    estimate, layout, total = ahead.estimate, ahead.estimate.layout, ahead.estimate.parameters_total
    yield "run folder", str(run)
    yield "layout", layout.in_words()
    yield "microbatches", f"{layout.microbatches} per step and data-parallel rank"
    yield "parameters", f"{total:,} ({total - estimate.parameters_embedding:,} without embeddings)"
    of = "of" if ahead.steps == derived.train_iters(config) else "that now are of"
    yield "tokens", f"{estimate.tokens:,} in {plural(ahead.steps, 'step')} {of} {BatchSchedule(config).step_in_words}"
    yield "FLOPs", f"{estimate.total_flops:.3g}, {estimate.flops_per_token:.3g} per token"
    if ahead.start_step:
        yield "resumes", f"after step {ahead.start_step:,} of {ahead.steps:,}"
    yield from _time(ahead, resources)
    yield "bubble", f"{100 * estimate.bubble_fraction:.1f} % of a step's work"
    stages = [format_memory(stage.total_bytes) for stage in estimate.memory]
    card, there = resources.card, format_memory(estimate.device_memory_bytes)
    per = "per rank of each pipeline stage (estimated): " + ", ".join(stages)
    each = f"{stages[0]} per rank (estimated)" if len(stages) == 1 else per
    yield "memory", each + ("" if card == "cpu" else f"; {card.upper()}: {there}")
    if not ahead.checkpoint_bytes:
        yield "checkpoints", "none: checkpoint.enabled is false, so the run cannot resume"
        return
    size, more, free = map(format_bytes, (ahead.checkpoint_bytes, ahead.storage_bytes, ahead.free_bytes))
    yield "checkpoints", f"{size} each, up to {more} more in total; {free} free"


def _time(ahead: Forecast, resources: Resources) -> Iterator[tuple[str, str]]:
    if ahead.step_seconds is None or ahead.remaining_seconds is None:
        yield "step time", "unknown: set tflops_per_process in the cluster's profile, or logging.peak_tflops"
        return
    source = "measured in this run's earlier steps" if ahead.measured else "estimated"
    device = "process-hours" if resources.card == "cpu" else "GPU-hours"
    hours = ahead.remaining_seconds * resources.world_size / 3600
    yield "step time", f"{ahead.step_seconds:.3g} s ({source})"
    yield "run time", f"{format_duration(ahead.remaining_seconds)}, {hours:,.1f} {device}"


def describe_job(resources: Resources, limit: int, chain: int, requeue: bool, cluster: str | None) -> str:
    """Return one line about the requested job."""
    devices = plural(resources.processes_per_node, "GPU" if resources.gpus_per_node else "process")
    parts = [f"{plural(resources.nodes, 'node')} x {devices}, {plural(resources.cpus_per_process, 'CPU')} each"]
    parts.append(format_duration(limit) + (f" x {chain} jobs, one after another" if chain > 1 else ""))
    if requeue:
        parts.append("requeued until it is finished")
    parts.append(f"partition {resources.partition or '(the default)'}")
    if cluster:
        parts.append(f"cluster {cluster}")
    return "; ".join(parts)
