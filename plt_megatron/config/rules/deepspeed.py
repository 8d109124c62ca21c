"""Checks of `deepspeed`: what its engine cannot do, and what the raw `deepspeed.config` may not say.

Every problem names what to set instead.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from plt_megatron.config import deepspeed_settings as settings
from plt_megatron.config.optimizers import optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.extras import lacking

VERSIONS = ">=0.19,<0.20"


def find_problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """The problems of a configuration whose single settings are in range, one line each."""
    if config.deepspeed is None:
        return
    yield from _check_features(config)
    if config.deepspeed.offload_param != "none" and config.deepspeed.zero_stage != 3:
        yield (
            f"deepspeed.offload_param {config.deepspeed.offload_param} needs deepspeed.zero_stage=3: below it every "
            "rank holds all parameters; set that, or deepspeed.offload_param=none"
        )
    if optimizer_spec(config.optimizer).deepspeed is not None:
        yield from _check_raw(config, world_size)


def _check_features(config: RunConfig) -> Iterator[str]:
    """Requested features that this engine lacks."""
    parallel, training, name = config.parallel, config.training, config.optimizer.name
    lacks: dict[str, tuple[bool, str]] = {
        "parallel.pipeline_model_parallel_size": (parallel.pipeline_model_parallel_size > 1, "1"),
        "parallel.context_parallel_size": (parallel.context_parallel_size > 1, "1"),
        "parallel.expert_model_parallel_size": (parallel.expert_model_parallel_size > 1, "1"),
        "parallel.overlap_grad_reduce": (parallel.overlap_grad_reduce, "false"),
        "parallel.overlap_param_gather": (parallel.overlap_param_gather is True, "false"),
        "model.moe": (config.model.moe is not None, "null"),
        f"optimizer.name {name}": (optimizer_spec(config.optimizer).deepspeed is None, "adam"),
        "training.fp8": (training.fp8 is not None, "null"),
        "training.batch_schedule": (bool(training.batch_schedule), "[]"),
        "data.length_schedule": (bool(config.data.length_schedule), "[]"),
        "training.ema_decay": (training.ema_decay is not None, "null"),
    }
    for setting, (wanted, off) in lacks.items():
        if wanted:
            key = setting.partition(" ")[0]
            yield f"{setting} is not proven with deepspeed: set {key}={off}, or leave out the section deepspeed"


def _check_raw(config: RunConfig, world_size: int | None) -> Iterator[str]:
    decided = settings.written(config, world_size)
    for key, value in settings.raw(config).items():
        if key in decided and _equal(value, decided[key]):
            continue
        if key in settings.DECIDED_BY:
            yield (
                f"deepspeed.config.{key} {_text(value)} contradicts {settings.DECIDED_BY[key]}, which makes it "
                f"{_text(decided[key])}: set that and leave this out"
            )
            continue
        refused = next((name for name in _prefixes(key) if name in settings.REFUSED), None)
        if refused is not None:
            yield f"deepspeed.config.{key} cannot be set here: {settings.REFUSED[refused]}"
        elif key in decided:
            yield f"deepspeed.config.{key} must be {_text(decided[key])} here: leave it out"
        elif key not in settings.ADDABLE:
            yield _unknown(key)
        else:
            yield from _check_kind(key, value)


def _check_kind(key: str, value: Any) -> Iterator[str]:
    kind = settings.ADDABLE[key]
    if kind == "bool":
        if not isinstance(value, bool):
            yield f"deepspeed.config.{key}: expected true or false, got {_text(value)}"
        return
    least = 1 if kind == "positive" else 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least or value % 1 != 0:
        yield f"deepspeed.config.{key}: expected a whole number of at least {least}, got {_text(value)}"


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _unknown(key: str) -> str:
    known = [*settings.ADDABLE, *settings.DECIDED_BY]
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"deepspeed.config.{key} is a section: set its keys, as in deepspeed.config.{inside[0]}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else "docs/deepspeed.md lists those that may be added"
    return f"deepspeed.config.{key} is unknown, and DeepSpeed would silently ignore it; {hint}"


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
    if config.deepspeed is None:
        return None
    if lacking("deepspeed"):
        return f"deepspeed {lacking('deepspeed')}, or leave that section out"
    version = importlib.metadata.version("deepspeed")
    if version.split(".")[:2] != ["0", "19"]:
        return f"deepspeed needs DeepSpeed {VERSIONS}, found {version}; install that, or leave the section out"
    return None
