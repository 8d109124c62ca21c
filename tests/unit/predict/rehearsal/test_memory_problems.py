"""Whether ranks fit their card, of a configuration part of which something else stood in for."""

from __future__ import annotations

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.predict.rehearsal.compare import memory_problems
from plt_megatron.predict.rehearsal.record import RankRecord
from plt_megatron.predict.run_estimate import RunEstimate, estimate_run


def estimate(backend: str, micro_batch: int) -> RunEstimate:
    settings = [f"model.backend={backend}", f"training.micro_batch_size={micro_batch}", "training.global_batch_size=64"]
    return estimate_run(load_config("configs/runs/plt2_1b.yaml", settings), world_size=8, vocab_size=32_000)


@pytest.mark.parametrize(("micro_batch", "problems"), [(4, 0), (8, 1)])
def test_what_stood_in_for_transformer_engine_does_not_count(micro_batch, problems):
    """The shipped file fits the 8 cards that it names; rehearsed are the torch backend's layers, which would not."""
    rehearsed, given = estimate("torch", micro_batch), estimate("te", micro_batch)
    record = RankRecord(3, {"pp": 0}, memory={"activations": rehearsed.memory[0].total_bytes}, peak_phase="forward 2")
    assert memory_problems([record], rehearsed, rehearsed) != []
    found = memory_problems([record], rehearsed, given)
    assert len(found) == problems
    assert all(f"{given.memory[0].total_bytes:,}" in line and "rank 3" in line for line in found)
