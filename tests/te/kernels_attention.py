"""cuDNN's fused attention in plain torch, with its masks, windows and layouts, and its FP8 version emulated.

FP8: Q, K, V, the softmax's numerators and, backward, dO, dP and the outputs are rounded as the kernel rounds them;
products are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.te.extension import NVTE_Fused_Attn_Backend as Backend
from tests.te.extension import NVTE_Mask_Type as Mask
from tests.te.extension import NVTE_QKV_Format as Format
from tests.te.kernels_quantize import DType, from_fp8, operand, quantize, to_fp8

_CAUSAL = (
    Mask.NVTE_CAUSAL_MASK,
    Mask.NVTE_PADDING_CAUSAL_MASK,
    Mask.NVTE_CAUSAL_BOTTOM_RIGHT_MASK,
    Mask.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK,
)
_PADDED = (Mask.NVTE_PADDING_MASK, Mask.NVTE_PADDING_CAUSAL_MASK, Mask.NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK)
_HOPPER_FP8_HEAD_DIM = 128


def get_fused_attn_backend(params: Any) -> tuple[int, str]:
    """(backend, why there is none): cuDNN's support on Hopper, as far as Transformer Engine's Python leaves it open."""
    if int(params.qkv_dtype) not in (DType.kFloat8E4M3, DType.kFloat8E5M2):
        return int(Backend.NVTE_F16_arbitrary_seqlen), ""
    if int(params.attn_mask_type) != Mask.NVTE_CAUSAL_MASK:
        # Under context parallelism the steps have other masks, which cuDNN has in FP8 for whole blocks only.
        allowed = (Mask.NVTE_NO_MASK, Mask.NVTE_CAUSAL_BOTTOM_RIGHT_MASK)
        if int(params.attn_mask_type) not in allowed:
            return int(Backend.NVTE_No_Backend), "FP8 attention: plain causal mask only"
    if params.is_training and params.head_dim_qk != _HOPPER_FP8_HEAD_DIM:
        return int(Backend.NVTE_No_Backend), "FP8 attention on sm90: head dim 128 in training"
    return int(Backend.NVTE_FP8), ""


@dataclass
class _Problem:
    """Sequences of one length that attend among themselves.

    Attributes:
        batch: which of the tensors' rows.
        rows, keys: where their queries and their keys lie in the sequence dimension.
    """

    batch: slice
    rows: slice
    keys: slice


def _problems(
    layout: Format, mask: Mask, q: Tensor, cu_q: Tensor, cu_k: Tensor, padded_q: Any, padded_k: Any, k: Tensor
) -> Iterator[_Problem]:
    """Find the sequences in tensors [s, b, .., d] (packed: [t, 1, .., d])."""
    if layout == Format.NVTE_THD:
        starts_q, starts_k = (cu if padded is None else padded for cu, padded in ((cu_q, padded_q), (cu_k, padded_k)))
        for index in range(len(cu_q) - 1):
            lengths = [int(cu[index + 1] - cu[index]) for cu in (cu_q, cu_k)]
            first = int(starts_q[index]), int(starts_k[index])
            yield _Problem(slice(0, 1), *(slice(at, at + size) for at, size in zip(first, lengths, strict=True)))
    elif mask in _PADDED:
        for index in range(q.shape[1]):
            lengths = [int(cu[index + 1] - cu[index]) for cu in (cu_q, cu_k)]
            yield _Problem(slice(index, index + 1), slice(0, lengths[0]), slice(0, lengths[1]))
    else:
        yield _Problem(slice(None), slice(0, q.shape[0]), slice(0, k.shape[0]))


def _sequence_first(tensor: Tensor, layout: Format) -> Tensor:
    """-> [s, b, heads, d], a view."""
    if layout == Format.NVTE_BSHD:
        return tensor.transpose(0, 1)
    return tensor.unsqueeze(1) if layout == Format.NVTE_THD else tensor


def _format_of(layout: Any) -> Format:
    """The format of Q, K and V in a layout of three tensors."""
    name = type(layout)(layout).name.removeprefix("NVTE_")
    parts = set(name.split("_"))
    assert len(parts) == 1 and len(name.split("_")) == 3, f"{name} is not what a PLT layer calls"
    return Format[f"NVTE_{parts.pop()}"]


def _seen(n: int, m: int, mask: Mask, window: tuple[int, int], bottom_right: bool) -> Tensor:
    """bool [n, m]: which keys a query sees."""
    distance = torch.arange(n)[:, None] + (m - n if bottom_right else 0) - torch.arange(m)[None, :]
    seen = torch.ones(n, m, dtype=torch.bool)
    left, right = window
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    if mask in _CAUSAL:
        seen &= distance >= 0
    return seen


def _round_trip(values: Tensor, quantizer: Any) -> Tensor:
    """Round values to FP8 and back, as inside the kernel; delayed scaling notes their largest."""
    if quantizer is None:
        return values
    scale = torch.ones(1)
    if hasattr(quantizer, "scale"):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, values.abs().amax()))
        scale = quantizer.scale
    return from_fp8(to_fp8(values * scale, quantizer.dtype), quantizer.dtype) / scale


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """[s, b, groups, d] -> float32 [b, heads, s, d], groups repeated."""
    tensor = operand(tensor, columnwise=False).permute(1, 2, 0, 3)
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: Any,
    o_format: Any,
    qkv_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window_size: tuple[int, int],
    bottom_right: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    query: Any,
    key: Any,
    value: Any,
    fake_dtype: torch.dtype,
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    page_table_k: Any,
    page_table_v: Any,
    s_quantizer: Any,
    o_quantizer: Any,
    *others: Any,
) -> list[Any]:
    """[output, log of the softmax's sums, state of the random numbers]."""
    assert dropout == 0.0
    layout, mask = _format_of(qkv_layout), Mask(int(mask_type))
    fp8 = hasattr(query, "_fp8_dtype")
    q, k, v = (_sequence_first(operand(tensor, False) if fp8 else tensor, layout) for tensor in (query, key, value))
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.zeros(q.shape[1], q.shape[2], q.shape[0], 1)
    for part in _problems(layout, mask, q, cu_seqlens_q, cu_seqlens_kv, padded_q, padded_kv, k):
        inputs = q[part.rows, part.batch], k[part.keys, part.batch], v[part.keys, part.batch]
        y, sums = _forward(*inputs, attn_scale, mask, tuple(window_size), bottom_right, s_quantizer if fp8 else None)
        out[part.rows, part.batch] = y
        lse[part.batch, :, part.rows, 0] = sums
    out = _as_format(out, layout, o_format).to(fake_dtype)
    if type(o_quantizer).__name__ == "Float8Quantizer":
        out = quantize(out, o_quantizer)
    if layout == Format.NVTE_THD:
        lse = lse[0].transpose(0, 1).contiguous()
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Mask,
    window: tuple[int, int],
    bottom_right: bool,
    s_quantizer: Any,
) -> tuple[Tensor, Tensor]:
    """[n, b, heads, d], float32, and log of the sums [b, heads, n]."""
    heads = q.shape[2]
    q, k, v = (_by_head(tensor, heads) for tensor in (q, k, v))
    seen = _seen(q.shape[2], k.shape[2], mask, window, bottom_right)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    y = _round_trip(weights, s_quantizer) @ v / total.clamp(min=torch.finfo(torch.float32).tiny)
    return y.permute(2, 0, 1, 3), (largest + total.log()).squeeze(-1)


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: Any,
    o_format: Any,
    do_format: Any,
    dqkv_layout: Any,
    qkv_scale_inv_format: Any,
    do_scale_inv_format: Any,
    bias_type: Any,
    mask_type: Any,
    softmax_type: Any,
    window_size: tuple[int, int],
    bottom_right: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    query: Any,
    key: Any,
    value: Any,
    output: Any,
    grad_output: Any,
    fake_dtype: torch.dtype,
    aux: list[Any],
    padded_q: Tensor | None,
    padded_kv: Tensor | None,
    s_quantizer: Any,
    dp_quantizer: Any,
    dqkv_quantizer: Any,
    *others: Any,
) -> list[Any]:
    """[dQ, dK, dV, nothing, nothing]."""
    layout, mask = _format_of(qkv_layout), Mask(int(mask_type))
    fp8 = hasattr(query, "_fp8_dtype")
    tensors = (query, key, value, output, grad_output)
    q, k, v, out, grad = (
        _sequence_first(operand(tensor, False) if hasattr(tensor, "_fp8_dtype") else tensor, layout)
        for tensor in tensors
    )
    lse = aux[0]
    if layout == Format.NVTE_THD:
        lse = lse.transpose(0, 1).unsqueeze(0)
    grads = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (q, k, v)]
    quantizers = (s_quantizer, dp_quantizer) if fp8 else (None, None)
    for part in _problems(layout, mask, q, cu_seqlens_q, cu_seqlens_kv, padded_q, padded_kv, k):
        rows, keys = (part.rows, part.batch), (part.keys, part.batch)
        seen = _seen(q[rows].shape[0], k[keys].shape[0], mask, tuple(window_size), bottom_right)
        own = _backward(
            q[rows],
            k[keys],
            v[keys],
            out[rows],
            grad[rows],
            lse[part.batch, :, part.rows],
            attn_scale,
            seen,
            *quantizers,
        )
        for target, index, value_ in zip(grads, (rows, keys, keys), own, strict=True):
            target[index] = value_
    results: list[Any] = [_as_format(tensor, layout, layout).to(fake_dtype) for tensor in grads]
    if fp8 and type(dqkv_quantizer).__name__ == "Float8Quantizer":
        results = [quantize(tensor, dqkv_quantizer) for tensor in results]
    return [*results, None, None]


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    lse: Tensor,
    scale: float,
    seen: Tensor,
    s_quantizer: Any,
    dp_quantizer: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, groups = q.shape[2], k.shape[2]
    q, k, v, out, grad = (_by_head(tensor, heads) for tensor in (q, k, v, out, grad))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    weights = (scores - lse).exp().masked_fill(~seen, 0.0)
    dv = _round_trip(weights, s_quantizer).transpose(-1, -2) @ grad
    of_weights = grad @ v.transpose(-1, -2)
    of_scores = _round_trip(weights * (of_weights - (grad * out).sum(-1, keepdim=True)), dp_quantizer) * scale
    dq, dk = of_scores @ k, of_scores.transpose(-1, -2) @ q
    dk, dv = (tensor.unflatten(1, (groups, heads // groups)).sum(2) for tensor in (dk, dv))
    return dq.permute(2, 0, 1, 3), dk.permute(2, 0, 1, 3), dv.permute(2, 0, 1, 3)


def _as_format(tensor: Tensor, layout: Format, wanted: Any) -> Tensor:
    """[s, b, heads, d] in the wanted format."""
    if layout == Format.NVTE_THD:
        return tensor.squeeze(1)
    return tensor.transpose(0, 1).contiguous() if int(wanted) == Format.NVTE_BSHD else tensor


FUNCTIONS = {function.__name__: function for function in (get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd)}
