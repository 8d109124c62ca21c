"""A run that was saved and loaded continues as if it had never stopped: bit for bit in the layout that saved it."""

from __future__ import annotations

import pytest

from tests.distributed import checkpoint_jobs as jobs

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("layout", "world_size", "changes"),
    [
        pytest.param({}, 1, {"gate_input": "hidden", "qk_layernorm": True, "ffn_output_norm": True}, id="1 process"),
        pytest.param(TP, 2, {"share_embeddings_and_output_weights": False}, id="TP2+SP untied"),
        pytest.param(PP, 2, {}, id="PP2"),
        pytest.param({"overlap_grad_reduce": True}, 2, {}, id="DP2"),
        pytest.param({"overlap_grad_reduce": True}, 2, {"optimizer": "sgd"}, id="DP2 SGD"),
        pytest.param({"context_parallel_size": 2, "overlap_grad_reduce": True}, 2, {}, id="CP2"),
    ],
)
def test_resume_is_bit_for_bit(run_distributed, tmp_path, layout, world_size, changes):
    ranks = run_distributed(
        jobs.resume_bit_for_bit, world_size, tmp_path, layout, ("fp32", "bf16"), all_ranks=True, **changes
    )
    for outcomes in ranks:
        for whole, whole_digest, resumed, resumed_digest, before in outcomes:
            assert len(whole) == 3 and before[0] != whole[0]
            assert resumed == whole
            assert resumed_digest == whole_digest
