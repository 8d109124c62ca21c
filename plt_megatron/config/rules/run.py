"""Rules for a run's validation, exports and profiles."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.layout import layout_of
from plt_megatron.config.schema import RunConfig


def find_problems(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    yield from _check_validation(config)
    yield from _check_exports(config)
    yield from _check_rollback(config)
    yield from _check_profile(config, world_size)


def _check_validation(config: RunConfig) -> Iterator[str]:
    if config.model.loop_count == 1 and any(count != 1 for count in config.validation.loop_counts):
        yield (
            f"validation.loop_counts {config.validation.loop_counts}: a model of model.loop_count 1 "
            "has no gates, so it can only be validated at [1]"
        )
    names = [derived.source_name(source) for source in (config.data.validation_sources or config.data.sources)]
    double = next((name for name in names if names.count(name) > 1), None)
    if config.validation.by_source and config.validation.iters and double is not None:
        yield f"validation.by_source: two sources are named {double!r}: give each a name of its own"


def _check_exports(config: RunConfig) -> Iterator[str]:
    """Check that exports and uploads have saved checkpoints, and evaluations exports with a tokenizer."""
    checkpoint, exports = config.checkpoint, config.checkpoint.exports
    if config.evaluation is not None and (exports is None or config.data.tokenizer is None):
        missing = "checkpoint.exports.interval" if exports is None else "data.tokenizer"
        yield f"evaluation.tasks need exports of the run and their tokenizer: set {missing}"
    for name in ("exports", "uploads"):
        if getattr(checkpoint, name) is not None and not checkpoint.enabled:
            yield f"checkpoint.{name} are made of checkpoints, but checkpoint.enabled=false writes none"
    if exports is None or not checkpoint.enabled:
        return
    if not checkpoint.save_interval or exports.interval % checkpoint.save_interval:
        advice = "" if checkpoint.save_interval else f": set it, as to {exports.interval}"
        yield (
            f"checkpoint.exports.interval {exports.interval} must be a multiple of checkpoint.save_interval, which is "
            f"{checkpoint.save_interval}{advice}"
        )


def _check_rollback(config: RunConfig) -> Iterator[str]:
    """Check that the run has a checkpoint to go back to before its last step."""
    training, checkpoint = config.training, config.checkpoint
    saves = checkpoint.enabled and 0 < checkpoint.save_interval < derived.train_iters(config)
    if saves or derived.continues(config):
        return
    actions = {
        "training.on_nonfinite": training.on_nonfinite,
        "training.spikes.action": training.spikes and training.spikes.action,
    }
    lacking = f"save_interval={checkpoint.save_interval}" if checkpoint.enabled else "enabled=false"
    for key, action in actions.items():
        if action == "rollback":
            yield f"{key}=rollback: with checkpoint.{lacking} there is no checkpoint to return to; set {key}=skip"


def _check_profile(config: RunConfig, world_size: int | None) -> Iterator[str]:
    profile = config.logging.profile
    if profile is None:
        return
    if profile.step_end <= profile.step_start:
        yield (
            f"logging.profile.step_end {profile.step_end} must be above logging.profile.step_start {profile.step_start}"
        )
    if config.logging.straggler is not None:
        yield (
            "logging.straggler and logging.profile: both time kernels with CUPTI, which serves one at a time; leave "
            "one of them out"
        )
    ranks = layout_of(config).world_size if world_size is None else world_size
    if any(rank >= ranks for rank in profile.ranks):
        yield f"logging.profile.ranks {profile.ranks}: the run has ranks 0 to {ranks - 1}"
