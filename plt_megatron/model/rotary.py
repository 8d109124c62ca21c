"""megatron-core's rotary position embeddings: plain, with Llama 3.1's scaling or with YaRN's (arXiv 2309.00071)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from torch import Tensor

from plt_megatron.model.transformer_config import PLTTransformerConfig


class _YarnAngles(YarnRotaryEmbedding):
    """megatron-core's YaRN embedding without the cosine and sine tables, which only its inference reads."""

    def _set_cos_sin_cache(self, *args: Any, **kwargs: Any) -> None:
        pass


class RotaryAngles:
    """Rotation angles of a head's channels, by position.

    Args:
        config: the layers' configuration; attention itself applies YaRN's factor (`yarn_rotary_scaling_factor`).
        cp_group: ranks that share a sequence.
    """

    def __init__(self, config: PLTTransformerConfig, cp_group: dist.ProcessGroup) -> None:
        settings: dict[str, Any] = {
            "kv_channels": config.kv_channels,
            "rotary_percent": 1.0,
            "rotary_base": config.plt.rotary_base,
            "use_cpu_initialization": config.use_cpu_initialization,
            "cp_group": cp_group,
        }
        scaling = config.plt.rope_scaling
        kind: type[RotaryEmbedding] = RotaryEmbedding
        if scaling is not None and scaling.yarn is not None:
            kind = _YarnAngles
            settings |= {"scaling_factor": scaling.factor, **dataclasses.asdict(scaling.yarn)}
        elif scaling is not None:
            settings |= {"rope_scaling": True, "rope_scaling_factor": scaling.factor}
        self._embedding = kind(**settings)

    def __call__(self, length: int, whole: bool = False) -> Tensor:
        """Return the angles, float32 [length (/ CP), 1, 1, head_dim]; with `whole`, those of the whole row instead of
        this rank's part."""
        angles = self._embedding(length, packed_seq=whole)
        return angles[0] if isinstance(angles, tuple) else angles
