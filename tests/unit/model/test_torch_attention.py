"""The torch backend's attention, whole and in a context-parallel rank's parts: against a masked n x n matrix, gradients
included, and what it costs.

What other ranks would send is cut out of the whole here; tests/distributed/test_context_parallel.py has real ranks.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from plt_megatron.model import torch_attention
from plt_megatron.model.context_parallel import zigzag_runs
from plt_megatron.model.loop_context import Documents
from plt_megatron.model.torch_attention import aligned, causal_attention, window_attention
from tests.reference.plain_plt import attend


def _draw(s: int, b: int = 2, heads: int = 4, groups: int = 2, d: int = 8, dtype: Any = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(s)
    shapes = [(s, b, heads, d), (s, b, groups, d), (s, b, groups, d)]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("dtype", "shares"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_gpus_attention_in_fp32_gets_copies_of_the_keys(monkeypatch, dtype, shares):
    """It has no fused kernel that shares them among heads, and would hold all scores instead."""
    seen = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, **_: Any) -> Tensor:
        assert enable_gqa == (query.shape[1] != key.shape[1]) and key.shape == value.shape
        seen.append(enable_gqa)
        return torch.empty_like(query)

    monkeypatch.setattr(torch_attention.F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    inputs = _draw(6, b=1, dtype=dtype)
    causal_attention(*inputs)
    window_attention(*inputs, window_size=6, runs=[range(3, 9)], before=[(inputs[1][:3], inputs[2][:3])])
    assert seen == [shares, shares]


class _Allocated(TorchDispatchMode):
    """Counts the elements of gradients that are made for parts of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "slice_backward" in func.name() or "cat" in func.name():
            self.elements += out.numel()
        return out


def test_the_gradients_of_packed_documents_cost_what_the_tokens_do():
    """Of 160 documents: with a gradient as large as the tensor for each it would be 160 times the inputs."""
    inputs = [tensor.requires_grad_() for tensor in _draw(40, b=8)]
    out = causal_attention(*inputs, documents=Documents(torch.arange(40).remainder(2).eq(0).expand(8, 40)))
    with _Allocated() as counted:
        out.sum().backward()
    assert counted.elements <= 2 * sum(tensor.numel() for tensor in inputs)


def _starts(s: int) -> Tensor:
    """Documents across chunks, documents of one token at a chunk's border and at the end, and one that fills a row."""
    starts = torch.rand(2, s, generator=torch.Generator().manual_seed(7)) < 0.15
    starts[0, max(s // 2 - 1, 0) : s // 2 + 2] = starts[0, max(s - 2, 0) :] = True
    starts[1, 1:] = False
    starts[:, 0] = True
    return starts


def _expected(inputs: list[Tensor], window: int | None, starts: Tensor | None) -> Tensor:
    s, b = inputs[0].shape[:2]
    none = torch.zeros(b, s, dtype=torch.bool)
    out = attend(*(tensor.transpose(0, 1) for tensor in inputs), none if starts is None else starts, window)
    return out.transpose(0, 1)


def _of_rank(
    inputs: list[Tensor], cp: int, rank: int, window: int | None, **options: Any
) -> tuple[list[range], Tensor]:
    """A rank's rows, and its part of the attention; of a single rank, the whole."""
    query, key, value = inputs
    if window is not None:
        options["window_size"] = window
    attention = causal_attention if window is None else window_attention
    if cp == 1:
        return [range(query.shape[0])], attention(*inputs, **options)
    runs = zigzag_runs(query.shape[0], cp, 1, rank)
    own = [torch.cat([tensor[run.start : run.stop] for run in runs]) for tensor in inputs]
    if window is None:
        return runs, attention(own[0], key, value, runs=runs, **options)
    before = [tuple(tensor[max(0, run.start - window + 1) : run.start] for tensor in (key, value)) for run in runs]
    return runs, attention(*own, runs=runs, before=before, **options)


def _of_ranks(inputs: list[Tensor], cp: int, window: int | None, **options: Any) -> Tensor:
    """Each rank's part, put back into the sequence's order."""
    rows: dict[int, Tensor] = {}
    for rank in range(cp):
        runs, part = _of_rank(inputs, cp, rank, window, **options)
        rows |= zip(itertools.chain(*runs), part, strict=True)
    return torch.stack([rows[row] for row in range(len(rows))])


def _with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def _assert_equals_whole(inputs: list[Tensor], cp: int, window: int | None, starts: Tensor | None) -> None:
    documents = None if starts is None else Documents(starts)
    actual = _with_gradients(lambda qkv: _of_ranks(qkv, cp, window, documents=documents), inputs)
    expected = _with_gradients(lambda qkv: _expected(qkv, window, starts), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 6, 7, 8, 15, 16, 17, 64])
@pytest.mark.parametrize("s", [1, 2, 5, 16, 23])
def test_attention(s, window, packed):
    _assert_equals_whole(_draw(s), 1, window, _starts(s) if packed else None)


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 1), (6, 3)])
def test_grouped_queries(heads, groups, window, cp):
    _assert_equals_whole(_draw(24, heads=heads, groups=groups), cp, window, None)


def test_every_token_a_document():
    s = 16
    inputs = _draw(s)
    starts = torch.ones(2, s, dtype=torch.bool)
    starts[1] = torch.arange(s) % 2 == 1
    for window in (None, 3):
        out = _of_ranks(inputs, 2, window, documents=Documents(starts))
        # A token that sees itself alone gets its own value.
        torch.testing.assert_close(out[:, 0], inputs[2][:, 0].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("window", [None, 3, 9])
def test_softmax_scale_and_dtype(window, cp):
    inputs = _draw(24)
    rescaled = [inputs[0] * 0.5 * 8**0.5, *inputs[1:]]
    scaled = _of_ranks(inputs, cp, window, softmax_scale=0.5)
    torch.testing.assert_close(scaled, _expected(rescaled, window, None), rtol=1e-10, atol=1e-10)
    half = [tensor.bfloat16() for tensor in inputs]
    out = _of_ranks(half, cp, window)
    assert out.dtype == torch.bfloat16
    expected = _expected([tensor.double() for tensor in half], window, None)
    torch.testing.assert_close(out.double(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_long_runs_are_masked_a_few_rows_at_a_time(monkeypatch, packed):
    monkeypatch.setattr(torch_attention, "_MASKED_ROWS", 5)
    _assert_equals_whole(_draw(48), 2, None, _starts(48) if packed else None)


def test_the_mask_described_to_gpus_is_the_one_made_for_cpus():
    assert torch.equal(causal_lower_right(3, 7)._materialize(), torch_attention._lower_right(3, 7, torch.device("cpu")))


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


def _cost(s: int, window: int | None, cp: int = 1, *, packed: bool = False) -> tuple[int, int]:
    """(FLOPs of the busiest rank, elements of the largest tensor), forward and backward."""
    documents = Documents(torch.arange(s).remainder(50).eq(0)[None]) if packed else None
    flops, elements = 0, 0
    for rank in range(cp):
        inputs = [tensor.requires_grad_() for tensor in _draw(s, b=1, dtype=torch.float32)]
        largest, counter = _LargestTensor(), FlopCounterMode(display=False)
        with largest, counter:
            _of_rank(inputs, cp, rank, window, documents=documents)[1].sum().backward()
        flops, elements = max(flops, counter.get_total_flops()), max(elements, largest.elements)
    return flops, elements


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_the_local_attention_costs_n_times_w(packed):
    window, heads, d = 16, 4, 8
    costs = {s: _cost(s, window, packed=packed) for s in (512, 1024, 2048)}
    for (s, (flops, elements)), (_, (more_flops, more_elements)) in itertools.pairwise(costs.items()):
        assert more_flops == 2 * flops
        assert more_elements <= 2.1 * elements
        # Two products forward, four backward, each of s queries with 2 w keys; scores of the same size.
        assert flops == 6 * 2 * s * 2 * window * heads * d
        assert elements <= heads * s * 2 * window < s * s


def test_the_global_attention_makes_no_score_matrix():
    s = 1024
    _, elements = _cost(s, None)
    assert elements <= s * 4 * 8


def test_a_rank_does_its_share_and_makes_no_score_matrix():
    s, cp, heads, d = 4096, 2, 4, 8
    flops, elements = _cost(s, None, cp)
    # Half of s x s pairs are seen; a rank has 1 / cp of them, and of the diagonal's blocks all.
    blocks = torch_attention._MASKED_ROWS
    assert flops <= 7 * 2 * heads * d * (s * s // 2 + s * blocks) / cp
    assert elements <= max(blocks * s, s * heads * d)
    window = 16
    flops, elements = _cost(s, window, cp)
    assert flops <= 6 * 2 * (s // cp) * 2 * window * heads * d
    assert elements <= heads * (s // cp) * 2 * window


def test_rows_that_a_gpu_could_not_load_are_copied():
    """On the meta device, which has strides as a GPU has."""
    beside_logit = torch.empty(8, 2, 4, 17, dtype=torch.bfloat16, device="meta")[..., :16]
    assert aligned(beside_logit).stride() == (128, 64, 16, 1)
    of_projection = torch.empty(8, 2, 12, 16, dtype=torch.bfloat16, device="meta")[:, :, :4]
    assert aligned(of_projection) is of_projection
    on_cpu = torch.empty(8, 2, 4, 17)[..., :16]
    assert aligned(on_cpu) is on_cpu
