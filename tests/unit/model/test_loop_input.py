"""The cross-loop shift on one process; tests/distributed/test_context_parallel.py has the others."""

from __future__ import annotations

import torch

from plt_megatron.model.loop_context import Documents
from plt_megatron.model.loop_input import shift


def _states(s: int = 5, b: int = 2, h: int = 3) -> torch.Tensor:
    return torch.arange(1.0, s * b * h + 1).view(s, b, h)


def test_states_move_one_token_and_the_first_is_zero():
    states = _states()
    shifted = shift(states)
    assert torch.equal(shifted[0], torch.zeros(2, 3))
    assert torch.equal(shifted[1:], states[:-1])


def test_nothing_enters_a_document_from_the_one_before():
    states = _states()
    starts = torch.tensor([[True, False, True, True, False], [True, False, False, False, True]])
    shifted = shift(states, starts)
    for row in range(2):
        for i in range(5):
            expected = torch.zeros(3) if starts[row, i] else states[i - 1, row]
            assert torch.equal(shifted[i, row], expected)


def test_gradients_go_back_to_the_token_before():
    states = _states().requires_grad_()
    starts = torch.zeros(2, 5, dtype=torch.bool)
    starts[:, 0] = starts[1, 3] = True
    weights = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    (shift(states, starts) * weights).sum().backward()
    expected = torch.zeros(5, 2, 3)
    expected[:-1] = weights[1:]
    expected[2, 1] = 0  # nobody reads the last token of the first document
    assert torch.equal(states.grad, expected)


def test_one_token():
    assert torch.equal(shift(_states(s=1)), torch.zeros(1, 2, 3))


def test_dtype_stays():
    starts = Documents(torch.zeros(2, 5, dtype=torch.bool)).starts
    assert shift(_states().bfloat16(), starts).dtype == torch.bfloat16
