"""Experts without values: each is taken to get as many tokens as every other.

megatron-core's dispatchers count on the GPU how many tokens go where, and read the counts on the host: splits of an
all-to-all, sizes of what the experts get. Everything else here is theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from plt_megatron.predict.rehearsal.fake_gpu import CUDA
from plt_megatron.predict.rehearsal.observer import Observer


def balance_routing(observer: Observer) -> None:
    """Have the dispatchers read the counts of an even load. For a process that does nothing else."""
    stock_init = Router.__init__
    stock_counts = MoEAlltoAllTokenDispatcher.preprocess
    stock_postprocess = MoEAllGatherTokenDispatcher.dispatch_postprocess

    def make_router(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.device(CUDA):  # stock, it is made on the host and moved, which a fake parameter cannot be
            stock_init(self, *args, **kwargs)

    def preprocess(self: Any, routing_map: Tensor) -> Any:
        stock_counts(self, routing_map)
        by_rank = even_load(routing_map.shape[0], self.config).reshape(self.ep_size, self.num_local_experts)
        own = by_rank[self.ep_rank]  # every rank sends as many
        if self.config.moe_expert_capacity_factor is not None:
            self.num_out_tokens = int(by_rank.sum())
        if self.ep_size > 1:
            self.input_splits = by_rank.sum(axis=1)
            self.output_splits = np.full(self.ep_size, own.sum())
            self.output_splits_tp = None  # an expert is never divided
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = np.tile(own, (self.ep_size, 1))
            chunks = np.arange(self.num_experts)
            self.sort_input_by_local_experts = chunks.reshape(-1, self.num_local_experts).T.ravel()
            self.restore_output_by_local_experts = chunks.reshape(self.num_local_experts, -1).T.ravel()
        return own * self.ep_size

    def dispatch_postprocess(self: Any, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Any, Tensor]:
        by_rank = even_load(hidden_states.shape[0] // self.ep_size, self.config)
        counts = self.ep_size * by_rank.reshape(self.ep_size, self.num_local_experts)[self.ep_rank]
        with observer.counted(int(counts.sum())):
            tokens, _, weights = stock_postprocess(self, hidden_states, probs)
        return tokens, counts, weights

    Router.__init__ = make_router  # type: ignore[method-assign]
    MoEAlltoAllTokenDispatcher.preprocess = preprocess  # type: ignore[method-assign]
    MoEAllGatherTokenDispatcher.dispatch_postprocess = dispatch_postprocess  # type: ignore[method-assign]


def even_load(tokens: int, config: TransformerConfig) -> np.ndarray:
    """How many of a rank's tokens go to each expert, int64 [experts]: as even as can be, and within their capacity."""
    experts, topk, factor = config.num_moe_experts, config.moe_router_topk, config.moe_expert_capacity_factor
    assert experts is not None
    each, left = divmod(tokens * topk, experts)
    counts = np.full(experts, each)
    counts[:left] += 1
    if factor is None:
        return counts
    return counts.clip(max=get_capacity(num_tokens=tokens * topk, num_experts=experts, capacity_factor=factor))
