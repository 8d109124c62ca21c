"""What benchmarks/gpu.py times: forward and backward of PLT-2 and of megatron-core's GPT of twice the depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

VOCAB_SIZE = 256  # bytes


def plt_step(config: Any, batch: Any) -> Callable[[], None]:
    from plt_megatron.train.engine import build_stage, wrap_ddp

    stage = build_stage(config, VOCAB_SIZE)
    wrapped = wrap_ddp(stage, overlap_grad_reduce=False)

    def step() -> None:
        stage.set_is_first_microbatch()
        wrapped.zero_grad_buffer()
        wrapped(batch).float().mean().backward()

    return step


def gpt_step(config: Any, batch: Any) -> Callable[[], None]:
    """megatron-core's GPTModel with our attention and norm modules."""
    import torch
    from megatron.core.models.gpt.gpt_model import GPTModel

    from plt_megatron.model.layer_specs import layer_spec
    from plt_megatron.model.transformer_config import DTYPES, resolve_backend, transformer_config
    from plt_megatron.runtime.fp8 import choose_fp8
    from plt_megatron.train.engine import wrap_ddp

    model = dataclasses.replace(config.model, num_layers=2 * config.model.num_layers, loop_count=1)
    layers = transformer_config(model, config.parallel, precision="bf16", fp8=choose_fp8(config))
    gpt = GPTModel(
        layers,
        layer_spec(model, resolve_backend(model)),
        VOCAB_SIZE,
        config.data.sequence_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    ).to(dtype=DTYPES["bf16"], device=torch.cuda.current_device())
    for parameter in gpt.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped = wrap_ddp(gpt, overlap_grad_reduce=False)

    def step() -> None:
        gpt.set_is_first_microbatch()
        wrapped.zero_grad_buffer()
        wrapped(batch.tokens, None, None, labels=batch.labels).float().mean().backward()

    return step
