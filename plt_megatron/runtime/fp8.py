"""Which FP8 kernels this run uses, given its configuration and this machine's card."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from plt_megatron.config import fp8_rules
from plt_megatron.config.fp8_rules import Fp8Choice
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError

logger = logging.getLogger(__name__)


def choose_fp8(config: RunConfig) -> Fp8Choice | None:
    """What the run computes in FP8; None: nothing.

    Raises:
        UserError: the card has no kernels for it; the message names the rule, one line each.
    """
    if config.training.fp8 == "none":
        return None
    if not torch.cuda.is_available():
        raise UserError(
            f"training.fp8 {config.training.fp8} needs a GPU (Ada, Hopper or Blackwell); set training.fp8=none"
        )
    major, minor = torch.cuda.get_device_capability()
    problems = list(fp8_rules.find_problems(config, (major, minor)))
    choice = fp8_rules.choose(config, (major, minor))
    if problems or choice is None:
        raise UserError("\n".join(problems))
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("%s (sm%d%d): %s", torch.cuda.get_device_name(), major, minor, choice)
    return choice
