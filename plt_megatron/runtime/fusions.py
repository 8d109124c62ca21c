"""Which fused operations this run uses, given its configuration and this machine's Transformer Engine."""

from __future__ import annotations

import logging

import torch.distributed as dist

from plt_megatron.config import derived
from plt_megatron.config.rules import fusions as fusion_rules
from plt_megatron.config.rules.fusions import Fusions
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError

logger = logging.getLogger(__name__)
# Before it, backward read the gradients of a batch's losses in the order of their memory, which a transpose changes.
OLDEST_CROSS_ENTROPY = "2.11"


def choose_fusions(config: RunConfig, backend: str, vocab_size: int) -> Fusions:
    """What the run fuses, with `backend` (`torch` or `te`) and a vocabulary of so many tokens.

    Raises:
        UserError: a fusion that is asked for is not possible, one line each.
    """
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
    from megatron.core.utils import get_te_version, is_te_min_version

    tp = config.parallel.tensor_model_parallel_size
    rows = derived.padded_vocab_size(config.model, vocab_size, tp) // tp
    if not is_te_min_version(OLDEST_CROSS_ENTROPY):
        why = f"needs Transformer Engine {OLDEST_CROSS_ENTROPY}, this is {get_te_version()}: wrong gradients before"
    elif vocab_size <= (tp - 1) * rows:
        why = f"with a vocabulary of {vocab_size} padded to {tp} x {rows}: the last rank would have no token at all"
    else:
        return {}
    return {"cross_entropy_loss_fusion": why}
