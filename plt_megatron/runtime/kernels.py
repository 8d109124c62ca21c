"""Which kernels of Transformer Engine a run uses or lacks, given its configuration and this machine."""

from __future__ import annotations

import importlib.metadata
import logging
import re

import torch
import torch.distributed as dist

from plt_megatron.config.rules import fp8 as fp8_rules
from plt_megatron.config.rules import kernels as kernel_rules
from plt_megatron.config.rules.fp8 import Fp8Choice
from plt_megatron.config.rules.kernels import Version, Versions
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError

logger = logging.getLogger(__name__)


def choose_fp8(config: RunConfig) -> Fp8Choice | None:
    """What the run computes in FP8; None: nothing.

    Raises:
        UserError: the card has no kernels for it; the message names the rule, one line each.
    """
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
        logger.info("%s (sm%d%d): %s", torch.cuda.get_device_name(), major, minor, choice)
    return choice


def check_kernels(config: RunConfig) -> None:
    """Raise `UserError` if Transformer Engine has no kernel for this run with this machine's versions.

    Nothing to check where there is no GPU; Transformer Engine must be usable otherwise.
    """
    if not torch.cuda.is_available():
        return
    problems = list(kernel_rules.find_problems(config, torch.cuda.get_device_capability(), _versions()))
    if problems:
        raise UserError("\n".join(problems))


def _versions() -> Versions:
    from transformer_engine.pytorch.utils import get_cudnn_version

    try:
        flash_attn = _version(importlib.metadata.version("flash-attn"))
    except importlib.metadata.PackageNotFoundError:
        flash_attn = None
    return Versions(cuda=_version(torch.version.cuda or ""), cudnn=tuple(get_cudnn_version()), flash_attn=flash_attn)


def _version(text: str) -> Version | None:
    """(2, 8, 3) of 2.8.3.post1."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(map(int, match[0].split("."))) if match else None
