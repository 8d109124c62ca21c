"""Baseline for PLT-2's speed: megatron-core's GPT of twice the depth.

On the torch backend it has our attention and norm modules, so that the ratio measures the loops' overhead alone. With
Transformer Engine it is megatron-core's own GPT throughout, with everything fused that PLT-2 has fused, and where apex
is installed the output layer's gradient accumulation too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.layer_specs import layer_spec
from plt_megatron.model.transformer_config import PLTTransformerConfig


def deeper_gpt(
    model: ModelConfig,
    layers_config: Callable[[ModelConfig], PLTTransformerConfig],
    vocab_size: int,
    sequence_length: int,
) -> GPTModel:
    """Return a GPTModel of the width of `model` and twice its layers, with random weights, as `layers_config` says."""
    plain = dataclasses.replace(model, num_layers=2 * model.num_layers, loop_count=1)
    config = layers_config(plain)
    te = config.backend == "te"
    spec = get_gpt_layer_with_transformer_engine_spec() if te else layer_spec(plain, config.backend)
    with _output_layer_without_apex():
        gpt = GPTModel(
            config,
            spec,
            vocab_size,
            sequence_length,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
        )
    for parameter in gpt.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return gpt


@contextmanager
def _output_layer_without_apex() -> Iterator[None]:
    """Build megatron-core's ColumnParallelLinear without fused gradient accumulation where apex is missing."""
    stock = ColumnParallelLinear.__init__

    def build(self: ColumnParallelLinear, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.gradient_accumulation_fusion &= layers._grad_accum_fusion_available
        stock(self, *args, config=config, **kwargs)

    ColumnParallelLinear.__init__ = build
    try:
        yield
    finally:
        ColumnParallelLinear.__init__ = stock
