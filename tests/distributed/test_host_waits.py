"""The host waits for the device once in an optimizer step: else a GPU would run dry at each wait."""

from __future__ import annotations

import pytest

from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.host_waits import waits_of_a_step

PP2 = {"pipeline_model_parallel_size": 2}
FULL = {"recompute_granularity": "full"}


@pytest.mark.parametrize(
    ("ranks", "layout", "model"),
    [(1, FULL, {"gate_input": "hidden"}), (2, PP2, {})],
    ids=["full recomputation, hidden gate", "pipeline"],
)
def test_one_wait_in_a_step_over_packed_documents(run_distributed, ranks, layout, model):
    for places in run_distributed(waits_of_a_step, ranks, jobs.run_config(layout, "bf16", **model), all_ranks=True):
        ((place, count),) = places.items()
        assert "train/megatron_engine.py" in place and count == 1
