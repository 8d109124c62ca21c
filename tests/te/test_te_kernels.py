"""The stand-in's kernels against independent references: autograd, torch's optimizer, torch's FP8 types, and what the
formats promise."""

from __future__ import annotations

import pytest


def in_pool(run_te, check, *args):
    run_te(check, 1, *args)


# ---------------------------------------------------------------- quantization


def round_trip(kind: str, settings: dict, shape: tuple[int, ...]) -> None:
    """Both copies of a tensor decode to within half a unit of its last place, at the scale of its block."""
    import torch
    from transformer_engine.pytorch import constants, tensor

    from tests.te.kernels_quantize import operand

    settings = dict(settings)
    dtype = constants.DType[settings.pop("dtype")]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    values *= 1e-4  # unscaled, too small for either format
    values[0] = 0.0
    if kind == "Float8Quantizer":
        amax = torch.zeros(1)
        largest = torch.finfo(torch.float8_e4m3fn if dtype == constants.DType.kFloat8E4M3 else torch.float8_e5m2).max
        quantizer = tensor.Float8Quantizer(largest / values.abs().max().reshape(1), amax, dtype)
    elif kind == "Float8CurrentScalingQuantizer":
        quantizer = tensor.Float8CurrentScalingQuantizer(dtype, torch.device("cpu"))
    else:
        quantizer = getattr(tensor, kind)(dtype, rowwise=True, columnwise=True, **settings)
    quantized = quantizer(values)
    mantissa = 3 if dtype == constants.DType.kFloat8E4M3 else 2
    smallest = 2.0 ** (-6 if mantissa == 3 else -14) / (448 if mantissa == 3 else 57344)  # normal, of the largest
    for columnwise in (False, True):
        decoded = operand(quantized, columnwise)
        assert decoded.shape == values.shape
        # Powers of two as scales waste up to a factor of two (or four, where the block's largest is rounded up).
        floor = 4 * smallest * values.abs().max() * 2.0**-mantissa
        error = (decoded - values).abs()
        assert (error <= values.abs() * 2.0 ** -(mantissa + 1) * 1.01 + floor).all()
        assert error.max() > 0 and (decoded[0] == 0).all()
    if kind == "Float8Quantizer":
        assert amax.item() == values.abs().max()


@pytest.mark.parametrize("dtype", ["kFloat8E4M3", "kFloat8E5M2"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Float8Quantizer", {}),
        ("Float8CurrentScalingQuantizer", {}),
        ("Float8BlockQuantizer", {"block_scaling_dim": 1}),
        ("Float8BlockQuantizer", {"block_scaling_dim": 2}),
        ("MXFP8Quantizer", {}),
    ],
    ids=["delayed", "tensorwise", "blocks 1 x 128", "blocks 128 x 128", "mxfp8"],
)
def test_quantized_tensors_decode_to_what_was_quantized(run_te, kind, settings, dtype):
    in_pool(run_te, round_trip, kind, {**settings, "dtype": dtype}, (64, 3, 160))


def amax_histories(algorithm: str) -> list[tuple[float, float]]:
    """(scale, newest history entry) after amaxes 1, 8, 2, with a history of two."""
    import torch

    from tests.te.extension import DType
    from tests.te.kernels_quantize import update_amax_and_scale

    history, scale, seen = torch.zeros(2, 1), torch.ones(1), []
    for amax in (1.0, 8.0, 2.0, 0.0, 0.0, 0.0):
        update_amax_and_scale(torch.tensor([amax]), [history], [scale], algorithm, DType.kFloat8E4M3, 0.0)
        seen.append((scale.item(), history[0].item()))
    return seen


def test_delayed_scales_follow_the_history(run_te):
    scales = [scale for scale, _ in run_te(amax_histories, 1, "max")]
    assert scales == [448, 56, 56, 224, 224, 224]
    assert [scale for scale, _ in run_te(amax_histories, 1, "most_recent")] == [448, 56, 224, 224, 224, 224]
    assert all(newest == 0 for _, newest in run_te(amax_histories, 1, "max"))


# ---------------------------------------------------------------- layers


def layers() -> None:
    """RMSNorm, SwiGLU and the three matrix products against autograd, float64."""
    import torch
    import torch.nn.functional as F

    from tests.te import kernels_layers as kernels
    from tests.te.extension import DType

    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((6, 2, 8), (8,), (6, 2, 8)))
    for zero_centered in (False, True):
        wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
        expected = F.rms_norm(wide[0], (8,), wide[1] + zero_centered, 1e-5)
        expected.backward(grad.double())
        out, _, rsigma = kernels.rmsnorm_fwd(x, weight, 1e-5, None, None, DType.kFloat32, 0, zero_centered)
        ours = (out, *kernels.rmsnorm_bwd(grad, x, rsigma, weight, 0, zero_centered))
        for actual, other in zip(ours, (expected, wide[0].grad, wide[1].grad), strict=True):
            torch.testing.assert_close(actual.double(), other.detach(), rtol=1e-5, atol=1e-5)
    wide_x = x.double().requires_grad_()
    gate, up = wide_x.chunk(2, -1)
    (F.silu(gate) * up).backward(grad[..., :4].double())
    torch.testing.assert_close(kernels.swiglu(x, None).double(), (F.silu(gate) * up).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.dswiglu(grad[..., :4], x, None).double(), wide_x.grad, rtol=1e-5, atol=1e-5)
    matrix, bias = torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator)
    dy = torch.randn(6, 2, 5, generator=generator)

    def product(*args: object, bias: object = None, grad: bool = False) -> tuple:
        fixed = (None, None, DType.kFloat32, bias, None, False, None, grad, None, 0, False, False)
        return kernels.generic_gemm(*args, *fixed)

    torch.testing.assert_close(product(matrix, True, x, False, bias=bias)[0], F.linear(x, matrix, bias))
    torch.testing.assert_close(product(matrix, False, dy, False)[0], dy @ matrix)
    wgrad, bgrad, *_ = product(x, False, dy, True, bias=bias, grad=True)
    torch.testing.assert_close(wgrad, torch.einsum("sbo,sbi->oi", dy, x))
    torch.testing.assert_close(bgrad, dy.sum((0, 1)))


def test_norm_activation_and_products(run_te):
    in_pool(run_te, layers)


ADAM = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}


def adam(optimizer: str, **settings: object) -> list[list[float]]:
    """Four steps of an optimizer on a parameter whose gradients depend on it."""
    import torch

    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    module = torch.optim
    if optimizer == "FusedAdam":
        from transformer_engine.pytorch import optimizers as module  # type: ignore[no-redef]
    stepper = getattr(module, optimizer)([parameter], **settings)
    for step in range(4):
        parameter.grad = torch.sin(parameter.detach() * (step + 1))
        stepper.step()
    return parameter.detach().tolist()


@pytest.mark.parametrize(("decoupled", "theirs"), [(True, "AdamW"), (False, "Adam")])
def test_adam(run_te, run_distributed, decoupled, theirs):
    ours = run_te(adam, 1, "FusedAdam", adam_w_mode=decoupled, **ADAM)
    expected = run_distributed(adam, 1, theirs, **ADAM)
    for row, other in zip(ours, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- attention


def attention(layout: str, mask: str, window: tuple[int, int], bottom_right: bool, n: int, m: int) -> None:
    """Forward and backward against autograd through a softmax with a mask written out, float64."""
    import torch
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    b, heads, groups, d = 2, 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, b, count, d) for rows, count in ((n, heads), (m, groups), (m, groups), (n, heads))]
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    keys, values = (tensor.repeat_interleave(heads // groups, 2) for tensor in wide[1:])
    scores = torch.einsum("nbhd,mbhd->bhnm", wide[0], keys) / d**0.5
    offset = m - n if bottom_right else 0
    for i in range(n):
        for j in range(m):
            late = "causal" in mask and j > i + offset
            early = window[0] >= 0 and j < i + offset - window[0]
            if late or early:
                scores[:, :, i, j] = float("-inf")
    expected = torch.einsum("bhnm,mbhd->nbhd", scores.softmax(-1), values)
    expected.backward(grad.double())

    def arranged(tensor: torch.Tensor) -> torch.Tensor:
        if layout == "sbhd":
            return tensor
        tensor = tensor.transpose(0, 1).contiguous()
        return tensor if layout == "bshd" else tensor.flatten(0, 1)

    cu = [torch.arange(b + 1, dtype=torch.int32) * rows for rows in (n, m)]
    how = {
        "qkv_layout": "_".join([layout] * 3),
        "attn_mask_type": mask,
        "window_size": window,
        "bottom_right_diagonal": bottom_right,
    }
    backend = fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"]
    ours = [arranged(tensor) for tensor in (q, k, v)]
    out, aux, *_ = fused_attn.fused_attn_fwd(True, n, m, *cu, *ours, torch.float32, backend, o_format=layout, **how)
    lse = aux[0]
    grads = fused_attn.fused_attn_bwd(
        n, m, *cu, *ours, out, arranged(grad), torch.float32, aux, backend, o_format=layout, do_format=layout,
        dqkv_layout=how["qkv_layout"], **how,
    )  # fmt: skip
    references = (expected, *(tensor.grad for tensor in wide))
    for actual, other in zip((out, *grads[:3]), references, strict=True):
        torch.testing.assert_close(actual.double(), arranged(other.detach()), rtol=1e-5, atol=1e-5)
    expected_lse = scores.detach().logsumexp(-1)  # [b, heads, n]
    if layout == "thd":
        lse = lse.view(b, n, heads).transpose(1, 2)
    torch.testing.assert_close(lse.reshape(b, heads, n).double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "mask", "window", "bottom_right", "n", "m"),
    [
        ("sbhd", "causal", (-1, 0), False, 7, 7),
        ("sbhd", "causal", (2, 0), False, 7, 7),
        ("sbhd", "causal_bottom_right", (-1, 0), True, 3, 7),
        ("sbhd", "causal_bottom_right", (1, 0), True, 3, 7),
        ("sbhd", "no_mask", (-1, -1), False, 3, 7),
        ("bshd", "causal_bottom_right", (1, 0), True, 3, 7),
        ("thd", "padding_causal", (2, 0), False, 7, 7),
        ("thd", "padding", (-1, -1), False, 3, 7),
    ],
)
def test_fused_attention(run_te, layout, mask, window, bottom_right, n, m):
    in_pool(run_te, attention, layout, mask, window, bottom_right, n, m)


def unknown_function() -> str:
    import transformer_engine_torch

    try:
        transformer_engine_torch.moe_permute_fwd()
    except NotImplementedError as error:
        return str(error)
    return ""


def test_what_has_no_reference_raises_with_its_name(run_te):
    assert "moe_permute_fwd" in run_te(unknown_function, 1)
