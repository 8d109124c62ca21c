"""The two attentions of a PLT layer on Transformer Engine's kernels.

The global one follows the configuration, FP8 included; the local one is a second TEDotProductAttention whose window
is set at construction and which always computes in BF16, since Hopper has no FP8 sliding-window kernel. Under context
parallelism each exchanges rows in its own way; both keep megatron-core's zigzag order. They cannot exchange packed
documents, since they would divide each document among the ranks, not the row; instead the ranks divide the heads.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from plt_megatron.errors import UserError
from plt_megatron.model.context_parallel import SequenceShard
from plt_megatron.model.loop_context import Documents
from plt_megatron.model.transformer_config import PLTTransformerConfig
from plt_megatron.runtime.doctor import OLDEST_TRANSFORMER_ENGINE


def require_transformer_engine() -> None:
    """Raise `UserError` unless Transformer Engine can be used.

    Without it megatron-core's TE classes are mocks that silently compute nothing.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.utils import get_te_version, is_te_min_version

    if not HAVE_TE:
        raise UserError(
            "model.backend: te needs a GPU and Transformer Engine (pip install 'plt-megatron[gpu]'), or use "
            "model.backend: torch"
        )
    if not is_te_min_version(OLDEST_TRANSFORMER_ENGINE):
        raise UserError(
            f"model.backend: te needs Transformer Engine {OLDEST_TRANSFORMER_ENGINE} (NGC containers from 25.11 on), "
            f"this is {get_te_version()}: update it, or use model.backend: torch"
        )


class TEAttention(nn.Module):
    """One causal TEDotProductAttention over [s, b, heads, d], optionally within a window.

    Transformer Engine caches only the last call's choice of kernels. A layer's two attentions alternate, so each kind
    has its own cache, which all layers share.
    """

    _selections: ClassVar[dict[bool, dict[str, Any]]] = {}

    def __init__(self, window_size: int | None, *, config: PLTTransformerConfig, **kwargs: Any) -> None:
        super().__init__()
        require_transformer_engine()
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        config = copy.copy(config)
        config.window_size = None if window_size is None else (window_size - 1, 0)
        config.window_attn_skip_freq = None
        self.local = window_size is not None
        self.rows = SequenceShard.of(kwargs["pg_collection"], sequence_parallel=False)
        self.divides_heads = config.packed_documents and self.rows.size > 1
        if self.divides_heads:  # TE then computes some heads over whole rows, and exchanges nothing
            config.context_parallel_size = 1
            config.num_attention_heads //= self.rows.size
            config.num_query_groups //= self.rows.size
        elif config.context_parallel_size > 1:
            kwargs["cp_comm_type"] = config.window_cp_comm_type if self.local else config.cp_comm_type
        causal = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
        self.attention = TEDotProductAttention(config=config, **causal, **kwargs)

    def lay_out(self, tensor: Tensor, documents: Documents | None) -> Tensor:
        """Lay out a tensor [s, b, heads, d] so that the kernels read it without a copy: V is a part of each row of the
        fused projection, and packed documents are read row after row."""
        if documents is None:
            return tensor.contiguous()
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def prepare(self, documents: Documents | None, *own: Tensor) -> tuple[Tensor, ...]:
        """Return K and V, or one of them, as a global attention takes them: with some of the heads over whole rows, if
        ranks divide the heads."""
        if self.divides_heads:
            own = self.rows.to_heads(*own)
        return tuple(self.lay_out(tensor, documents) for tensor in own)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """query [s / CP, b, heads, d], key and value [s / CP, b, groups, d] -> [s / CP, b, heads, d].

        The global attention takes keys and values as `prepare` returns them.
        """
        assert self.rows.size == 1 or self.divides_heads == (documents is not None)
        if not self.divides_heads:
            return self._attend(query, key, value, documents)
        if self.local:
            query, key, value = self.prepare(documents, query, key, value)
        else:
            (query,) = self.prepare(documents, query)
        return self.rows.from_heads(self._attend(query, key, value, documents))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        s, b, heads, d = query.shape
        packed = None
        if documents is not None:
            # Rows laid end to end: [b * s, heads, d], one entry of cu_seqlens per document.
            query, key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
            longest = max(documents.lengths)
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=documents.cu_seqlens,
                cu_seqlens_kv=documents.cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        mask = AttnMaskType.causal if packed is None else AttnMaskType.padding_causal
        with self._precision(), self._own_selection():
            out = self.attention(query, key, value, None, attn_mask_type=mask, packed_seq_params=packed)
        if packed is not None:
            return out.view(b, s, heads, d).transpose(0, 1)
        return out.view(s, b, heads, d)

    @contextlib.contextmanager
    def _own_selection(self) -> Iterator[None]:
        from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as module

        common = module._attention_backends
        module._attention_backends = self._selections.setdefault(self.local, dict.fromkeys(common))
        try:
            yield
        finally:
            module._attention_backends = common

    def _precision(self) -> contextlib.AbstractContextManager:
        if not self.local:
            return contextlib.nullcontext()
        import transformer_engine.pytorch as te

        return te.autocast(enabled=False)
