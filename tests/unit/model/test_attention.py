"""The gates alone: their start at one half, and what their parameters tell megatron-core. `test_against_reference` has
their equations."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build

pytestmark = pytest.mark.usefixtures("one_process")


def _gate(kind: str, random: bool = True) -> torch.nn.Module:
    stage = build({"gate_input": kind}, random=random)
    return stage.decoder.layers[1].self_attention.core_attention.plt_gate.cpu()


@pytest.mark.parametrize("kind", ["query", "hidden"])
def test_as_built_a_gate_is_one_half(kind):
    gate = _gate(kind, random=False)
    inputs = torch.randn(5, 2, 4, 4) if kind == "query" else torch.randn(5, 2, 16)
    assert torch.equal(torch.sigmoid(gate(inputs)), torch.full((5, 2, 4), 0.5))


def test_query_gates_are_split_over_tensor_parallel_ranks_and_hidden_gates_are_not():
    # Unmarked, gradient norms would count one rank's heads only.
    assert all(p.tensor_model_parallel and p.partition_dim == 0 for p in _gate("query").parameters())
    assert not any(getattr(p, "tensor_model_parallel", False) for p in _gate("hidden").parameters())


@pytest.mark.parametrize("kind", ["query", "hidden"])
def test_bfloat16_gates_are_bfloat16(kind):
    gate = _gate(kind).bfloat16()
    inputs = torch.randn(5, 2, 4, 4) if kind == "query" else torch.randn(5, 2, 16)
    assert gate(inputs.bfloat16()).dtype == torch.bfloat16
