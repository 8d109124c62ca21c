"""Loads the model to diagnose from a run, a checkpoint or an export, as the exported model's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from plt_megatron.errors import UserError
from plt_megatron.hf.config_keys import plt_keys
from plt_megatron.hf.sources import PRECISIONS, ModelSource, open_source
from plt_megatron.hf.tokenizer_files import check_vocabulary
from plt_megatron.hf.verification import fill_export


def open_model(path: Path, tokenizer: Path | None = None) -> ModelSource:
    """A run, a checkpoint or a Hugging Face folder, its tokenizer checked against its vocabulary.

    Raises:
        UserError: there is no complete model at `path`, its layers do not all loop, or the tokenizer belongs to another
            one.
    """
    source = open_source(path, tokenizer)
    model = source.model
    if model.loop_span is not None or model.loop_order != "stack":
        name = "loop_span" if model.loop_span is not None else "loop_order"
        raise UserError(
            f"{path}: model.{name} {getattr(model, name)}: the diagnostics are of models whose layers all loop, as one"
        )
    if source.tokenizer is not None:
        fingerprint = source.progress.get("data_fingerprint") or {}
        check_vocabulary(source.tokenizer, source.vocab_size, fingerprint.get("tokenizer"))
    return source


def build_model(source: ModelSource, *, precision: str, device: str) -> Any:
    """A `PLTForCausalLM` in evaluation mode with the source's weights, read one tensor at a time.

    Args:
        precision: `fp32` or `bf16`; measures are computed in fp32 and fp64 all the same.
        device: `cpu`, `cuda`, or `auto`: a GPU if there is one.

    Raises:
        UserError: `cuda` is requested but not available, or the weights do not fit the settings.
    """
    from plt_megatron.hf.configuration_plt import PLTConfig
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = plt_keys(source.model, source.vocab_size, source.max_position_embeddings, source.tokens, "float32")
    config = PLTConfig.from_dict(keys)
    config._attn_implementation = "sdpa"
    model: Any = PLTForCausalLM(config)
    model.to(PRECISIONS[precision]).eval()
    fill_export(model, source)
    return model.requires_grad_(False).to(device)
