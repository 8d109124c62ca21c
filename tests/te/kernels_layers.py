"""Matrix products, norms, activations and the optimizer's kernels in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.te.extension import NVTE_QKV_Format as Format
from tests.te.kernels_quantize import operand, quantize, torch_dtype


def generic_gemm(
    a: Any,
    transa: bool,
    b: Any,
    transb: bool,
    out: Any,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, None]:
    """op(B) op(A) with float32 sums; TN: y = x W^T, NN: dx = dy W, NT: dW = dy^T x.

    Returns:
        (product, bias gradient where `grad` and `bias`, nothing, nothing).
    """
    assert comm_overlap is None and not gelu and not bulk_overlap, "not what a PLT layer calls"
    left, right = operand(b, columnwise=transb), operand(a, columnwise=not transa)
    shape = left.shape
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    product = alpha * ((left.t() if transb else left) @ (right.t() if transa else right))
    bias_grad = None
    if bias is not None:
        if grad:
            bias_grad = operand(b, columnwise=False).reshape(-1, shape[-1]).sum(0).to(bias.dtype)
        else:
            product = product + bias.float()
    if not transb:
        product = product.view(*shape[:-1], product.shape[-1])
    if quantizer is not None:
        return quantize(product.to(torch_dtype(output_dtype)), quantizer, out), bias_grad, None, None
    if out is None:
        return product.to(torch_dtype(output_dtype)), bias_grad, None, None
    product = product.view(out.shape)
    if accumulate:
        product = product + (1.0 if beta is None else beta) * out.float()
    out.copy_(product)
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    a: list[Any],
    transa: bool,
    b: list[Any],
    transb: bool,
    out: list[Tensor],
    output_dtype: Any,
    splits: list[int] | None,
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    gelu_in: Any,
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    margin: int,
) -> list[Tensor]:
    """`generic_gemm` of each pair; in a single output the products lie one after another, `splits` rows each."""
    targets = out[0].split(splits) if single_output else out
    for first, second, target in zip(a, b, targets, strict=True):
        left, right = operand(second, columnwise=transb), operand(first, columnwise=not transa)
        product = (left.t() if transb else left) @ (right.t() if transa else right)
        target.copy_(product + target.float() if accumulate else product)
    return bias


def get_num_cublas_streams() -> int:
    """How many of the products run at once, each with a workspace of its own."""
    return 4


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, otype: Any, sm_margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    """(normalized, nothing, 1 / root mean square [rows])."""
    rows = x.float()
    rsigma = (rows.square().mean(-1) + eps).rsqrt()
    normed = rows * rsigma.unsqueeze(-1) * (weight.float() + zero_centered)
    normed = normed.to(torch_dtype(otype) if isinstance(otype, int) else otype)
    if quantizer is not None:
        return quantize(normed, quantizer, out), None, rsigma.flatten()
    return normed if out is None else out.copy_(normed), None, rsigma.flatten()


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """(the input's gradient, the weight's)."""
    rows = x.reshape(-1, x.shape[-1]).float()
    grad_rows = grad.reshape(rows.shape).float()
    normed = rows * rsigma.view(-1, 1)
    of_normed = grad_rows * (weight.float() + zero_centered)
    projected = (of_normed * normed).mean(-1, keepdim=True)
    of_rows = rsigma.view(-1, 1) * (of_normed - normed * projected)
    return of_rows.view(x.shape).to(x.dtype), (grad_rows * normed).sum(0).to(weight.dtype)


def swiglu(x: Tensor, quantizer: Any) -> Any:
    """silu(first half) * second half."""
    gate, up = x.float().chunk(2, -1)
    return quantize((F.silu(gate) * up).to(x.dtype), quantizer)


def dswiglu(grad: Tensor, x: Tensor, quantizer: Any) -> Any:
    """Gradient of `swiglu`."""
    gate, up = x.float().chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    of_gate = grad.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    of_up = grad.float() * gate * sigmoid
    return quantize(torch.cat((of_gate, of_up), -1).to(x.dtype), quantizer)


def fused_rope_forward(
    x: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """x [s, b, heads, d] turned by the angles [s, 1, 1, d2 <= d], in float32; the other channels are copied."""
    return _turned(x, freqs, freqs.sin(), start_positions, qkv_format, interleaved, cp_size)


def fused_rope_backward(
    grad: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Gradient of `fused_rope_forward`: turned back."""
    return _turned(grad, freqs, -freqs.sin(), start_positions, qkv_format, interleaved, cp_size)


def _turned(x: Tensor, freqs: Tensor, sin: Tensor, start: Any, qkv_format: Any, interleaved: bool, cp: int) -> Tensor:
    assert qkv_format == Format.NVTE_SBHD and start is None and not interleaved and cp == 1, (
        "not what a PLT layer calls"
    )
    # As the extension checks.
    assert freqs.dim() == 4 and freqs.shape[1:3] == (1, 1) and freqs.dtype == torch.float32
    assert freqs.shape[0] >= x.shape[0] and freqs.shape[3] <= x.shape[3]
    angles, rows = freqs.shape[3], x[..., : freqs.shape[3]].float()
    first, second = rows.chunk(2, -1)
    turned = rows * freqs[: len(x)].cos() + torch.cat((-second, first), -1) * sin[: len(x)]
    return torch.cat((turned.to(x.dtype), x[..., angles:]), -1)


def swap_first_dims(tensor: Tensor, *, out: Tensor | None) -> Tensor:
    """[a, b, ..] -> [b, a, ..]."""
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def multi_tensor_scale(chunk: int, noop: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    """second = scale * first."""
    assert tensors[0], "the kernel reads the first tensor"
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, tensors: list[list[Tensor]], per_tensor: bool | None
) -> tuple[Tensor, Tensor]:
    """(norm of all together, norms of each)."""
    assert tensors[0], "the kernel reads the first tensor"
    norms = torch.stack([tensor.float().norm() for tensor in tensors[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    tensors: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam's step over (gradients, parameters, first moments, second moments[, float32 parameters])."""
    first_correction = 1 - beta1**step if bias_correction else 1.0
    second_correction = 1 - beta2**step if bias_correction else 1.0
    for grad, parameter, mean, square, *main in zip(*tensors, strict=True):
        values = (main[0] if main else parameter).float()
        grad = grad.float() if decoupled else grad.float() + weight_decay * values
        mean.copy_(beta1 * mean.float() + (1 - beta1) * grad)
        square.copy_(beta2 * square.float() + (1 - beta2) * grad * grad)
        update = (mean.float() / first_correction) / ((square.float() / second_correction).sqrt() + eps)
        if decoupled:
            update = update + weight_decay * values
        values = values - lr * update
        parameter.copy_(values)
        if main:
            main[0].copy_(values)


FUNCTIONS = {
    function.__name__: function
    for function in (
        generic_gemm,
        te_general_grouped_gemm,
        get_num_cublas_streams,
        rmsnorm_fwd,
        rmsnorm_bwd,
        swiglu,
        dswiglu,
        fused_rope_forward,
        fused_rope_backward,
        swap_first_dims,
        multi_tensor_scale,
        multi_tensor_l2norm,
        multi_tensor_adam,
    )
}
