"""Causal and sliding-window attention in plain torch, for CPUs and for GPUs without Transformer Engine.

Causal attention is torch's fused kernel. Window attention costs O(n * w): blocks of `w` queries against the `2w` keys
that they can see, never an n x n score matrix. Packed documents do not see each other. Under context parallelism the
queries are runs of a sequence's rows: the same attention, without queries and keys that see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from plt_megatron.model.loop_context import Documents

_MASKED_ROWS = 512  # queries per mask, for a kernel that needs one


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float | None = None,
    documents: Documents | None = None,
    runs: Sequence[range] | None = None,
) -> Tensor:
    """Compute softmax(Q K^T * scale) V over the keys up to and including each query's own.

    Args:
        query: [rows, b, heads, d].
        key, value: [s, b, groups, d]; a group serves heads / groups consecutive heads (GQA), without being repeated.
        softmax_scale: default d ** -0.5.
        documents: if given, those of the whole sequence; a query sees only its own.
        runs: positions of the queries in the sequence; None: they are all of it.

    Returns:
        [rows, b, heads, d].
    """
    query, key, value = (aligned(tensor).permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, rows, d]
    if documents is None and runs is None:
        return _fused_causal(query, key, value, softmax_scale).permute(2, 0, 1, 3)
    rows, all_spans = [(query, key, value)], [[range(key.shape[2])]]
    if documents is not None:
        # Splits, not slices: the gradient of each slice is as large as what it is cut from.
        rows = list(zip(query.split(1), key.split(1), value.split(1), strict=True))
        all_spans = documents.spans
    out = []
    for row, spans in zip(rows, all_spans, strict=True):
        if runs is None:
            lengths = [len(span) for span in spans]
            parts = list(zip(*(tensor.split(lengths, dim=2) for tensor in row), strict=True))
        else:
            parts = list(_parts(*row, spans, runs))
        attended = [_fused_causal(q, k, v, softmax_scale) for q, k, v in parts]
        out.append(torch.cat(attended, dim=2) if len(attended) > 1 else attended[0])
    return (torch.cat(out) if len(out) > 1 else out[0]).permute(2, 0, 1, 3)


def _parts(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[range], runs: Sequence[range]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for each run of queries and each document, the queries of both and the keys that they can see."""
    first = 0
    for run in runs:
        for span in spans:
            start, stop = max(run.start, span.start), min(run.stop, span.stop)
            if start < stop:
                queries, keys = slice(first + start - run.start, first + stop - run.start), slice(span.start, stop)
                yield query[:, :, queries], key[:, :, keys], value[:, :, keys]
        first += len(run)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if a GPU's fused attention could not load its rows in units of 16 bytes.

    Q next to the hidden gate's logit is such a tensor: a slice of rows of head_dim + 1 channels.
    """
    rows_are_aligned = all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
    return tensor if tensor.device.type == "cpu" or rows_are_aligned else tensor.contiguous()


def _fused_causal(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
    """Causal attention of query [b, heads, n, d], the last n of the m tokens of key and value [b, groups, m, d]."""
    key, value, grouped = _repeated(query, key, value)
    n, m = query.shape[2], key.shape[2]
    if n == m:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=grouped
        )
    rows = n if query.is_cuda else _MASKED_ROWS
    parts = []
    for first in range(0, n, rows):
        last = min(first + rows, n)
        seen = m - n + last
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, first:last],
                key[:, :, :seen],
                value[:, :, :seen],
                attn_mask=_lower_right(last - first, seen, query.device),
                scale=softmax_scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return keys and values [b, groups, m, d], and whether they have fewer heads than query [b, heads, n, d].

    A GPU's only fused attention in fp32 does not share them among heads: it gets copies.
    """
    per_group = query.shape[1] // key.shape[1]
    if per_group > 1 and query.is_cuda and query.dtype == torch.float32:
        return key.repeat_interleave(per_group, dim=1), value.repeat_interleave(per_group, dim=1), False
    return key, value, per_group > 1


def _lower_right(n: int, m: int, device: torch.device) -> Tensor:
    """Return the causal mask of the last n of m tokens; on a GPU a mere descriptor: flash attention needs no mask."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # imports the compiler: costs CPU runs a second at start

        return causal_lower_right(n, m)
    return torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_size: int,
    softmax_scale: float | None = None,
    documents: Documents | None = None,
    runs: Sequence[range] | None = None,
    before: Sequence[tuple[Tensor, ...]] = (),
) -> Tensor:
    """Compute sliding-window attention: a query sees the last `window_size` keys, its own included (paper section 3.3).

    Time and memory are O(rows * window_size): each block of w queries is multiplied with its own block of keys and the
    one before it. Blocks are the outermost dimension in memory, so that "the previous block" is a view.

    Args:
        query, key, value: as in `causal_attention`, but keys and values of the same rows as the queries.
        softmax_scale, documents, runs: as in `causal_attention`.
        before: for each run, keys and values [min(window_size - 1, run.start), b, groups, d] of the rows before it.

    Returns:
        [rows, b, heads, d].
    """
    if runs is None:
        if window_size >= query.shape[0]:
            return causal_attention(query, key, value, softmax_scale=softmax_scale, documents=documents)
        segments = None if documents is None else documents.segments
        return _window_in_blocks(query, key, value, None, window_size, softmax_scale, segments)
    parts, first = [], 0
    for run, halo in zip(runs, before, strict=True):
        rows = slice(first, first + len(run))
        first += len(run)
        segments = None
        if documents is not None:
            segments = documents.segments[:, run.start - halo[0].shape[0] : run.stop]
        one = (query[rows], key[rows], value[rows], halo, window_size, softmax_scale, segments)
        parts.append(_window_in_blocks(*one) if window_size < len(run) else _window_with_mask(*one))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _window_with_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: tuple[Tensor, ...],
    w: int,
    softmax_scale: float | None,
    segments: Tensor | None,
) -> Tensor:
    """Compute attention in a window at least as long as the run of queries: one product with all keys that any of them
    sees."""
    n = query.shape[0]
    key, value = (torch.cat(parts) for parts in zip(before, (key, value), strict=True))
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    m = key.shape[2]
    j = torch.arange(m, device=query.device)
    i = j[m - n :, None]
    seen = (j <= i) & (j > i - w)
    if segments is not None:
        seen = (seen & (segments[:, m - n :, None] == segments[:, None, :])).unsqueeze(1)
    key, value, grouped = _repeated(query, key, value)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=softmax_scale, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def _window_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: tuple[Tensor, ...] | None,
    w: int,
    softmax_scale: float | None,
    segments: Tensor | None,
) -> Tensor:
    """Compute window attention of rows [s, b, .., d], given the fewer than w rows of keys and values before them.

    `segments` [b, rows before + s] tells the keys' documents apart.
    """
    s, b, heads, d = query.shape
    groups = key.shape[2]
    per_group = heads // groups
    blocks = -(-s // w)
    batch = blocks * b * groups
    # The queries of one group share its keys in one product: [blocks * b * groups, per_group * w, d].
    query = _in_blocks(query, blocks, w, groups).reshape(batch, per_group * w, d)
    keys, values = (
        _with_block_before(_in_blocks(tensor, blocks, w, groups), None if before is None else before[index])
        for index, tensor in enumerate((key, value))
    )
    rows_before = 0 if before is None else before[0].shape[0]
    bias_before, bias_own = _window_bias(b, groups, per_group, w, blocks, s, rows_before, segments, query)
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    of_before = torch.baddbmm(bias_before, query, keys[:batch].transpose(1, 2), alpha=scale)
    own = torch.baddbmm(bias_own, query, keys[-batch:].transpose(1, 2), alpha=scale)
    weights = torch.cat((of_before, own), dim=-1).softmax(dim=-1)
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


def _with_block_before(tensor: Tensor, before: Tensor | None) -> Tensor:
    """[blocks, b, groups, w, d] -> [(blocks + 1) * b * groups, w, d]: prepend a block of zeros that ends with the rows
    `before` [rows, b, groups, d]."""
    if before is None:
        first = torch.zeros_like(tensor[:1])
    else:
        w = tensor.shape[3]
        padded = F.pad(before, (0, 0, 0, 0, 0, 0, w - before.shape[0], 0))
        first = padded.permute(1, 2, 0, 3).unsqueeze(0)
    return torch.cat((first, tensor)).flatten(0, 2)


def _window_bias(
    b: int,
    groups: int,
    per_group: int,
    w: int,
    blocks: int,
    s: int,
    rows_before: int,
    segments: Tensor | None,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return two biases, for the keys of the block before and of a query's own: 0 where it sees a key, -inf elsewhere.

    Query i of a block sees key j of the block before if j > i, and of its own block if j <= i; only within its own
    document, and nothing further back than `rows_before` rows before the first block. Each bias is broadcastable to
    [blocks * b * groups, per_group * w, w].
    """
    if segments is None:
        return _causal_bias(b * groups, per_group, w, blocks, rows_before, like.dtype, like.device)
    i = torch.arange(w, device=like.device)
    padding = (w - rows_before, blocks * w - s)
    segments = F.pad(segments, padding, value=-1).unflatten(1, (blocks + 1, w)).transpose(0, 1)
    of_queries = segments[1:, :, :, None]  # [blocks, b, w, 1]
    same_before, same_own = of_queries == segments[:-1, :, None, :], of_queries == segments[1:, :, None, :]
    seen = (same_before & (i[None, :] > i[:, None]), same_own & (i[None, :] <= i[:, None]))
    before, own = (
        part[:, :, None, None].expand(blocks, b, groups, per_group, w, w).reshape(-1, per_group * w, w) for part in seen
    )
    return _as_bias(before, like.dtype), _as_bias(own, like.dtype)


@lru_cache(maxsize=8)
def _causal_bias(
    rows: int, per_group: int, w: int, blocks: int, rows_before: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `_window_bias` without documents, which is the same for every layer, loop and step."""
    i = torch.arange(w, device=device)
    own = (i[None, :] <= i[:, None]).repeat(per_group, 1)[None]
    before = (~own).expand(blocks, -1, -1).clone()
    before[0, :, : w - rows_before] = False
    return _as_bias(before.repeat_interleave(rows, dim=0), dtype), _as_bias(own, dtype)


def _as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
