"""Saving holds and loading reads a rank's share, not the model."""

from __future__ import annotations

import pytest

from plt_megatron.predict.layout import estimate_layout
from plt_megatron.predict.memory import saving_bytes
from plt_megatron.predict.step import Step
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.saving_jobs import save_and_load

LARGER = {"hidden_size": 128, "ffn_hidden_size": 352}  # 0.76M parameters: small things weigh little


@pytest.mark.parametrize("ranks", [2, 4])
def test_saving_holds_and_loading_reads_a_rank_s_share(run_distributed, tmp_path, ranks):
    """bf16: 14 bytes of a parameter are saved, its main weights and moments by the rank that has them."""
    config = jobs.run_config({"data_parallel_size": ranks}, "bf16", **LARGER)
    estimated = saving_bytes(Step.of(config, estimate_layout(config, on_cpu=True), jobs.VOCAB))
    seen = run_distributed(save_and_load, ranks, tmp_path, config, True, all_ranks=True)
    for rank in seen:
        assert rank.parameters * 14 / ranks == pytest.approx(estimated, rel=0.01)
        assert rank.written == pytest.approx(estimated, rel=0.03)
        assert rank.saving == pytest.approx(estimated, rel=0.03), "what is written is copied, and nothing else is held"
        assert rank.loading < 2.5 * rank.parameters, "the optimizer's state is read into place"
        assert rank.read < 1.1 * estimated, "read once by one rank"
