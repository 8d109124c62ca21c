"""Quantization in plain torch: what Transformer Engine's CUDA kernels do for its four FP8 recipes.

Delayed and current ("tensorwise") scaling have one scale a tensor, block scaling one for 1 x 128 or 128 x 128
elements, MXFP8 a power of two for 32. Layouts of data and scales are Transformer Engine's, without the swizzling that
only a kernel reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.te.extension import DType

_TORCH_DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}
_MX_BLOCK = 32
_E8M0_BIAS = 127


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch type of a `DType`, of Python's or of the extension's enumeration."""
    return _TORCH_DTYPES[DType(int(dtype))]


def to_fp8(values: Tensor, dtype: Any) -> Tensor:
    """Round to FP8, saturating; as bytes."""
    kind = torch_dtype(dtype)
    largest = torch.finfo(kind).max
    return values.float().clamp(-largest, largest).to(kind).view(torch.uint8)


def from_fp8(data: Tensor, dtype: Any) -> Tensor:
    """Bytes of FP8 as float32."""
    return data.view(torch_dtype(dtype)).float()


def scale_of_amax(amax: Tensor, dtype: Any, *, power_of_2: bool, epsilon: float) -> Tensor:
    """`compute_scale_from_amax` of Transformer Engine's recipe_common.cuh, float32."""
    amax = amax.float().clamp(min=epsilon)
    scale = torch.finfo(torch_dtype(dtype)).max / amax
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    if power_of_2:
        scale = (scale.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
    return torch.where((amax == 0) | ~torch.isfinite(amax), 1.0, scale)


def transpose(data: Tensor) -> Tensor:
    """[.., n] -> [n, ..], as column-wise FP8 data lies in memory."""
    return data.movedim(-1, 0).contiguous()


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    """`transpose`, into `out` where there is one."""
    transposed = transpose(data)
    return transposed if out is None else out.copy_(transposed)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Quantize a high-precision tensor, into `output` where there is one; nothing happens where `noop` is not zero."""
    if quantizer is None:
        return tensor if output is None else output.copy_(tensor)
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, tensor.device, False)
    if noop is None or not noop.any():
        _FILL[type(quantizer).__name__](tensor.detach(), quantizer, output)
    return output


def split_quantize(
    tensor: Tensor, splits: list[int], quantizers: list[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    """Runs of rows, each by its own quantizer; a run may be empty."""
    runs = tensor.reshape(-1, tensor.shape[-1]).split(list(splits))
    return [quantize(rows, quantizer) for rows, quantizer in zip(runs, quantizers, strict=True)]


def pad_rows(rows: Tensor, out: Tensor, splits: list[int], padded_splits: list[int]) -> None:
    """`fused_multi_row_padding`: runs of rows, each followed by rows of zeros."""
    out.zero_()
    for run, target in zip(rows.split(list(splits)), out.split(list(padded_splits)), strict=True):
        target[: len(run)] = run


def unpad_rows(rows: Tensor, out: Tensor, padded_splits: list[int], splits: list[int]) -> None:
    """`fused_multi_row_unpadding`: the way back."""
    for run, target in zip(rows.split(list(padded_splits)), out.split(list(splits)), strict=True):
        target.copy_(run[: len(target)])


def bgrad_quantize(grad: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """(the bias's gradient, the quantized gradient)."""
    return grad.reshape(-1, grad.shape[-1]).sum(0), quantize(grad, quantizer)


def create_empty_quantized_tensor(quantizer: Any, shape: Any, dtype: Any, device: Any, pin_memory: Any) -> Any:
    """An unfilled tensor of the quantizer's kind."""
    fake = dtype if isinstance(dtype, torch.dtype) else torch_dtype(dtype)
    shape = tuple(shape)
    if type(quantizer).__name__ == "Float8Quantizer":
        return _empty_with_delayed_scale(quantizer, shape, fake)
    metadata = quantizer.storage_metadata(fake)
    settings = dict(metadata["nontensor_kwargs"])
    kind = metadata["cls"]
    names = dict(kind._INNER_TENSORS)
    buffers = dict.fromkeys(names.values())
    for attribute, (size, kind_of_data) in quantizer.inner_tensor_specs(shape).items():
        buffers[names[attribute]] = torch.zeros(size, dtype=kind_of_data)
    if not quantizer.internal:
        settings.pop("fake_dtype")
        settings |= {"shape": shape, "dtype": fake, "device": torch.device("cpu")}
    return kind(**buffers, **settings)


def _empty_with_delayed_scale(quantizer: Any, shape: tuple[int, ...], fake: torch.dtype) -> Any:
    from transformer_engine.pytorch.tensor import Float8Tensor, Float8TensorStorage

    buffers = {
        "data": torch.zeros(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": (
            torch.zeros((shape[-1], *shape[:-1]), dtype=torch.uint8) if quantizer.columnwise_usage else None
        ),
        "fp8_scale_inv": quantizer.scale.reciprocal().reshape(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**buffers, fake_dtype=fake)
    return Float8Tensor(**buffers, shape=shape, dtype=fake, device=torch.device("cpu"))


def _largest(tensor: Tensor) -> Tensor:
    """Absolute value, float32; 0 of no elements."""
    return tensor.abs().amax().float() if tensor.numel() else torch.zeros(())


def _fill_per_tensor(values: Tensor, dtype: Any, scale: Tensor, output: Any) -> None:
    data = to_fp8(values.float() * scale, dtype).view(output.size())
    output._scale_inv.copy_(scale.reciprocal())
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(transpose(data))
        output._transpose_invalid = False


def _fill_delayed(tensor: Tensor, quantizer: Any, output: Any) -> None:
    # The kernel takes the largest value since the history was last advanced.
    quantizer.amax.copy_(torch.maximum(quantizer.amax, _largest(tensor)))
    _fill_per_tensor(tensor, quantizer.dtype, quantizer.scale, output)


def _fill_current(tensor: Tensor, quantizer: Any, output: Any) -> None:
    amax = _largest(tensor).reshape(1)
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group())
    scale = scale_of_amax(
        amax, quantizer.dtype, power_of_2=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon
    )
    _fill_per_tensor(tensor, quantizer.dtype, scale, output)


# ---------------------------------------------------------------- blocks of 128


def _fill_blocks(tensor: Tensor, quantizer: Any, output: Any) -> None:
    rows = tensor.reshape(-1, tensor.shape[-1])
    if output._rowwise_data is not None:
        data, scale_inv = _in_blocks(rows, quantizer)
        output._rowwise_data.copy_(data.view(output._rowwise_data.shape))
        output._rowwise_scale_inv[: scale_inv.shape[0], : scale_inv.shape[1]] = scale_inv
    if output._columnwise_data is not None:
        data, scale_inv = _in_blocks(rows.t(), quantizer)
        output._columnwise_data.copy_(data.view(output._columnwise_data.shape))
        output._columnwise_scale_inv[: scale_inv.shape[0], : scale_inv.shape[1]] = scale_inv


def _in_blocks(rows: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """[m, k] -> its FP8 bytes and inverse scales, [k / 128, m] or, in two dimensions, [m / 128, k / 128]."""
    (m, k), size = rows.shape, quantizer.block_len
    height = size if quantizer.block_scaling_dim == 2 else 1
    padded = F.pad(rows.float(), (0, -k % size, 0, -m % height))
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // size, size)
    scale = scale_of_amax(
        tiles.abs().amax(dim=(1, 3), keepdim=True),
        quantizer.dtype,
        power_of_2=quantizer.force_pow_2_scales,
        epsilon=quantizer.amax_epsilon,
    )
    data = to_fp8(tiles * scale, quantizer.dtype).view(padded.shape)[:m, :k].contiguous()
    inverse = scale[:, 0, :, 0].reciprocal()
    return data, inverse if height > 1 else inverse.t()


# ---------------------------------------------------------------- MXFP8


def _fill_mx(tensor: Tensor, quantizer: Any, output: Any) -> None:
    rows = tensor.reshape(-1, tensor.shape[-1])
    if output._rowwise_data is not None:
        data, exponents = _in_mx_blocks(rows, quantizer.dtype)
        output._rowwise_data.copy_(data.view(output._rowwise_data.shape))
        output._rowwise_scale_inv[: exponents.shape[0], : exponents.shape[1]] = exponents
    if output._columnwise_data is not None:
        data, exponents = _in_mx_blocks(rows.t(), quantizer.dtype)
        output._columnwise_data.copy_(data.t().reshape(output._columnwise_data.shape))
        output._columnwise_scale_inv[: exponents.shape[1], : exponents.shape[0]] = exponents.t()


def _in_mx_blocks(rows: Tensor, dtype: Any) -> tuple[Tensor, Tensor]:
    """[m, k] -> its FP8 bytes and the biased exponents of the inverse scales, uint8 [m, k / 32]."""
    blocks = rows.float().reshape(rows.shape[0], -1, _MX_BLOCK)
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.ceil(torch.log2(amax / torch.finfo(torch_dtype(dtype)).max))
    exponent = torch.where(amax == 0, -_E8M0_BIAS, exponent).clamp(-_E8M0_BIAS, _E8M0_BIAS)
    data = to_fp8(torch.ldexp(blocks, -exponent.int()), dtype).view(rows.shape)
    return data, (exponent[..., 0] + _E8M0_BIAS).to(torch.uint8)


def _from_mx(data: Tensor, exponents: Tensor, dtype: Any) -> Tensor:
    rows = from_fp8(data.reshape(-1, data.shape[-1]), dtype)
    m, k = rows.shape
    powers = exponents[:m, : k // _MX_BLOCK].int() - _E8M0_BIAS
    return torch.ldexp(rows.view(m, -1, _MX_BLOCK), powers.unsqueeze(-1)).view(data.shape)


_FILL = {
    "Float8Quantizer": _fill_delayed,
    "Float8CurrentScalingQuantizer": _fill_current,
    "Float8BlockQuantizer": _fill_blocks,
    "MXFP8Quantizer": _fill_mx,
}


# ---------------------------------------------------------------- back


def dequantize(tensor: Any, otype: Any) -> Tensor:
    """A quantized tensor in high precision."""
    return operand(tensor, columnwise=False).to(torch_dtype(otype))


def operand(tensor: Any, columnwise: bool) -> Tensor:
    """Decode an operand of a matrix product: float32 of a tensor or, if it is quantized, of the copy the product reads.

    Args:
        columnwise: the copy whose blocks run along the leading dimensions. Per-tensor scales have one copy's values.

    Returns:
        [.., n], never transposed.
    """
    if isinstance(tensor, Tensor) and not hasattr(tensor, "_fp8_dtype"):
        return tensor.float()
    dtype = tensor._fp8_dtype
    if hasattr(tensor, "_data"):
        if tensor._data is None or (columnwise and tensor._transpose is not None and not tensor._transpose_invalid):
            return (from_fp8(tensor._transpose, dtype) * tensor._scale_inv).movedim(0, -1)
        return from_fp8(tensor._data, dtype) * tensor._scale_inv
    if hasattr(tensor, "_is_2D_scaled"):
        return _from_blocks(tensor, columnwise)
    data, exponents = tensor._rowwise_data, tensor._rowwise_scale_inv
    if columnwise or data is None:
        assert tensor._columnwise_data is not None, "the product reads the column-wise copy"
        data, exponents = tensor._columnwise_data, tensor._columnwise_scale_inv
        rows = data.reshape(-1, data.shape[-1])
        return _from_mx(rows.t(), exponents.t(), dtype).t().reshape(data.shape)
    return _from_mx(data, exponents, dtype)


def _from_blocks(tensor: Any, columnwise: bool) -> Tensor:
    """By Transformer Engine's own decoding, which reads the row-wise copy where there is one."""
    rowwise = tensor._rowwise_data, tensor._rowwise_scale_inv
    if columnwise:
        assert tensor._columnwise_data is not None, "the product reads the column-wise copy"
        tensor._rowwise_data = tensor._rowwise_scale_inv = None
    try:
        return tensor.dequantize(dtype=torch.float32)
    finally:
        tensor._rowwise_data, tensor._rowwise_scale_inv = rowwise


def update_amax_and_scale(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """`fused_amax_and_scale_update_after_reduction`: put each tensor's reduced amax into its history, advance it and
    set the scale from it.

    Args:
        amaxes: float32, of all tensors one after the other.
        histories: [length, tensors] each.
        scales: [tensors] each.
        algorithm: `max` over the history, or `most_recent`.
    """
    first = 0
    largest = torch.finfo(torch_dtype(dtype)).max
    for history, scale in zip(histories, scales, strict=True):
        count = history.shape[1]
        history[0] = amaxes[first : first + count]
        first += count
        amax = history.amax(0) if algorithm == "max" else history[0].clone()
        if history.shape[0] > 1:
            history.copy_(history.roll(-1, 0))
        history[0] = 0
        new = largest / amax / 2**margin
        new = torch.where(amax > 0, new, scale)
        new = torch.where(torch.isfinite(amax), new, scale)
        scale.copy_(torch.where(torch.isinf(new), torch.finfo(torch.float32).max, new))


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """Largest absolute value."""
    amax.copy_(tensor.abs().amax())


FUNCTIONS = {
    "quantize": quantize,
    "dequantize": dequantize,
    "split_quantize": split_quantize,
    "fused_multi_row_padding": pad_rows,
    "fused_multi_row_unpadding": unpad_rows,
    "bgrad_quantize": bgrad_quantize,
    "create_empty_quantized_tensor": create_empty_quantized_tensor,
    "fp8_transpose": fp8_transpose,
    "fused_amax_and_scale_update_after_reduction": update_amax_and_scale,
    "compute_amax": compute_amax,
}
