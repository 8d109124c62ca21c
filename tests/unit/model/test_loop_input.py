"""The cross-loop shift at its edges; test_against_reference has its values, on one process and in documents, and
tests/distributed/test_context_parallel.py on several."""

from __future__ import annotations

import torch

from plt_megatron.model.loop_context import Documents
from plt_megatron.model.loop_input import shift


def test_one_token():
    assert torch.equal(shift(torch.ones(1, 2, 3)), torch.zeros(1, 2, 3))


def test_dtype_stays():
    starts = Documents(torch.zeros(2, 5, dtype=torch.bool)).starts
    assert shift(torch.ones(5, 2, 3).bfloat16(), starts).dtype == torch.bfloat16
