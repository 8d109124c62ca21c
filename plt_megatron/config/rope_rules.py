"""Checks of how RoPE is scaled for longer texts (`model.rope_scaling_type`); part of `validation`."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config.schema import ModelConfig, RunConfig

YARN = (
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
)


def find_problems(config: RunConfig) -> Iterator[str]:
    """The problems of a configuration whose single settings are in range, one line each."""
    model, default = config.model, ModelConfig()
    if model.rope_scaling_type != "yarn":
        for name in YARN:
            if getattr(model, name) != getattr(default, name):
                value = getattr(model, name)
                yield f"model.{name} {value} is for model.rope_scaling_type=yarn: set that, or leave it out"
        return
    factor, original = model.rope_scaling_factor, model.yarn_original_max_position_embeddings
    if factor is None or original is None:
        missing = "rope_scaling_factor" if factor is None else "yarn_original_max_position_embeddings"
        yield (
            f"model.rope_scaling_type yarn needs model.{missing}: the factor says how many times as long texts are as "
            "the original ones"
        )
        return
    if model.yarn_beta_fast <= model.yarn_beta_slow:
        yield (
            f"model.yarn_beta_fast {model.yarn_beta_fast:g} must be above model.yarn_beta_slow "
            f"{model.yarn_beta_slow:g}: both count turns over the original length"
        )
    if config.data.sequence_length > factor * original:
        yield (
            f"data.sequence_length {config.data.sequence_length} is longer than YaRN's model.rope_scaling_factor "
            f"{factor:g} x model.yarn_original_max_position_embeddings {original}: set a larger factor"
        )
