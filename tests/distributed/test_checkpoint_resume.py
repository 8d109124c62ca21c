"""A run that was saved and loaded continues as if it had never stopped: bit for bit in the layout that saved it."""

from __future__ import annotations

import pytest

from tests.distributed import checkpoint_jobs as jobs

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}


CASES = {  # layout, world size, precision in `make test` (None: not there), changes; `make test-all` runs both
    "1 process": ({}, 1, "bf16", {"gate_input": "hidden", "qk_layernorm": True, "norm_placement": "pre_ffn_output"}),
    "TP2+SP untied": (TP, 2, "bf16", {"share_embeddings_and_output_weights": False}),
    "PP2": (PP, 2, None, {}),
    "DP2": ({"overlap_grad_reduce": True}, 2, "bf16", {}),
    "DP2 SGD": ({"overlap_grad_reduce": True}, 2, None, {"optimizer": "sgd"}),
    "DP2 Muon": ({"overlap_grad_reduce": True}, 2, None, {"optimizer": "muon"}),
    "CP2": ({"context_parallel_size": 2, "overlap_grad_reduce": True}, 2, None, {}),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[] if precision == case[2] else pytest.mark.slow, id=f"{name} {precision}")
        for name, case in CASES.items()
        for precision in ("fp32", "bf16")
    ],
)
def test_resume_is_bit_for_bit(run_distributed, tmp_path, name, precision):
    layout, world_size, _, changes = CASES[name]
    ranks = run_distributed(
        jobs.resume_bit_for_bit, world_size, tmp_path, layout, (precision,), all_ranks=True, **changes
    )
    for outcomes in ranks:
        for whole, whole_digest, resumed, resumed_digest, before in outcomes:
            assert len(whole) == 3 and before[0] != whole[0]
            assert resumed == whole
            assert resumed_digest == whole_digest
