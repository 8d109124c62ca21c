"""The baseline of PLT-2's speed: megatron-core's GPT of twice the depth, with our attention and norm modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.layer_specs import layer_spec
from plt_megatron.model.transformer_config import resolve_backend


def deeper_gpt(
    model: ModelConfig, layers_config: Callable[[ModelConfig], TransformerConfig], vocab_size: int, sequence_length: int
) -> GPTModel:
    """A GPTModel of the width of `model` and twice its layers, fp32 or as `layers_config` says, with random weights."""
    plain = dataclasses.replace(model, num_layers=2 * model.num_layers, loop_count=1)
    gpt = GPTModel(
        layers_config(plain),
        layer_spec(plain, resolve_backend(plain)),
        vocab_size,
        sequence_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    for parameter in gpt.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return gpt
