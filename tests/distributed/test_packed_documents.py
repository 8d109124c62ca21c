"""Under tensor and sequence parallelism too, a document's logits depend on nothing but the document."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.distributed.cases import MODEL, VOCAB_SIZE
from tests.settings import make

LENGTH = 16
BOUNDS = (0, 3, 4, 11, LENGTH)  # no document begins or ends where a rank's half of the rows does


def logits_of_packs(sequence_parallel: bool, settings: dict[str, Any], packs: list[list[int]]) -> list[np.ndarray]:
    """Logits [LENGTH, vocabulary] of each pack of LENGTH tokens, on every rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from plt_megatron.config.derived import padded_vocab_size
    from plt_megatron.config.schema import ModelConfig, ParallelConfig
    from plt_megatron.model.initialization import initialize
    from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch
    from plt_megatron.model.transformer_config import transformer_config
    from plt_megatron.runtime.process_groups import init_process_groups
    from tests.reference.megatron_weights import randomize_gates_and_norms

    ranks = dist.get_world_size()
    parallel = ParallelConfig(tensor_model_parallel_size=ranks, sequence_parallel=sequence_parallel)
    init_process_groups(parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = make(ModelConfig, {**MODEL, **settings})
    stage = LoopedGPT(
        transformer_config(model, parallel),
        VOCAB_SIZE,
        LENGTH,
        padded_vocab_size=padded_vocab_size(model, VOCAB_SIZE, ranks),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    initialize(stage, 1)
    randomize_gates_and_norms(stage)
    starts = torch.zeros(1, LENGTH, dtype=torch.bool)
    starts[0, list(BOUNDS[:-1])] = True
    results = []
    for pack in packs:
        with torch.no_grad():
            part = stage(MicroBatch(torch.tensor([pack]), document_starts=starts))
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(part)
        results.append(whole[0, :, :VOCAB_SIZE].numpy().copy())
    return results


def _packs() -> list[list[int]]:
    """A pack, and for each of its documents another pack in which only that document is the same."""
    generator = np.random.default_rng(0)
    first = generator.integers(VOCAB_SIZE, size=LENGTH)
    packs = [first]
    for begin, end in itertools.pairwise(BOUNDS):
        other = (first + generator.integers(1, VOCAB_SIZE, size=LENGTH)) % VOCAB_SIZE
        other[begin:end] = first[begin:end]
        packs.append(other)
    return [pack.tolist() for pack in packs]


@pytest.mark.parametrize("ranks", [(2, False), (2, True)], ids=["TP2", "TP2 SP"])
@pytest.mark.parametrize(
    "settings",
    [{"loop_count": 3}, {"gate_input": "hidden", "gate_side": "global", "loop_norm": "final"}],
    ids=["PLT-3", "LoopCoder-v2's gate"],
)
def test_a_document_does_not_see_its_neighbors(run_distributed, ranks, settings):
    world_size, sequence_parallel = ranks
    packs = _packs()
    first, *others = run_distributed(logits_of_packs, world_size, sequence_parallel, settings, packs)
    alone = run_distributed(logits_of_packs, 1, False, settings, packs[:1])[0]
    np.testing.assert_allclose(first, alone, rtol=1e-4, atol=1e-5)
    for (begin, end), other in zip(itertools.pairwise(BOUNDS), others, strict=True):
        assert np.array_equal(first[begin:end], other[begin:end])
        outside = np.r_[0:begin, end:LENGTH]
        assert not np.isclose(first[outside], other[outside]).all(axis=1).any(), "the neighbors do differ"
