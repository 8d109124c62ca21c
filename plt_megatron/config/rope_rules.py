"""Checks of how RoPE is scaled for longer texts (`model.rope_scaling`); part of `validation`."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config.schema import RunConfig


def find_problems(config: RunConfig) -> Iterator[str]:
    """The problems of a configuration whose single settings are in range, one line each."""
    scaling = config.model.rope_scaling
    if scaling is None or scaling.yarn is None:
        return
    key, yarn, factor = "model.rope_scaling.yarn", scaling.yarn, scaling.factor
    if yarn.beta_fast <= yarn.beta_slow:
        yield (
            f"{key}.beta_fast {yarn.beta_fast:g} must be above {key}.beta_slow {yarn.beta_slow:g}: both count turns "
            "over the original length"
        )
    original = yarn.original_max_position_embeddings
    if config.data.sequence_length > factor * original:
        yield (
            f"data.sequence_length {config.data.sequence_length} is longer than YaRN's model.rope_scaling.factor "
            f"{factor:g} x {key}.original_max_position_embeddings {original}: set a larger factor"
        )
