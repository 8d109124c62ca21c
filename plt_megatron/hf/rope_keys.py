"""RoPE's keys in a Hugging Face configuration: ours to theirs, and back."""

from __future__ import annotations

import math
from typing import Any

from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError

_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """What a configuration has as `rope_parameters`."""
    return {"rope_theta": model.rotary_base, **(scaling_keys(model) or {"rope_type": "default"})}


def scaling_keys(model: ModelConfig) -> dict[str, Any]:
    """RoPE's scaling: YaRN's, or Llama 3.1's with the constants that megatron-core has; empty without one."""
    if model.rope_scaling_factor is None:
        return {}
    if model.rope_scaling_type == "llama3":
        return {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3_CONSTANTS}
    return {
        "rope_type": "yarn",
        "factor": model.rope_scaling_factor,
        "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow,
        "truncate": model.yarn_correction_range_round_to_int,
    }


def scaling_settings(rope: dict[str, Any]) -> dict[str, Any]:
    """Our settings of the scaling in `rope_parameters`.

    Raises:
        UserError: one that the model does not have.
    """
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0")
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "yarn":
        return _yarn_settings(rope)
    if kind != "llama3":
        raise UserError(f"rope_type {kind!r} is not supported, only 'default', 'llama3' and 'yarn'")
    for name, value in _LLAMA3_CONSTANTS.items():
        if rope.get(name) != value:
            raise UserError(f"rope_type llama3 with {name} {rope.get(name)} is not supported, only {value}")
    return {"rope_scaling_factor": float(rope["factor"])}


def _yarn_settings(rope: dict[str, Any]) -> dict[str, Any]:
    """transformers' keys; queries and keys have the factor 0.1 ln(factor) + 1, and no other."""
    factor = float(rope["factor"])
    own = {"attention_factor": 0.1 * math.log(factor) + 1, "mscale": None, "mscale_all_dim": None}
    for name, value in own.items():
        given = rope.get(name)
        if given is not None and (value is None or not math.isclose(given, value, rel_tol=1e-6)):
            raise UserError(f"rope_type yarn with {name} {given} is not supported: leave it out for YaRN's own")
    return {
        "rope_scaling_type": "yarn",
        "rope_scaling_factor": factor,
        "yarn_original_max_position_embeddings": int(rope["original_max_position_embeddings"]),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }
