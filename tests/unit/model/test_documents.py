"""Packed documents: their bounds in every form, and that a document's logits depend on nothing but itself."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LOOPCODER_V2, SHAPE, VOCAB_SIZE, build

from plt_megatron.model.loop_context import Documents


def _starts(*rows: list[int], s: int = 6) -> torch.Tensor:
    starts = torch.zeros(len(rows), s, dtype=torch.bool)
    for row, columns in enumerate(rows):
        starts[row, columns] = True
    return starts


def test_bounds():
    documents = Documents(_starts([0, 2, 3], [4]))
    assert documents.segments.tolist() == [[1, 1, 2, 3, 3, 3], [1, 1, 1, 1, 2, 2]]
    assert documents.lengths == [2, 1, 3, 4, 2]
    assert documents.cu_seqlens.tolist() == [0, 2, 3, 6, 10, 12]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.position_ids.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 0, 1]]


def test_a_row_begins_a_document_marked_or_not_and_the_mask_given_stays():
    given = _starts([], [5])
    documents = Documents(given)
    assert documents.starts[:, 0].all() and not given[:, 0].any()
    assert documents.lengths == [6, 5, 1]


def test_every_token_a_document():
    documents = Documents(torch.ones(2, 3, dtype=torch.bool))
    assert documents.lengths == [1] * 6
    assert documents.position_ids.tolist() == [[0, 0, 0]] * 2


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("explicit", [True, False], ids=["position_ids", "no position_ids"])
@pytest.mark.parametrize("settings", [{"loop_count": 3}, LOOPCODER_V2], ids=["PLT-3", "LoopCoder-v2"])
def test_a_documents_logits_do_not_depend_on_its_neighbors(settings, explicit):
    from plt_megatron.model.looped_gpt import MicroBatch

    stage = build(settings)
    bounds, device = [0, 4, 5, 14, SHAPE[1]], torch.cuda.current_device()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (1, SHAPE[1]), generator=generator)
    starts = _starts(bounds[:-1], s=SHAPE[1])
    positions = Documents(starts).position_ids.to(device) if explicit else None

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        batch = MicroBatch(tokens.to(device), position_ids=positions, document_starts=starts.to(device))
        with torch.no_grad():
            return stage(batch)[..., :VOCAB_SIZE].cpu()

    packed = logits(tokens)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        with torch.no_grad():
            alone = stage(MicroBatch(tokens[:, begin:end].to(device)))[..., :VOCAB_SIZE].cpu()
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-5, atol=1e-5)
        others = torch.randint(0, VOCAB_SIZE, tokens.shape, generator=generator)
        others[:, begin:end] = tokens[:, begin:end]
        assert torch.equal(logits(others)[:, begin:end], packed[:, begin:end])
