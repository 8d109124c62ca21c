"""Conversion between our RoPE settings and the keys of a Hugging Face configuration."""

from __future__ import annotations

import math
from typing import Any

from plt_megatron.config.schema import ModelConfig, RopeScalingConfig, YarnConfig
from plt_megatron.errors import UserError

_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the `rope_parameters` of a configuration."""
    return {"rope_theta": model.rotary_base, **(scaling_keys(model) or {"rope_type": "default"})}


def scaling_keys(model: ModelConfig) -> dict[str, Any]:
    """Return RoPE's scaling: YaRN's, or Llama 3.1's with megatron-core's constants; empty without scaling."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    if scaling.yarn is None:
        return {"rope_type": "llama3", "factor": scaling.factor, **_LLAMA3_CONSTANTS}
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.yarn.original_max_position_embeddings,
        "beta_fast": scaling.yarn.beta_fast,
        "beta_slow": scaling.yarn.beta_slow,
        "truncate": scaling.yarn.correction_range_round_to_int,
    }


def rope_scaling(rope: dict[str, Any]) -> RopeScalingConfig | None:
    """Return the scaling in `rope_parameters` as our settings have it, or None without scaling.

    Raises:
        UserError: the scaling is one that the model does not support.
    """
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0")
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "yarn":
        return _yarn(rope)
    if kind != "llama3":
        raise UserError(f"rope_type {kind!r} is not supported, only 'default', 'llama3' and 'yarn'")
    for name, value in _LLAMA3_CONSTANTS.items():
        if rope.get(name) != value:
            raise UserError(f"rope_type llama3 with {name} {rope.get(name)} is not supported, only {value}")
    return RopeScalingConfig(float(rope["factor"]))


def _yarn(rope: dict[str, Any]) -> RopeScalingConfig:
    """Read transformers' keys. Queries and keys must have the factor 0.1 ln(factor) + 1, and no other."""
    factor = float(rope["factor"])
    own = {"attention_factor": 0.1 * math.log(factor) + 1, "mscale": None, "mscale_all_dim": None}
    for name, value in own.items():
        given = rope.get(name)
        if given is not None and (value is None or not math.isclose(given, value, rel_tol=1e-6)):
            raise UserError(f"rope_type yarn with {name} {given} is not supported: leave it out for YaRN's own")
    yarn = YarnConfig(
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        correction_range_round_to_int=bool(rope.get("truncate", True)),
    )
    return RopeScalingConfig(factor, yarn)
