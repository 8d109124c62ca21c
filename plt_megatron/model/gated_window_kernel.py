"""The gated sliding-window attention of later loops as fused Triton kernels (paper section 3.3).

Given the first loop's attention `y_global`, from whatever kernel the backend uses,

    y_local = softmax(Q K^T * scale within the window) V
    y       = lerp(y_global, y_local, g)   (gate_side local; global: the other way round),   g = sigmoid(logit)

are computed by one kernel, which reads each query once, for the scores and the paper's gate (logit = w_h . q + b_h),
together with the row of `y_global` to blend. Neither `y_local` nor the gate is written to memory; the backward
recomputes them. The global attention stays a separate kernel: at training lengths it is compute-bound, where vendor
kernels are hard to match, and the blend needs only its output, since each softmax is normalized separately.

Memory traffic of one layer and later loop, in units of one [s, b, heads, d] tensor; K and V count 1/r each, with
r = heads / groups:

    forward, unfused     6 + 2/r    window: Q, K, V, y_local; gate: Q; blend: y_local, y_global, y
    forward, fused       3 + 2/r    Q, K, V, y_global, y
    backward, unfused   14 + 4/r    blend 5, gate 2, sum of the two dQ 3, window 4 + 4/r
    backward, fused      7 + 6/r    over queries: Q, dy, y_global, K, V, dQ, dy_global; over keys: Q, dy, K, V, dK, dV

The fused kernel also does not keep `y_local` for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # kernels can only read globals that are constexpr


@triton.jit
def _rows(pointer, rows, columns, row_stride, row_end, head_dim: tl.constexpr):
    """Load rows of a tensor whose last dimension is contiguous, with zeros beyond its end."""
    inside = (rows[:, None] < row_end) & (columns[None, :] < head_dim)
    return tl.load(pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(pointer, value, rows, columns, row_stride, row_end, head_dim: tl.constexpr):
    inside = (rows[:, None] < row_end) & (columns[None, :] < head_dim)
    tl.store(
        pointer + rows[:, None].to(tl.int64) * row_stride + columns[None, :],
        value.to(pointer.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _first_keys(starts, rows, s, window: tl.constexpr, packed: tl.constexpr):
    """Return the first key that each query sees: the window's first or, if later, its document's."""
    first = rows - window + 1
    if packed:
        first = tl.maximum(first, tl.load(starts + rows, mask=rows < s, other=0))
    return first


@triton.jit
def _scores(q, k, queries, keys, first, s, scale, precision: tl.constexpr):
    """Compute scores in base 2, -inf where a query does not see a key."""
    scores = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= first[:, None]) & (keys[None, :] < s)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _gate(q, logits, weight, bias, rows, columns, s, head_dim: tl.constexpr, from_query: tl.constexpr):
    """Compute sigmoid(logit) of each query, float32."""
    if from_query:
        w = tl.load(weight + columns, mask=columns < head_dim, other=0.0).to(tl.float32)
        z = tl.sum(q.to(tl.float32) * w[None, :], axis=1) + tl.load(bias).to(tl.float32)
    else:
        z = tl.load(logits + rows, mask=rows < s, other=0.0).to(tl.float32)
    return tl.sigmoid(z)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, global_ptr, logits_ptr, weight_ptr, bias_ptr, starts_ptr, out_ptr, lse_ptr,
    q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    global_stride_s, global_stride_b, global_stride_h, out_stride_s, out_stride_b, out_stride_h,
    s, heads, scale,
    per_group: tl.constexpr, window: tl.constexpr, head_dim: tl.constexpr, block_d: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, packed: tl.constexpr, from_query: tl.constexpr,
    gate_local: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Program (b * heads + h, i): queries i * block_m .. of one head."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // heads, row % heads
    queries = block * block_m + tl.arange(0, block_m)
    columns = tl.arange(0, block_d)
    q = _rows(q_ptr + batch * q_stride_b + head * q_stride_h, queries, columns, q_stride_s, s, head_dim)
    first = _first_keys(starts_ptr + batch * s, queries, s, window, packed)
    k_ptr += batch * k_stride_b + head // per_group * k_stride_h
    v_ptr += batch * v_stride_b + head // per_group * v_stride_h

    largest = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, block_d], tl.float32)
    begin = tl.maximum(block * block_m - window + 1, 0) // block_n * block_n
    for start in range(begin, tl.minimum(block * block_m + block_m, s), block_n):
        keys = start + tl.arange(0, block_n)
        k = _rows(k_ptr, keys, columns, k_stride_s, s, head_dim)
        scores = _scores(q, k, queries, keys, first, s, scale, precision)
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a row may see no key of this block
        p = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(largest - reference)
        total = total * shrink + tl.sum(p, axis=1)
        v = _rows(v_ptr, keys, columns, v_stride_s, s, head_dim)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=precision)
        largest = new_largest

    total = tl.where(queries < s, total, 1.0)
    y_local = acc / total[:, None]
    weight_ptr += head * head_dim
    g = _gate(q, logits_ptr + row * s, weight_ptr, bias_ptr + head, queries, columns, s, head_dim, from_query)
    if not gate_local:
        g = 1.0 - g
    global_ptr += batch * global_stride_b + head * global_stride_h
    y_global = _rows(global_ptr, queries, columns, global_stride_s, s, head_dim).to(tl.float32)
    y = y_global + g[:, None] * (y_local - y_global)
    _store_rows(out_ptr + batch * out_stride_b + head * out_stride_h, y, queries, columns, out_stride_s, s, head_dim)
    tl.store(lse_ptr + row * s + queries, largest + tl.log2(total), mask=queries < s)


@triton.jit
def _backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, global_ptr, logits_ptr, weight_ptr, bias_ptr, starts_ptr, lse_ptr, dout_ptr,
    dq_ptr, dglobal_ptr, dlogits_ptr, dweight_ptr, dbias_ptr, delta_ptr, share_ptr,
    q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    global_stride_s, global_stride_b, global_stride_h, dout_stride_s, dout_stride_b, dout_stride_h,
    own_stride_s, own_stride_b, own_stride_h,
    s, heads, scale,
    per_group: tl.constexpr, window: tl.constexpr, head_dim: tl.constexpr, block_d: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, packed: tl.constexpr, from_query: tl.constexpr,
    gate_local: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Program (b * heads + h, i): gradients of queries, `y_global` and the gate; per query, inputs of the keys' kernel.

    `own_stride_*` are the strides of dq and dglobal. Per query, float32: delta = dy . y_local, share = y_local's weight
    in y.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // heads, row % heads
    queries = block * block_m + tl.arange(0, block_m)
    columns = tl.arange(0, block_d)
    q = _rows(q_ptr + batch * q_stride_b + head * q_stride_h, queries, columns, q_stride_s, s, head_dim)
    dout = _rows(dout_ptr + batch * dout_stride_b + head * dout_stride_h, queries, columns, dout_stride_s, s, head_dim)
    first = _first_keys(starts_ptr + batch * s, queries, s, window, packed)
    lse = tl.load(lse_ptr + row * s + queries, mask=queries < s, other=0.0)
    k_ptr += batch * k_stride_b + head // per_group * k_stride_h
    v_ptr += batch * v_stride_b + head // per_group * v_stride_h
    begin = tl.maximum(block * block_m - window + 1, 0) // block_n * block_n
    end = tl.minimum(block * block_m + block_m, s)

    delta = tl.zeros([block_m], tl.float32)  # dy . y_local = sum over keys of p (dy . v), without y_local
    for start in range(begin, end, block_n):
        keys = start + tl.arange(0, block_n)
        k = _rows(k_ptr, keys, columns, k_stride_s, s, head_dim)
        p = tl.exp2(_scores(q, k, queries, keys, first, s, scale, precision) - lse[:, None])
        v = _rows(v_ptr, keys, columns, v_stride_s, s, head_dim)
        delta += tl.sum(p * tl.dot(dout, tl.trans(v), input_precision=precision), axis=1)

    weight_ptr += head * head_dim
    g = _gate(q, logits_ptr + row * s, weight_ptr, bias_ptr + head, queries, columns, s, head_dim, from_query)
    share = g if gate_local else 1.0 - g
    dq = tl.zeros([block_m, block_d], tl.float32)
    for start in range(begin, end, block_n):
        keys = start + tl.arange(0, block_n)
        k = _rows(k_ptr, keys, columns, k_stride_s, s, head_dim)
        p = tl.exp2(_scores(q, k, queries, keys, first, s, scale, precision) - lse[:, None])
        v = _rows(v_ptr, keys, columns, v_stride_s, s, head_dim)
        dp = tl.dot(dout, tl.trans(v), input_precision=precision)
        ds = p * (dp - delta[:, None]) * share[:, None]
        dq += tl.dot(ds.to(k.dtype), k, input_precision=precision)
    dq = dq * (scale / LOG2_E)  # the softmax scale, without the factor of base 2

    global_ptr += batch * global_stride_b + head * global_stride_h
    y_global = _rows(global_ptr, queries, columns, global_stride_s, s, head_dim).to(tl.float32)
    dout = dout.to(tl.float32)
    difference = delta - tl.sum(dout * y_global, axis=1)
    dz = g * (1.0 - g) * (difference if gate_local else -difference)
    if from_query:
        w = tl.load(weight_ptr + columns, mask=columns < head_dim, other=0.0).to(tl.float32)
        dq += dz[:, None] * w[None, :]
        part = row * tl.num_programs(1) + block
        dz = tl.where(queries < s, dz, 0.0)
        dweight = tl.sum(dz[:, None] * q.to(tl.float32), axis=0)
        tl.store(dweight_ptr + part * head_dim + columns, dweight, mask=columns < head_dim)
        tl.store(dbias_ptr + part, tl.sum(dz, axis=0))
    else:
        tl.store(dlogits_ptr + row * s + queries, dz.to(dlogits_ptr.dtype.element_ty), mask=queries < s)
    own = batch * own_stride_b + head * own_stride_h
    _store_rows(dq_ptr + own, dq, queries, columns, own_stride_s, s, head_dim)
    _store_rows(dglobal_ptr + own, (1.0 - share)[:, None] * dout, queries, columns, own_stride_s, s, head_dim)
    tl.store(delta_ptr + row * s + queries, delta, mask=queries < s)
    tl.store(share_ptr + row * s + queries, share, mask=queries < s)


@triton.jit
def _backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, lse_ptr, dout_ptr, delta_ptr, share_ptr, dk_ptr, dv_ptr,
    q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    dout_stride_s, dout_stride_b, dout_stride_h, own_stride_s, own_stride_b, own_stride_h,
    s, groups, scale,
    per_group: tl.constexpr, window: tl.constexpr, head_dim: tl.constexpr, block_d: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, packed: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Program (b * groups + g, j): gradients of keys and values j * block_n .. of one group, from its queries."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, group = row // groups, row % groups
    keys = block * block_n + tl.arange(0, block_n)
    columns = tl.arange(0, block_d)
    k = _rows(k_ptr + batch * k_stride_b + group * k_stride_h, keys, columns, k_stride_s, s, head_dim)
    v = _rows(v_ptr + batch * v_stride_b + group * v_stride_h, keys, columns, v_stride_s, s, head_dim)
    dk = tl.zeros([block_n, block_d], tl.float32)
    dv = tl.zeros([block_n, block_d], tl.float32)
    begin = block * block_n // block_m * block_m
    end = tl.minimum(block * block_n + block_n + window - 1, s)
    for member in range(per_group):
        head = group * per_group + member
        per_query = (batch * groups * per_group + head) * s
        for start in range(begin, end, block_m):
            queries = start + tl.arange(0, block_m)
            inside = queries < s
            q = _rows(q_ptr + batch * q_stride_b + head * q_stride_h, queries, columns, q_stride_s, s, head_dim)
            dout = _rows(
                dout_ptr + batch * dout_stride_b + head * dout_stride_h, queries, columns, dout_stride_s, s, head_dim
            )
            first = _first_keys(starts_ptr + batch * s, queries, s, window, packed)
            lse = tl.load(lse_ptr + per_query + queries, mask=inside, other=float("inf"))  # p = 0 beyond the end
            delta = tl.load(delta_ptr + per_query + queries, mask=inside, other=0.0)
            share = tl.load(share_ptr + per_query + queries, mask=inside, other=0.0)
            p = tl.exp2(_scores(q, k, queries, keys, first, s, scale, precision) - lse[:, None]) * share[:, None]
            dv += tl.dot(tl.trans(p.to(dout.dtype)), dout, input_precision=precision)
            dp = tl.dot(dout, tl.trans(v), input_precision=precision)
            ds = p * (dp - delta[:, None])
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=precision)
    own = batch * own_stride_b + group * own_stride_h
    _store_rows(dk_ptr + own, dk * (scale / LOG2_E), keys, columns, own_stride_s, s, head_dim)
    _store_rows(dv_ptr + own, dv, keys, columns, own_stride_s, s, head_dim)


def block_sizes(head_dim: int, itemsize: int) -> dict[str, int]:
    """Return the tile of queries x keys and the number of warps per tile, such that ptxas spills hardly any registers
    and a tile fits into the shared memory of consumer cards."""
    side = 64 >> (head_dim > 128) + (itemsize > 2)
    return {"block_m": side, "block_n": side, "num_warps": 4 if head_dim <= 64 else 8, "num_stages": 2}


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


class _GatedWindow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        y_global: Tensor,
        logits: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        starts: Tensor | None,
        window_size: int,
        softmax_scale: float,
        gate_local: bool,
    ) -> Tensor:
        s, b, heads, head_dim = query.shape
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(b, heads, s, dtype=torch.float32, device=query.device)
        settings = {
            "per_group": heads // key.shape[2],
            "window": window_size,
            "head_dim": head_dim,
            "block_d": max(16, triton.next_power_of_2(head_dim)),
            "packed": starts is not None,
            "precision": "ieee" if query.dtype == torch.float32 else "tf32",  # irrelevant in half precision
            **block_sizes(head_dim, query.element_size()),
        }
        gate = {"from_query": logits is None, "gate_local": gate_local}
        pointers = [tensor if tensor is not None else query for tensor in (logits, weight, bias, starts)]
        scale = softmax_scale * LOG2_E.value
        _forward_kernel[(b * heads, triton.cdiv(s, settings["block_m"]))](
            query, key, value, y_global, *pointers, out, lse,
            *_strides(query, key, value, y_global, out), s, heads, scale, **settings, **gate,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, y_global, logits, weight, bias, starts, lse)
        ctx.settings, ctx.gate, ctx.scale = settings, gate, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, y_global, logits, weight, bias, starts, lse = ctx.saved_tensors
        dout = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        s, b, heads, head_dim = query.shape
        blocks = triton.cdiv(s, ctx.settings["block_m"])
        dq, dglobal = (torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(2))
        dk, dv = (torch.empty_like(key, memory_format=torch.contiguous_format) for _ in range(2))
        delta, share = (torch.empty_like(lse) for _ in range(2))
        dlogits = dweight = dbias = None
        if logits is not None:
            dlogits = torch.empty_like(logits)
        else:
            dweight = torch.empty(b, heads, blocks, head_dim, dtype=torch.float32, device=query.device)
            dbias = torch.empty(b, heads, blocks, dtype=torch.float32, device=query.device)
        inputs = [tensor if tensor is not None else query for tensor in (logits, weight, bias, starts)]
        outputs = [tensor if tensor is not None else query for tensor in (dlogits, dweight, dbias)]
        _backward_queries_kernel[(b * heads, blocks)](
            query, key, value, y_global, *inputs, lse, dout, dq, dglobal, *outputs, delta, share,
            *_strides(query, key, value, y_global, dout, dq), s, heads, ctx.scale, **ctx.settings, **ctx.gate,
        )  # fmt: skip
        _backward_keys_kernel[(b * key.shape[2], triton.cdiv(s, ctx.settings["block_n"]))](
            query, key, value, inputs[-1], lse, dout, delta, share, dk, dv,
            *_strides(query, key, value, dout, dk), s, key.shape[2], ctx.scale, **ctx.settings,
        )  # fmt: skip
        if dweight is not None and dbias is not None:
            # Summed in a fixed order, for bitwise reproducibility.
            dweight, dbias = dweight.sum(dim=(0, 2)).to(weight.dtype), dbias.sum(dim=(0, 2)).to(bias.dtype)
        return dq, dk, dv, dglobal, dlogits, dweight, dbias, None, None, None, None


def gated_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y_global: Tensor,
    *,
    window_size: int,
    logits: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate_side: str = "local",
    softmax_scale: float | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """Blend `y_global` with attention over a window, by a gate per head and token. Deterministic.

    Args:
        query: [s, b, heads, d], bfloat16, float16 or float32; any strides with d contiguous.
        key, value: [s, b, groups, d] of this loop; a group serves heads / groups consecutive heads.
        y_global: [s, b, heads, d], the attention over the first loop's keys and values.
        window_size: keys that a query sees, its own included.
        logits: [s, b, heads], the gate's; None if `weight` and `bias` are given.
        weight, bias: [heads, d] and [heads], for a gate that reads the query: logit = weight . query + bias.
        gate_side: `local`: y = g * y_local + (1 - g) * y_global; `global`: g and 1 - g exchanged.
        softmax_scale: default d ** -0.5.
        document_starts: int32 [b, s], the index in its row of the first token of each token's document; None: a row is
            one text.

    Returns:
        [s, b, heads, d], contiguous.
    """
    assert (logits is None) != (weight is None) and (weight is None) == (bias is None)
    query, key, value, y_global = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, y_global))
    by_head = None if logits is None else logits.permute(1, 2, 0).contiguous()  # [b, heads, s], small
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _GatedWindow.apply(
        query, key, value, y_global, by_head, weight, bias, document_starts, window_size, scale, gate_side == "local"
    )
