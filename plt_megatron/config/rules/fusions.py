"""Rules for Megatron-LM's fused operations (`parallel.*_fusion`): when each is possible, and when it is on by default.

All are Transformer Engine's kernels. A setting that is null means on, unless an obstacle below applies; so does
`parallel.overlap_param_gather` (`derived.overlap_obstacle`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig

# Up to 2.17 gradients are rounded to bf16 before the label's 1 is subtracted, so that confident tokens have none; 2.18
# and 2.19 keep them in fp32.
OLDEST_CROSS_ENTROPY = "2.20"


@dataclass(frozen=True)
class Fusions:
    """Fused operations that are on, under megatron-core's names."""

    gradient_accumulation_fusion: bool = False  # weight gradients, once per loop and microbatch
    apply_rope_fusion: bool = False
    cross_entropy_loss_fusion: bool = False  # one kernel per direction, without logits in fp32

    def __str__(self) -> str:
        return ", ".join(name for name in NAMES if getattr(self, name)) or "none"


NAMES = tuple(field.name for field in dataclasses.fields(Fusions))


def obstacles(config: RunConfig, backend: str) -> dict[str, str]:
    """Return fusion -> why it cannot be on with `backend` (`torch` or `te`).

    If Transformer Engine is not installed here, it is taken to be recent.
    """
    if backend != "te":
        return dict.fromkeys(NAMES, "needs Transformer Engine (model.backend=te)")
    if config.deepspeed is not None:
        return dict.fromkeys(NAMES, "is not verified with deepspeed")
    why = {}
    if derived.yarn_factor(config.model) is not None:
        why["apply_rope_fusion"] = "with model.rope_scaling.yarn: the kernel does not scale what it rotates"
    elif config.data.reset_at_document_boundaries:
        why["apply_rope_fusion"] = (
            "with data.reset_at_document_boundaries: the kernel uses one set of positions, packed rows their own"
        )
    if config.training.deterministic:
        why["cross_entropy_loss_fusion"] = "with training.deterministic: Megatron-LM does not vouch for the kernel"
    elif too_old := _older_than(OLDEST_CROSS_ENTROPY):
        why["cross_entropy_loss_fusion"] = (
            f"needs Transformer Engine {OLDEST_CROSS_ENTROPY}, this is {too_old}: before, gradients are imprecise or "
            "logits kept in fp32"
        )
    return why


def _older_than(oldest: str) -> str | None:
    """Return the installed version of Transformer Engine if it is older."""
    from packaging.version import Version

    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None
    return version if Version(version).release < Version(oldest).release else None


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
