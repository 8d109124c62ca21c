"""Keys of the previous token (`model.key_shift`): a query then finds what followed an earlier copy of its own token.

An induction head needs keys that know the token before theirs; here some of each key is that token's, so that one layer
suffices. The first token of a text has zeros there. Keys are shifted after their norm and before RoPE, in every loop:
RoPE still turns them by the position that they are found at, and later loops attend to the first loop's shifted keys.

- heads: whole keys of the second half of the key/value groups
- channels: of every key, the half of the channels that RoPE turns slowly ("partial key offset" of the nanoGPT speed
  records)
- learned: k_t becomes k_t + a (k_(t-1) - k_t), and v_t the same with b, a scalar each for a group, zero at first, so
  that an imported model stays as it is ("KV shifting attention", arXiv 2411.19574; its scale is the projection's)
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
from plt_megatron.model.shift import shift


class KeyShift(nn.Module):
    """Shifts K, and V where that is learned, of this tensor-parallel rank's groups and context-parallel rank's rows.

    Learned factors `key` and `value` [groups] are whole on every rank: their gradients are summed over the ranks in the
    backward pass, also where there are fewer groups than ranks.
    """

    def __init__(self, config: TransformerConfig, plt: ModelConfig, pg_collection: Any) -> None:
        super().__init__()
        self.form = plt.key_shift
        self.rows = SequenceShard.of(pg_collection, sequence_parallel=False)
        self.tp_group = pg_collection.tp
        groups = config.num_query_groups
        assert groups is not None
        first = self.tp_group.rank() * groups // self.tp_group.size()
        self.groups = range(first, first + max(groups // self.tp_group.size(), 1))  # among the whole model's
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
            quarters = key.unflatten(-1, (2, 2, -1))  # RoPE turns channel i with i + d / 2, the slower the larger i
            slow = self._before(quarters[..., 1, :], context)
            key = torch.stack((quarters[..., 0, :], slow), dim=-2).flatten(-3)
        else:
            key, value = self._mixed(key, self.key, context), self._mixed(value, self.value, context)
        return key, value

    def _mixed(self, own: Tensor, factors: Tensor, context: LoopContext) -> Tensor:
        whole = copy_to_tensor_model_parallel_region(factors, group=self.tp_group)
        return torch.lerp(own, self._before(own, context), whole[self.groups.start : self.groups.stop, None])

    def _before(self, part: Tensor, context: LoopContext) -> Tensor:
        """The previous token's of each token of its document, zero for the first; [s / CP, b, ...]."""
        starts = None if context.documents is None else context.documents.starts
        return shift(part, starts, self.rows)
