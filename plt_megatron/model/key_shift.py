"""Keys shifted by one token (`model.key_shift`), so that a query finds what followed an earlier copy of its own token.

An induction head needs keys that know the token before theirs; here part of the keys comes from that token, so that one
layer suffices. For the first token of a text that part is zero. Keys are shifted after their norm and before RoPE, in
every loop: RoPE still rotates them by the position they end up at, and later loops attend to the first loop's shifted
keys.

- heads: whole keys of the second half of the key/value groups
- channels: in every key, the half of the channels that RoPE rotates slowly ("partial key offset" of the nanoGPT speed
  records)
- learned: k_t becomes k_t + a (k_(t-1) - k_t), and v_t likewise with b; a and b are scalars per group, initially zero,
  so that an imported model is unchanged ("KV shifting attention", arXiv 2411.19574; the projection covers its scale)
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.context_parallel import SequenceShard
from plt_megatron.model.loop_context import LoopContext
from plt_megatron.model.loop_input import shift


class KeyShift(nn.Module):
    """Shift of K, and of V if learned, for this tensor-parallel rank's groups and this context-parallel rank's rows.

    The learned factors `key` and `value` [groups] are replicated on every rank: the backward pass sums their gradients
    over the ranks, also if there are fewer groups than ranks.
    """

    def __init__(self, config: TransformerConfig, plt: ModelConfig, pg_collection: Any) -> None:
        super().__init__()
        self.form = plt.key_shift
        self.rows = SequenceShard.of(pg_collection, sequence_parallel=False)
        self.tp_group = pg_collection.tp
        groups = config.num_query_groups
        assert groups is not None
        first = self.tp_group.rank() * groups // self.tp_group.size()
        self.groups = range(first, first + max(groups // self.tp_group.size(), 1))  # this rank's, of the whole model's
        self.first_shifted = groups // 2
        if self.form == "learned":
            kwargs: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
            self.key, self.value = (nn.Parameter(torch.zeros(groups, **kwargs)) for _ in range(2))

    def forward(self, key: Tensor, value: Tensor, context: LoopContext) -> tuple[Tensor, Tensor]:
        """key and value [s / CP, b, groups / TP, d], before RoPE -> the same."""
        if self.form == "heads":
            kept = min(max(self.first_shifted - self.groups.start, 0), len(self.groups))
            if kept < len(self.groups):
                key = torch.cat((key[:, :, :kept], self._before(key[:, :, kept:], context)), dim=2)
        elif self.form == "channels":
            quarters = key.unflatten(-1, (2, 2, -1))  # RoPE rotates pairs (i, i + d / 2), slower for larger i
            slow = self._before(quarters[..., 1, :], context)
            key = torch.stack((quarters[..., 0, :], slow), dim=-2).flatten(-3)
        else:
            key, value = self._mixed(key, self.key, context), self._mixed(value, self.value, context)
        return key, value

    def _mixed(self, own: Tensor, factors: Tensor, context: LoopContext) -> Tensor:
        whole = copy_to_tensor_model_parallel_region(factors, group=self.tp_group)
        return torch.lerp(own, self._before(own, context), whole[self.groups.start : self.groups.stop, None])

    def _before(self, part: Tensor, context: LoopContext) -> Tensor:
        """Return the previous token's `part` for each token of a document, zero for the first; [s / CP, b, ...]."""
        starts = None if context.documents is None else context.documents.starts
        return shift(part, starts, self.rows)
