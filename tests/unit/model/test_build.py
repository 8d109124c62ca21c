"""Initial weights depend on the seed and the parameter's name alone, whatever the layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import BASE, PADDED_VOCAB_SIZE, VOCAB_SIZE, build

pytestmark = pytest.mark.usefixtures("one_process")


def _weights(seed: int = 3, padded_vocab_size: int = PADDED_VOCAB_SIZE, **settings: Any) -> dict[str, torch.Tensor]:
    stage = build(settings, seed=seed, padded_vocab_size=padded_vocab_size, random=False)
    return {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}


def test_equal_seeds_give_equal_weights_whatever_the_global_random_state():
    torch.manual_seed(1)
    first = _weights()
    torch.manual_seed(2)
    second = _weights()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_seeds_and_names_tell_weights_apart():
    first, second = _weights(seed=3), _weights(seed=4)
    matrices = [name for name in first if first[name].dim() == 2 and ".plt_gate." not in name]
    assert len(matrices) == 1 + 4 * BASE["num_layers"]
    drawn = [first[name] for name in matrices] + [second[name] for name in matrices]
    starts = {tuple(tensor.flatten()[:4].tolist()) for tensor in drawn}
    assert len(starts) == len(drawn)


def test_the_loop_count_changes_no_weight_but_adds_gates_of_zero():
    one, three = _weights(loop_count=1), _weights(loop_count=3)
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert all(not three[name].any() for name in three if name not in one)


@pytest.mark.parametrize("sizes", [(50, 64), (56, 112), (51, 52)])
@pytest.mark.parametrize("hidden_size", [16, 12])
def test_padding_the_vocabulary_moves_no_row(sizes, hidden_size):
    settings = {"hidden_size": hidden_size, "kv_channels": 4}
    name = "embedding.word_embeddings.weight"
    small, large = (_weights(padded_vocab_size=size, **settings)[name] for size in sizes)
    assert torch.equal(small[:VOCAB_SIZE], large[:VOCAB_SIZE])


def test_spreads_are_megatrons():
    weights = _weights(hidden_size=64, ffn_hidden_size=96, init_method_std=0.05)
    for name, tensor in weights.items():
        if tensor.dim() < 2 or ".plt_gate." in name:
            continue
        into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.05 / math.sqrt(2 * BASE["num_layers"]) if into_residual else 0.05
        assert tensor.std().item() == pytest.approx(expected, rel=0.1), name
        assert abs(tensor.mean().item()) < 0.1 * expected, name
    assert all(torch.all(tensor == 1) for name, tensor in weights.items() if name.endswith("norm.weight"))
