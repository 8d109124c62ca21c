"""Rows that pad the embedding table to what the layout needs never enter the softmax."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PADDED_VOCAB_SIZE, VOCAB_SIZE, build, draw

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padding_has_no_say_and_no_gradient(tied):
    from plt_megatron.model.looped_gpt import MicroBatch

    stage = build({"share_embeddings_and_output_weights": tied})
    data, device = draw(), torch.cuda.current_device()
    batch = MicroBatch(tokens=data["tokens"].to(device), labels=data["labels"].to(device))
    before = stage(batch)
    before.sum().backward()
    table = stage.embedding.word_embeddings.weight if tied else stage.output_layer.weight
    assert table.shape[0] == PADDED_VOCAB_SIZE
    assert torch.all(table.grad[VOCAB_SIZE:] == 0) and torch.any(table.grad[:VOCAB_SIZE] != 0)
    table.data[VOCAB_SIZE:] = 100.0
    assert torch.equal(stage(batch), before)
    batch.labels = None
    logits = stage(batch)
    assert torch.all(logits[..., VOCAB_SIZE:] == -torch.inf)
    assert torch.all(torch.isfinite(logits[..., :VOCAB_SIZE]))
