"""Rules for dividing layers among pipeline stages; part of `validation`."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.schema import ParallelConfig, RunConfig

_GIVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def uneven_settings(parallel: ParallelConfig) -> list[str]:
    """Return the names of the settings of `parallel` that make stages uneven."""
    return [name for name in (*_GIVEN, *_COUNTED) if getattr(parallel, name)]


def find_problems(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    """Yield divisions that do not work out, one line each."""
    given = [name for name in _GIVEN if getattr(config.parallel, name) is not None]
    counted = [name for name in _COUNTED if getattr(config.parallel, name)]
    uneven = uneven_settings(config.parallel)
    size = f"parallel.pipeline_model_parallel_size {layout.pipeline}"
    if uneven and layout.pipeline == 1:
        yield f"parallel.{uneven[0]} applies to the stages of a pipeline: leave it out, or raise {size}"
    elif given and counted:
        yield f"parallel.{given[0]} and parallel.{counted[0]} both set what the first and last stage hold: use one"
    elif given:
        yield from _check_given(config, layout, given)
    else:
        yield from _check_counted(config, layout, counted)


def _check_given(config: RunConfig, layout: ParallelLayout, given: list[str]) -> Iterator[str]:
    layers = config.model.num_layers
    rest, stages = layers - sum(getattr(config.parallel, name) for name in given), layout.pipeline - len(given)
    names = " and ".join(f"parallel.{name} {getattr(config.parallel, name)}" for name in given)
    if stages == 0 and rest != 0:
        yield f"{names} must add up to model.num_layers {layers}: there is no stage between them"
    elif stages > 0 and (rest < stages or rest % stages):
        yield (
            f"{names} leave {rest} of model.num_layers {layers} to the other {stages} of "
            f"parallel.pipeline_model_parallel_size {layout.pipeline} stages: it must be a multiple of {stages}"
        )


def _check_counted(config: RunConfig, layout: ParallelLayout, counted: list[str]) -> Iterator[str]:
    layers = config.model.num_layers
    if (layers + len(counted)) % layout.pipeline == 0:
        return
    more = "".join(f" + 1 (parallel.{name})" for name in counted)
    yield f"model.num_layers {layers}{more} is not divisible by parallel.pipeline_model_parallel_size {layout.pipeline}"
