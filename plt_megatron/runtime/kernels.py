"""Choose FP8, kernels and fused operations for a run's configuration and this machine's Transformer Engine."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
import torch.distributed as dist

from plt_megatron.config import derived
from plt_megatron.config.rules import fp8 as fp8_rules
from plt_megatron.config.rules import fusions as fusion_rules
from plt_megatron.config.rules import kernels as kernel_rules
from plt_megatron.config.rules.fusions import Fusions
from plt_megatron.config.rules.kernels import Versions
from plt_megatron.config.schema import Fp8Config, RunConfig
from plt_megatron.errors import UserError

logger = logging.getLogger(__name__)


def choose_fp8(config: RunConfig) -> Fp8Config | None:
    """Choose what the run computes in FP8; None: nothing. Raises `UserError` if the card has no kernels for it, with
    each violated rule in one line."""
    if config.training.fp8 is None:
        return None
    if not torch.cuda.is_available():
        raise UserError("training.fp8 needs a GPU (Ada, Hopper or Blackwell); set training.fp8=null")
    major, minor = torch.cuda.get_device_capability()
    problems = list(fp8_rules.find_problems(config, (major, minor)))
    choice = fp8_rules.choose(config, (major, minor))
    if problems or choice is None:
        raise UserError("\n".join(problems))
    if not dist.is_initialized() or dist.get_rank() == 0:
        card = fp8_rules.card_name((major, minor))
        logger.info("%s (%s): %s", torch.cuda.get_device_name(), card, fp8_rules.in_words(choice))
    return choice


def check_kernels(config: RunConfig) -> None:
    """Raise `UserError` if Transformer Engine has no kernel for this run with this machine's versions.

    Without a GPU there is nothing to check; with one, Transformer Engine must be usable.
    """
    if not torch.cuda.is_available():
        return
    versions, capability = _versions(), torch.cuda.get_device_capability()
    problems = [
        *fp8_rules.find_problems(config, capability),
        *kernel_rules.find_problems(config, capability, versions),
    ]
    if not problems and (lacking := _without_fused_attention(config)):
        what, remedy = lacking
        problems = [
            f"model.backend te: {torch.cuda.get_device_name()} with {versions} has no fused attention for {what}: "
            f"{remedy}"
        ]
    if problems:
        raise UserError("\n".join(problems))


def _without_fused_attention(config: RunConfig) -> tuple[str, str] | None:
    """Return the attention for which Transformer Engine's own selection fails, or falls back to one that holds all
    scores, and what to do; None if there is none."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    model, parallel = config.model, config.parallel
    choice = fp8_rules.choose(config, torch.cuda.get_device_capability())
    fp8 = choice.recipe if choice is not None and choice.attention else None
    known = {field.name for field in dataclasses.fields(utils.AttentionParams)}
    asked = [("", _attention_settings(config, None, parallel.cp_comm_type) | _fp8_attention(fp8))]
    if derived.has_windows(model) and not model.fused_gated_window:
        window = _attention_settings(config, model.window_size, parallel.window_cp_comm_type)
        asked.append((" in a window", window))
    for where, settings in asked:
        params = utils.AttentionParams(**{name: value for name, value in settings.items() if name in known})
        flash, fused, *_ = utils.get_attention_backend(params)[-1]
        if not (flash or fused):
            kind = "packed documents" if config.data.reset_at_document_boundaries else "whole rows"
            what = f"heads of {derived.head_dim(model)} channels, {kind}{where}"
            if settings.get("fp8"):
                return f"training.fp8.attention, {fp8}, {what}", "update cuDNN, or set training.fp8.attention=false"
            return f"{config.training.precision}, {what}", "set model.backend=torch, or install flash-attn"
    return None


def _fp8_attention(recipe: str | None) -> dict[str, Any]:
    """Return what Transformer Engine's `AttentionParams` add for attention in FP8 with this recipe."""
    if recipe is None:
        return {}
    from transformer_engine.common import recipe as recipes

    kinds = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling", "mxfp8": "MXFP8BlockScaling"}
    chosen = getattr(recipes, kinds[recipe])(fp8_dpa=True)
    return {"fp8": True, "fp8_meta": {"recipe": chosen, "local_recipes": [chosen]}}


def _attention_settings(config: RunConfig, window: int | None, exchange: str) -> dict[str, Any]:
    """Return a rank's attention, as `model.te_attention` calls it, in Transformer Engine's `AttentionParams`: lengths
    are those of all context-parallel ranks."""
    model, parallel, data = config.model, config.parallel, config.data
    packed, rows, cp = data.reset_at_document_boundaries, config.training.micro_batch_size, 1
    ranks = parallel.tensor_model_parallel_size
    if packed:  # context-parallel ranks divide the heads, not the rows
        ranks *= parallel.context_parallel_size
    else:
        cp = parallel.context_parallel_size
    return {
        "qkv_dtype": {"bf16": torch.bfloat16, "fp32": torch.float32}[config.training.precision],
        "qkv_layout": "_".join(["thd" if packed else "sbhd"] * 3),
        "batch_size": rows,
        "num_heads": max(1, model.num_attention_heads // ranks),
        "num_gqa_groups": max(1, derived.num_query_groups(model) // ranks),
        **dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), data.sequence_length),
        **dict.fromkeys(("num_tokens_q", "num_tokens_kv"), rows * data.sequence_length if packed else 0),
        **dict.fromkeys(("head_dim_qk", "head_dim_v"), derived.head_dim(model)),
        "attn_mask_type": "padding_causal" if packed else "causal",
        "window_size": (-1 if window is None else window - 1, 0),
        "bottom_right_diagonal": False,
        "softmax_scale": 1 / math.sqrt(derived.head_dim(model)),
        "context_parallel": cp > 1,
        "cp_comm_type": exchange if cp > 1 else "p2p",
        "cp_size": cp,
        "core_attention_bias_requires_grad": False,  # there is no bias, but it would be assumed
        "deterministic": config.training.deterministic,
    }


def _versions() -> Versions:
    from packaging.version import parse
    from transformer_engine.pytorch.attention.dot_product_attention.utils import FlashAttentionUtils
    from transformer_engine.pytorch.utils import get_cudnn_version

    # Not one that is installed but outside of the range that Transformer Engine takes.
    flash_attn = parse(str(FlashAttentionUtils.version)).release if FlashAttentionUtils.is_installed else None
    cuda = None if torch.version.cuda is None else parse(torch.version.cuda).release
    return Versions(cuda=cuda, cudnn=tuple(get_cudnn_version()), flash_attn=flash_attn)


def choose_fusions(config: RunConfig, backend: str, vocab_size: int) -> Fusions:
    """Choose what the run fuses, with `backend` (`torch` or `te`) and a vocabulary of `vocab_size` tokens. Raises
    `UserError` if a requested fusion is not possible, one line each."""
    why = fusion_rules.obstacles(config, backend)
    if "cross_entropy_loss_fusion" not in why:
        why |= _cross_entropy_obstacle(config, vocab_size)
    problems = list(fusion_rules.refusals(config, why))
    if problems:
        raise UserError("\n".join(problems))
    choice = fusion_rules.choose(config, why)
    if backend == "te" and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.info("fused: %s", choice)
    return choice


def _cross_entropy_obstacle(config: RunConfig, vocab_size: int) -> dict[str, str]:
    tp = config.parallel.tensor_model_parallel_size
    rows = derived.padded_vocab_size(config.model, vocab_size, tp) // tp
    if vocab_size > (tp - 1) * rows:
        return {}
    why = f"with a vocabulary of {vocab_size} padded to {tp} x {rows}: the last rank would have only padding"
    return {"cross_entropy_loss_fusion": why}
