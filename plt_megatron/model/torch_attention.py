"""Causal and sliding-window attention in plain torch, for CPUs and for GPUs without Transformer Engine.

The causal one is torch's fused kernel. The local one costs O(n * w): blocks of `w` queries against the `2w` keys
that they can see, never an n x n score matrix. Packed documents do not see each other.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from plt_megatron.model.loop_context import Documents


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float | None = None, documents: Documents | None = None
) -> Tensor:
    """softmax(Q K^T * scale) V over the keys up to and including each query's own.

    Args:
        query: [s, b, heads, d].
        key, value: [s, b, groups, d]; a group serves heads / groups consecutive heads (GQA), without being repeated.
        softmax_scale: default d ** -0.5.
        documents: where given, a query sees its own document only.

    Returns:
        [s, b, heads, d].
    """
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, d]
    if documents is None:
        return _fused_causal(query, key, value, softmax_scale).permute(2, 0, 1, 3)
    rows = []
    lengths = iter(documents.lengths)
    for row in range(query.shape[0]):
        parts, start = [], 0
        while start < query.shape[2]:
            span = slice(start, start + next(lengths))
            start = span.stop
            one = slice(row, row + 1)
            parts.append(_fused_causal(query[one, :, span], key[one, :, span], value[one, :, span], softmax_scale))
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows).permute(2, 0, 1, 3)


def _fused_causal(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=grouped)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_size: int,
    softmax_scale: float | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Sliding-window attention: a query sees the last `window_size` keys, its own included (paper section 3.3).

    Shapes and `documents` as in `causal_attention`. Time and memory are O(s * window_size): each block of w queries is
    multiplied with its own block of keys and the one before it. Blocks lie outermost in memory, so that "the block
    before" is a view.
    """
    s, b, heads, d = query.shape
    w = window_size
    if w >= s:
        return causal_attention(query, key, value, softmax_scale=softmax_scale, documents=documents)
    groups = key.shape[2]
    per_group = heads // groups
    blocks = -(-s // w)
    batch = blocks * b * groups
    # The queries of one group share its keys in one product: [blocks * b * groups, per_group * w, d].
    query = _in_blocks(query, blocks, w, groups).reshape(batch, per_group * w, d)
    keys, values = (_with_empty_block(_in_blocks(tensor, blocks, w, groups)) for tensor in (key, value))
    bias_before, bias_own = _window_bias(b, groups, per_group, w, blocks, s, documents, query)
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    before = torch.baddbmm(bias_before, query, keys[:batch].transpose(1, 2), alpha=scale)
    own = torch.baddbmm(bias_own, query, keys[-batch:].transpose(1, 2), alpha=scale)
    weights = torch.cat((before, own), dim=-1).softmax(dim=-1)
    out = torch.baddbmm(torch.bmm(weights[..., :w], values[:batch]), weights[..., w:], values[-batch:])
    out = out.view(blocks, b, heads, w, d).permute(0, 3, 1, 2, 4)
    return out.reshape(blocks * w, b, heads, d)[:s]


def _in_blocks(tensor: Tensor, blocks: int, w: int, groups: int) -> Tensor:
    """[s, b, groups * r, d] -> [blocks, b, groups, r * w, d], padded with zeros to whole blocks; one copy."""
    s, b, heads, d = tensor.shape
    if blocks * w > s:
        tensor = F.pad(tensor, (0, 0, 0, 0, 0, 0, 0, blocks * w - s))
    tensor = tensor.reshape(blocks, w, b, groups, heads // groups, d)
    return tensor.permute(0, 2, 3, 4, 1, 5).reshape(blocks, b, groups, heads // groups * w, d)


def _with_empty_block(tensor: Tensor) -> Tensor:
    """[blocks, b, groups, w, d] -> [(blocks + 1) * b * groups, w, d]: a block of zeros stands before the first."""
    return torch.cat((torch.zeros_like(tensor[:1]), tensor)).flatten(0, 2)


def _window_bias(
    b: int, groups: int, per_group: int, w: int, blocks: int, s: int, documents: Documents | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """0 where a query of a block sees a key of the block before it, and of its own block; -inf elsewhere.

    Query i of a block sees key j of the block before if j > i, of its own if j <= i; of its own document only, and
    nothing before the first block. Each is broadcastable to [blocks * b * groups, per_group * w, w].
    """
    if documents is None:
        return _causal_bias(b * groups, per_group, w, blocks, like.dtype, like.device)
    i = torch.arange(w, device=like.device)
    segments = F.pad(documents.segments, (w, blocks * w - s), value=-1).unflatten(1, (blocks + 1, w)).transpose(0, 1)
    of_queries = segments[1:, :, :, None]  # [blocks, b, w, 1]
    same_before, same_own = of_queries == segments[:-1, :, None, :], of_queries == segments[1:, :, None, :]
    seen = (same_before & (i[None, :] > i[:, None]), same_own & (i[None, :] <= i[:, None]))
    before, own = (
        part[:, :, None, None].expand(blocks, b, groups, per_group, w, w).reshape(-1, per_group * w, w) for part in seen
    )
    return _as_bias(before, like.dtype), _as_bias(own, like.dtype)


@lru_cache(maxsize=8)
def _causal_bias(
    rows: int, per_group: int, w: int, blocks: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`_window_bias` without documents: the same for every layer, loop and step."""
    i = torch.arange(w, device=device)
    own = (i[None, :] <= i[:, None]).repeat(per_group, 1)[None]
    before = (~own).expand(blocks, -1, -1).clone()
    before[0] = False
    return _as_bias(before.repeat_interleave(rows, dim=0), dtype), _as_bias(own, dtype)


def _as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
