"""Checks of `engine: deepspeed`: what it cannot do, and what the raw `deepspeed:` section may not say.

Every problem names what to set instead.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from plt_megatron.config import deepspeed_settings as settings
from plt_megatron.config.optimizers import optimizer_spec
from plt_megatron.config.schema import RunConfig, ZeroConfig
from plt_megatron.extras import lacking

VERSIONS = ">=0.19,<0.20"


def find_deepspeed_problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """The problems of a configuration whose single settings are in range, one line each."""
    if config.engine != "deepspeed":
        yield from _check_unused(config)
        return
    yield from _check_features(config)
    yield from _check_zero(config.zero)
    if optimizer_spec(config.optimizer).deepspeed is not None:
        yield from _check_raw(config, world_size)


def _check_unused(config: RunConfig) -> Iterator[str]:
    """Settings that the other engine would silently ignore."""
    if config.deepspeed:
        yield "deepspeed: this section is for engine=deepspeed; set that, or leave the section out"
    if config.zero != ZeroConfig():
        yield "zero: this section is for engine=deepspeed; set that, or leave the section out"


def _check_features(config: RunConfig) -> Iterator[str]:
    """Requested features that this engine lacks."""
    parallel, model = config.parallel, config.model
    wanted: tuple[tuple[str, Any], ...] = (
        ("pipeline_model_parallel_size", 1),
        ("context_parallel_size", 1),
        ("expert_model_parallel_size", 1),
        ("overlap_grad_reduce", False),
        ("overlap_param_gather", False),
    )
    for name, off in wanted:
        value = getattr(parallel, name)
        if value is not None and value != off:
            yield f"engine deepspeed: parallel.{name} {_text(value)}: set it to {_text(off)}, or set engine=megatron"
    if model.num_moe_experts is not None:
        what = f"model.num_moe_experts {model.num_moe_experts}"
        yield f"engine deepspeed: {what}: mixture of experts needs engine=megatron"
    if optimizer_spec(config.optimizer).deepspeed is None:
        yield f"engine deepspeed: optimizer.name {config.optimizer.name}: set it to adam, or set engine=megatron"
    if config.training.fp8 != "none":
        yield f"engine deepspeed: training.fp8 {config.training.fp8}: set it to none for BF16, or set engine=megatron"
    if config.training.batch_schedule:
        yield "engine deepspeed: training.batch_schedule is not proven with it: leave it out, or set engine=megatron"
    if config.data.length_schedule:
        yield "engine deepspeed: data.length_schedule is not proven with it: leave it out, or set engine=megatron"
    if config.training.ema_decay is not None:
        what = f"training.ema_decay {_text(config.training.ema_decay)}"
        yield f"engine deepspeed: {what}: averages are not proven with it: set it to null, or set engine=megatron"


def _check_zero(zero: ZeroConfig) -> Iterator[str]:
    if zero.stage == 0:
        yield "zero.stage 0: set zero.stage=1, or engine=megatron, whose optimizer is sharded as in stage 1"
    if zero.offload_param != "none" and zero.stage != 3:
        yield (
            f"zero.offload_param {zero.offload_param} needs zero.stage=3: below it every rank holds all parameters; "
            "set that, or zero.offload_param=none"
        )


def _check_raw(config: RunConfig, world_size: int | None) -> Iterator[str]:
    decided = settings.written(config, world_size)
    for key, value in settings.raw(config).items():
        if key in decided and _equal(value, decided[key]):
            continue
        if key in settings.DECIDED_BY:
            yield (
                f"deepspeed.{key} {_text(value)} contradicts {settings.DECIDED_BY[key]}, which makes it "
                f"{_text(decided[key])}: set that and leave this out"
            )
            continue
        refused = next((name for name in _prefixes(key) if name in settings.REFUSED), None)
        if refused is not None:
            yield f"deepspeed.{key} cannot be set here: {settings.REFUSED[refused]}"
        elif key in decided:
            yield f"deepspeed.{key} must be {_text(decided[key])} here: leave it out"
        elif key not in settings.ADDABLE:
            yield _unknown(key)
        else:
            yield from _check_kind(key, value)


def _check_kind(key: str, value: Any) -> Iterator[str]:
    kind = settings.ADDABLE[key]
    if kind == "bool":
        if not isinstance(value, bool):
            yield f"deepspeed.{key}: expected true or false, got {_text(value)}"
        return
    least = 1 if kind == "positive" else 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least or value % 1 != 0:
        yield f"deepspeed.{key}: expected a whole number of at least {least}, got {_text(value)}"


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _unknown(key: str) -> str:
    known = [*settings.ADDABLE, *settings.DECIDED_BY]
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"deepspeed.{key} is a section: set its keys, as in deepspeed.{inside[0]}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else "docs/deepspeed.md lists those that may be added"
    return f"deepspeed.{key} is unknown, and DeepSpeed would silently ignore it; {hint}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)


def find_package_problem(config: RunConfig) -> str | None:
    """Whether DeepSpeed is installed if it is needed; does not import it."""
    if config.engine != "deepspeed":
        return None
    if lacking("deepspeed"):
        return f"engine deepspeed {lacking('deepspeed')}, or set engine=megatron"
    version = importlib.metadata.version("deepspeed")
    if version.split(".")[:2] != ["0", "19"]:
        return f"engine deepspeed needs DeepSpeed {VERSIONS}, found {version}; install that or set engine=megatron"
    return None
