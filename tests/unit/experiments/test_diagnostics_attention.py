"""Entropy and divergence of attention against closed forms and a dense computation."""

from __future__ import annotations

import math

import pytest
import torch

from plt_megatron.experiments.diagnostics import measures as module
from plt_megatron.experiments.diagnostics.measures import Attention, attention_statistics


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(window: int | None, seed: int = 0) -> Attention:
    return Attention(random(4, 13, 8, seed=seed), random(2, 13, 8, seed=seed + 1), 8**-0.5, window)


def dense(attention: Attention, documents: torch.Tensor | None) -> torch.Tensor:
    """Probabilities [H, T, T] in fp64, key by key."""
    heads, tokens, _ = attention.query.shape
    result = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    reach = attention.window or tokens
    for head in range(heads):
        key = attention.key[head // (heads // len(attention.key))].double()
        for i in range(tokens):
            seen = [j for j in range(max(0, i - reach + 1), i + 1) if documents is None or documents[i] == documents[j]]
            scores = key[seen] @ attention.query[head, i].double() * attention.scaling
            result[head, i, seen] = scores.softmax(0)
    return result


def reference(attention, previous, documents):
    p = dense(attention, documents)
    entropy = torch.special.entr(p).sum(-1).mean(-1)
    if previous is None:
        return entropy, None
    q = dense(previous, documents)
    return entropy, torch.where(p > 0, p * (p / q).log(), 0.0).nan_to_num(0.0).sum(-1).mean(-1)


def test_attention_to_one_key_has_none():
    tokens = 6
    key = 1000 * torch.eye(tokens)[None]
    entropy, _ = attention_statistics(Attention(torch.eye(tokens)[None], key, 1.0))
    assert float(entropy) == 0, "every token attends to itself"


def test_divergence_of_two_known_attentions():
    """Two tokens: the second attends with odds 3 : 1, before with 1 : 1."""
    key = torch.tensor([[[math.log(3)], [0.0]]])
    sharp, flat = (Attention(torch.full((1, 2, 1), value), key, 1.0) for value in (1.0, 0.0))
    entropy, divergence = attention_statistics(sharp, flat)
    assert float(divergence) == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-6)
    assert float(entropy) == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 2, rel=1e-6)


@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [None, 3])
def test_blocks_documents_and_grouped_heads_against_a_dense_computation(monkeypatch, window, packed, block):
    attention, previous = make(window), make(window, seed=7)
    documents = torch.tensor([0] * 4 + [1] * 7 + [2] * 2) if packed else None
    if block is not None:
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", block * 4 * (window or 13))
    for before in (None, previous):
        found, expected = attention_statistics(attention, before, documents), reference(attention, before, documents)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        if before is not None:
            torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)
