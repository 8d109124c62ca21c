"""The torch backend's attention: against a masked n x n matrix, and what it costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from plt_megatron.model.loop_context import Documents
from plt_megatron.model.torch_attention import causal_attention, window_attention
from tests.reference.plain_plt import attend


def _draw(s: int, b: int = 2, heads: int = 4, groups: int = 2, d: int = 8, dtype: Any = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(s)
    shapes = [(s, b, heads, d), (s, b, groups, d), (s, b, groups, d)]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _starts(s: int, b: int = 2) -> Tensor:
    starts = torch.rand(b, s, generator=torch.Generator().manual_seed(7)) < 0.2
    starts[:, 0] = True
    if s > 3:
        starts[0, s - 2 :] = True  # documents of one token at the end
        starts[1, 1:] = False  # and one of the whole row
    return starts


def _expected(inputs: list[Tensor], window: int | None, starts: Tensor | None) -> Tensor:
    s, b = inputs[0].shape[:2]
    none = torch.zeros(b, s, dtype=torch.bool)
    out = attend(*(tensor.transpose(0, 1) for tensor in inputs), none if starts is None else starts, window)
    return out.transpose(0, 1)


def _with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def _assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 15, 16, 17, 64])
@pytest.mark.parametrize("s", [1, 2, 5, 16, 23])
def test_window_attention(s, window, packed):
    inputs, starts = _draw(s), _starts(s) if packed else None
    documents = None if starts is None else Documents(starts)
    actual = _with_gradients(lambda qkv: window_attention(*qkv, window_size=window, documents=documents), inputs)
    _assert_close(actual, _with_gradients(lambda qkv: _expected(qkv, window, starts), inputs))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("s", [1, 2, 23])
def test_causal_attention(s, packed):
    inputs, starts = _draw(s), _starts(s) if packed else None
    documents = None if starts is None else Documents(starts)
    actual = _with_gradients(lambda qkv: causal_attention(*qkv, documents=documents), inputs)
    _assert_close(actual, _with_gradients(lambda qkv: _expected(qkv, None, starts), inputs))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 1), (6, 3)])
def test_grouped_queries(heads, groups):
    inputs = _draw(13, heads=heads, groups=groups)
    for window, function in (
        (None, causal_attention),
        (4, lambda *qkv: window_attention(*qkv, window_size=4)),
    ):
        actual = _with_gradients(lambda qkv, function=function: function(*qkv), inputs)
        _assert_close(actual, _with_gradients(lambda qkv, window=window: _expected(qkv, window, None), inputs))


@pytest.mark.parametrize("window", [None, 4])
def test_softmax_scale(window):
    inputs = _draw(13)
    options = {"softmax_scale": 0.5}
    out = (
        causal_attention(*inputs, **options)
        if window is None
        else window_attention(*inputs, window_size=window, **options)
    )
    rescaled = [inputs[0] * 0.5 * 8**0.5, *inputs[1:]]
    _assert_close([out], [_expected(rescaled, window, None)])


@pytest.mark.parametrize("window", [None, 4])
def test_bfloat16_stays_bfloat16_and_close(window):
    inputs = _draw(29, dtype=torch.bfloat16)
    out = causal_attention(*inputs) if window is None else window_attention(*inputs, window_size=window)
    assert out.dtype == torch.bfloat16
    _assert_close([out], [_expected([tensor.double() for tensor in inputs], window, None)], tolerance=5e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_what_a_query_may_not_see_does_not_change_it(packed):
    s, window, probe = 40, 6, 21
    query, key, value = _draw(s)
    documents = Documents(torch.arange(s).remainder(18).eq(0).expand(2, s)) if packed else None
    first = max(probe - window + 1, 18 if packed else 0)
    before = window_attention(query, key, value, window_size=window, documents=documents)
    for tensor in (key, value):
        tensor[:first], tensor[probe + 1 :] = 1e4, -1e4
    after = window_attention(query, key, value, window_size=window, documents=documents)
    assert torch.equal(before[probe], after[probe])
    key[first] += 1
    assert not torch.equal(
        after[probe], window_attention(query, key, value, window_size=window, documents=documents)[probe]
    )


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                # An expanded tensor is as large as what it is stored in.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def _cost(s: int, window: int | None, packed: bool) -> tuple[int, int]:
    """(FLOPs, elements of the largest tensor) of forward and backward."""
    inputs = [tensor.requires_grad_() for tensor in _draw(s, b=1, dtype=torch.float32)]
    documents = Documents(torch.arange(s).remainder(50).eq(0)[None]) if packed else None
    largest, flops = _LargestTensor(), FlopCounterMode(display=False)
    with largest, flops:
        if window is None:
            out = causal_attention(*inputs, documents=documents)
        else:
            out = window_attention(*inputs, window_size=window, documents=documents)
        out.sum().backward()
    return flops.get_total_flops(), largest.elements


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_the_local_attention_costs_n_times_w(packed):
    window, heads, d = 16, 4, 8
    costs = {s: _cost(s, window, packed) for s in (512, 1024, 2048)}
    for (s, (flops, elements)), (_, (more_flops, more_elements)) in itertools.pairwise(costs.items()):
        assert more_flops == 2 * flops
        assert more_elements <= 2.1 * elements
        # Two products forward, four backward, each of s queries with 2 w keys; scores of the same size.
        assert flops == 6 * 2 * s * 2 * window * heads * d
        assert elements <= heads * s * 2 * window < s * s


def test_the_global_attention_makes_no_score_matrix():
    s = 1024
    _, elements = _cost(s, None, packed=False)
    assert elements <= s * 4 * 8


def test_rows_that_a_gpu_could_not_load_are_copied():
    """On the meta device, which has strides as a GPU has."""
    from plt_megatron.model.torch_attention import aligned

    beside_logit = torch.empty(8, 2, 4, 17, dtype=torch.bfloat16, device="meta")[..., :16]
    assert aligned(beside_logit).stride() == (128, 64, 16, 1)
    of_projection = torch.empty(8, 2, 12, 16, dtype=torch.bfloat16, device="meta")[:, :, :4]
    assert aligned(of_projection) is of_projection
    on_cpu = torch.empty(8, 2, 4, 17)[..., :16]
    assert aligned(on_cpu) is on_cpu
