"""RoPE's angles and factors against transformers' own functions, at the sizes of real models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig, ParallelConfig
from plt_megatron.hf.config_keys import rope_keys, rope_scaling
from tests.settings import make

pytestmark = pytest.mark.usefixtures("one_process")

QWEN3 = {"hidden_size": 512, "num_attention_heads": 4, "rotary_base": 1e6}
YARN = {"rope_scaling.factor": 4.0, "rope_scaling.yarn.original_max_position_embeddings": 32768}
CASES: dict[str, dict[str, Any]] = {
    "plain": QWEN3,
    "Llama 3.1": {**QWEN3, "rotary_base": 5e5, "rope_scaling.factor": 8.0},
    "YaRN": {**QWEN3, **YARN},
    "other betas": {
        **QWEN3,
        **YARN,
        "rope_scaling.yarn.beta_fast": 16.0,
        "rope_scaling.yarn.beta_slow": 2.0,
        "rope_scaling.factor": 40.0,
    },
    "ends not rounded": {**QWEN3, **YARN, "rope_scaling.yarn.correction_range_round_to_int": False},
    "short texts, narrow heads": {
        **QWEN3,
        **YARN,
        "kv_channels": 16,
        "rope_scaling.yarn.original_max_position_embeddings": 128,
    },
}


def ours(model: ModelConfig, length: int) -> tuple[torch.Tensor, float]:
    """Angles [length, head_dim / 2], and the factor that megatron-core's attention takes."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    from plt_megatron.model.rotary import RotaryAngles
    from plt_megatron.model.transformer_config import transformer_config

    config = transformer_config(model, ParallelConfig())
    angles = RotaryAngles(config, parallel_state.get_context_parallel_group())(length)[:, 0, 0]
    first, second = angles.chunk(2, dim=-1)
    assert torch.equal(first, second)
    return first, yarn._yarn_get_concentration_factor_from_config(config)


def theirs(model: ModelConfig) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim = model.kv_channels or model.hidden_size // model.num_attention_heads
    parameters = rope_keys(model)
    if parameters["rope_type"] == "default":
        return model.rotary_base ** (-torch.arange(0, dim, 2) / dim), 1.0
    config = LlamaConfig(head_dim=dim, max_position_embeddings=131072, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_frequencies_and_factor_are_transformers(settings):
    model = make(ModelConfig, {**settings, "backend": "torch"})
    angles, factor = ours(model, 9)
    frequencies, expected = theirs(model)
    assert torch.allclose(angles, torch.arange(9)[:, None] * frequencies, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected, rel=1e-12) and (factor > 1) is (derived.yarn_factor(model) is not None)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_keys_of_a_configuration_come_back(settings):
    model = make(ModelConfig, settings)
    assert dataclasses.replace(model, rope_scaling=rope_scaling(rope_keys(model))) == model
