"""Causal and sliding-window attention in plain torch, for CPUs and for GPUs without Transformer Engine.

The causal one is torch's fused kernel. The local one costs O(n * w): blocks of `w` queries against the `2w` keys
that they can see, never an n x n score matrix. Packed documents do not see each other.
"""

from __future__ import annotations

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

    Shapes and `documents` as in `causal_attention`. Time and memory are O(s * window_size).
    """
    s, b, heads, d = query.shape
    if window_size >= s:
        return causal_attention(query, key, value, softmax_scale=softmax_scale, documents=documents)
    groups = key.shape[2]
    blocks = -(-s // window_size)
    padding = blocks * window_size - s
    if padding:
        query, key, value = (F.pad(tensor, (0, 0, 0, 0, 0, 0, 0, padding)) for tensor in (query, key, value))
    per_group = heads // groups
    # [b, groups, blocks, heads per group * w, d]: the queries of one group share its keys in one product.
    query = query.reshape(blocks, window_size, b, groups, per_group, d).permute(2, 3, 0, 4, 1, 5)
    query = query.reshape(b * groups * blocks, per_group * window_size, d)
    keys, values = (_two_blocks(tensor, blocks, window_size) for tensor in (key, value))
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    bias = _window_bias(s, blocks, window_size, documents, query)  # [1 or b, blocks, w, 2w]
    scores = _biased_scores(query, keys, bias, (b, groups, blocks, per_group), scale)
    out = torch.bmm(scores.softmax(dim=-1), values)
    out = out.view(b, groups, blocks, per_group, window_size, d).permute(2, 4, 0, 1, 3, 5)
    return out.reshape(blocks * window_size, b, heads, d)[:s]


def _two_blocks(tensor: Tensor, blocks: int, window_size: int) -> Tensor:
    """[blocks * w, b, groups, d] -> [b * groups * blocks, 2w, d]: each block behind the one before it."""
    _, b, groups, d = tensor.shape
    tensor = tensor.view(blocks, window_size, b, groups, d)
    previous = F.pad(tensor[:-1], (0, 0, 0, 0, 0, 0, 0, 0, 1, 0))
    both = torch.cat((previous, tensor), dim=1)
    return both.permute(2, 3, 0, 1, 4).reshape(b * groups * blocks, 2 * window_size, d)


def _biased_scores(query: Tensor, keys: Tensor, bias: Tensor, sizes: tuple[int, int, int, int], scale: float) -> Tensor:
    b, groups, blocks, per_group = sizes
    w = bias.shape[-2]
    expanded = bias[:, None, :, None].expand(b, groups, blocks, per_group, w, 2 * w)
    expanded = expanded.reshape(b * groups * blocks, per_group * w, 2 * w)
    return torch.baddbmm(expanded, query, keys.transpose(1, 2), alpha=scale)


def _window_bias(s: int, blocks: int, w: int, documents: Documents | None, like: Tensor) -> Tensor:
    """0 where query i of a block sees key j of the two blocks, -inf elsewhere: [1 or b, blocks, w, 2w].

    Query i of block k is token k*w + i, key j is token (k-1)*w + j; it is seen when i < j <= i + w, when it is a real
    token (block 0 has none before it) and of the same document. Padded queries see themselves, so that no row is empty.
    """
    device = like.device
    i = torch.arange(w, device=device)[:, None]
    j = torch.arange(2 * w, device=device)[None, :]
    seen = ((j > i) & (j <= i + w)).expand(1, blocks, w, 2 * w)
    first = (torch.arange(blocks, device=device) == 0)[None, :, None, None]
    seen = seen & ~(first & (j < w))
    if documents is not None:
        segments = F.pad(documents.segments, (w, blocks * w - s), value=-1)  # [b, w + blocks * w]
        of_queries = segments[:, w:].unflatten(1, (blocks, w))
        of_keys = segments.unfold(1, 2 * w, w)  # [b, blocks, 2w]
        seen = seen & (of_queries[..., :, None] == of_keys[..., None, :])
    return torch.zeros(seen.shape, dtype=like.dtype, device=device).masked_fill_(~seen, float("-inf"))
