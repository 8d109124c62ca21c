"""Attention probabilities, recomputed from queries and keys in blocks of queries: their entropy and divergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plt_megatron.experiments.diagnostics.measures import BLOCK_ELEMENTS


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention of one layer in one loop.

    Attributes:
        query: [H, T, D], after RoPE.
        key: [K, T, D], K divides H: head h reads key h // (H / K).
        scaling: of the scores.
        window: keys a query sees, itself included; None: all.
    """

    query: Tensor
    key: Tensor
    scaling: float
    window: int | None = None

    def log_probabilities(self, rows: slice, keys: slice, mask: Tensor) -> Tensor:
        """Of the queries over the keys, float32 [H, rows, keys]; `mask` [rows, keys]: which keys they see."""
        heads = self.key.shape[0]
        query = self.query[:, rows].float().unflatten(0, (heads, -1))
        scores = torch.einsum("kgqd,knd->kgqn", query, self.key[:, keys].float()) * self.scaling
        return scores.masked_fill(~mask, -torch.inf).log_softmax(-1).flatten(0, 1)


def attention_statistics(
    attention: Attention, previous: Attention | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Means over queries, in nats and float64, for each head [H]: the entropy of the attention, and
    KL(attention || previous); None without `previous`, which has the same shape and window.

    Args:
        documents: int [T], the document of each token, which sees no other; None: one document.
    """
    heads, tokens, _ = attention.query.shape
    entropy = torch.zeros(heads, dtype=torch.float64, device=attention.query.device)
    divergence = None if previous is None else torch.zeros_like(entropy)
    assert previous is None or previous.window == attention.window
    reach = tokens if attention.window is None else min(attention.window, tokens)
    block = max(1, min(tokens, BLOCK_ELEMENTS // (heads * reach)))
    for first in range(0, tokens, block):
        rows = slice(first, min(first + block, tokens))
        keys = slice(max(0, first - reach + 1), rows.stop)
        mask = _seen(rows, keys, reach, documents, attention.query.device)
        logs = attention.log_probabilities(rows, keys, mask)
        probabilities = logs.exp()
        entropy += torch.special.entr(probabilities).sum((-1, -2), dtype=torch.float64)
        if previous is not None and divergence is not None:
            ratio = logs - previous.log_probabilities(rows, keys, mask)
            terms = torch.where(probabilities > 0, probabilities * ratio, 0.0)
            divergence += terms.sum((-1, -2), dtype=torch.float64)
    return entropy / tokens, None if divergence is None else (divergence / tokens).clamp(min=0)


def _seen(rows: slice, keys: slice, reach: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Bool [rows, keys]: whether a query sees a key."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None]
    seen = (j <= i) & (i - j < reach)
    return seen if documents is None else seen & (documents[rows, None] == documents[None, keys])
