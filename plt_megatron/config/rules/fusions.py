"""Rules for Megatron-LM's fused operations (`parallel.*_fusion`): when each is possible, and when it is on by default.

All are Transformer Engine's kernels. A setting that is null means on, unless an obstacle below applies; so does
`parallel.overlap_param_gather` (`derived.overlap_obstacle`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig


@dataclass(frozen=True)
class Fusions:
    """Fused operations that are on, under megatron-core's names.

    Attributes:
        gradient_accumulation_fusion: the matmul of a linear layer's weight gradient adds directly to the fp32 gradient
            buffer, once per loop and microbatch.
        apply_rope_fusion: RoPE in one kernel.
        cross_entropy_loss_fusion: cross-entropy in one kernel per direction, without logits in fp32.
    """

    gradient_accumulation_fusion: bool = False
    apply_rope_fusion: bool = False
    cross_entropy_loss_fusion: bool = False

    def __str__(self) -> str:
        return ", ".join(name for name in NAMES if getattr(self, name)) or "none"


NAMES = tuple(field.name for field in dataclasses.fields(Fusions))


def obstacles(config: RunConfig, backend: str) -> dict[str, str]:
    """Return fusion -> why it cannot be on with `backend` (`torch` or `te`)."""
    if backend != "te":
        return dict.fromkeys(NAMES, "needs Transformer Engine (model.backend=te)")
    if config.deepspeed is not None:
        return dict.fromkeys(NAMES, "is not verified with deepspeed")
    if derived.yarn_factor(config.model) is not None:
        return {"apply_rope_fusion": "with model.rope_scaling.yarn: the kernel does not scale what it rotates"}
    if config.data.reset_at_document_boundaries:
        why = "with data.reset_at_document_boundaries: the kernel uses one set of positions, packed rows their own"
        return {"apply_rope_fusion": why}
    return {}


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield requested fusions and overlaps that are not possible, one line each; Transformer Engine is taken to be
    there."""
    why = obstacles(config, derived.backend(config.model, config.training.precision, have_te=True))
    overlap = derived.overlap_obstacle(config)
    return refusals(config, why | ({} if overlap is None else {"overlap_param_gather": overlap}))


def refusals(config: RunConfig, why: dict[str, str]) -> Iterator[str]:
    """Yield a line for each requested setting of `parallel` that has an obstacle."""
    for name, obstacle in why.items():
        if getattr(config.parallel, name):
            yield f"parallel.{name} {obstacle}; set parallel.{name}=null (on where possible) or false"


def choose(config: RunConfig, why: dict[str, str]) -> Fusions:
    """Return the fusions that are on, given the obstacles."""
    return Fusions(**{name: getattr(config.parallel, name) is not False and name not in why for name in NAMES})
