"""Steps that benchmarks/gpu.py times: forward and backward of PLT-2 and of megatron-core's GPT of twice the depth.

Both have the throughput switches of `config`; GPT has megatron-core's own modules, and its defaults too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

VOCAB_SIZE = 256  # bytes


def plt_step(config: Any, batch: Any) -> Callable[[], None]:
    from plt_megatron.model.build import build_stage
    from plt_megatron.model.pipeline import renew_weight_copies
    from plt_megatron.train.megatron_engine import wrap_ddp, zero_gradients

    stage = build_stage(config, VOCAB_SIZE)
    wrapped = wrap_ddp(stage, overlap_grad_reduce=False)

    def step() -> None:
        renew_weight_copies(stage)
        zero_gradients(wrapped)
        wrapped(batch).float().mean().backward()

    return step


def gpt_step(config: Any, batch: Any, graphs: bool = False) -> Callable[[], None]:
    """Return a step of GPT; `graphs` captures each layer as a CUDA graph after the first, as megatron-core does."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer import cuda_graphs

    from benchmarks.deeper_gpt import deeper_gpt
    from plt_megatron.model.transformer_config import DTYPES, resolve_backend, transformer_config
    from plt_megatron.runtime.kernels import choose_fp8, choose_fusions
    from plt_megatron.train.megatron_engine import wrap_ddp

    fusions = choose_fusions(config, resolve_backend(config.model, config.training.precision), VOCAB_SIZE)
    how = {"precision": "bf16", "fp8": choose_fp8(config), "fusions": fusions}
    if graphs:  # a captured layer needs a random state that graphs can advance
        tensor_parallel.model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=True, force_reset_rng=True)

    def layers_config(model: Any) -> Any:
        layers = transformer_config(model, parallel=config.parallel, **how)
        if not graphs:
            return layers
        # A finished configuration has already derived the inference scope from the other setting.
        return dataclasses.replace(layers, cuda_graph_impl="local", inference_cuda_graph_scope=None)

    gpt = deeper_gpt(config.model, layers_config, VOCAB_SIZE, config.data.sequence_length)
    gpt = gpt.to(dtype=DTYPES["bf16"], device=torch.cuda.current_device())
    wrapped = wrap_ddp(gpt, overlap_grad_reduce=False)

    def step() -> None:
        gpt.set_is_first_microbatch()
        wrapped.zero_grad_buffer()
        wrapped(batch.tokens, None, None, labels=batch.labels).float().mean().backward()
        if graphs:
            cuda_graphs.create_cudagraphs()  # does nothing once they exist

    return step
