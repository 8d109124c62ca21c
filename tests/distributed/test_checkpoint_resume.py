"""A run that was saved and loaded continues as if it had never stopped: bit for bit in the layout that saved it."""

from __future__ import annotations

import pytest

from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.cases import SPAN, Layout

SCALED_SPAN = {**SPAN, **jobs.SCALES}
CASES = {  # layout, precision in `make test` (None: not there), changes; `make test-all` runs both
    "1 process": ("TP1", "bf16", {"gate_input": "hidden", "qk_layernorm": True, "norm_placement": "pre_ffn_output"}),
    "TP2+SP untied": ("TP2 SP", "bf16", {"share_embeddings_and_output_weights": False}),
    "PP2": ("PP2", None, {}),
    "DP2": ("DP2", "bf16", {}),
    "DP2 SGD": ("DP2", None, {"optimizer": "sgd"}),
    "DP2 Muon": ("DP2", None, {"optimizer": "muon"}),
    "CP2": ("CP2", None, {}),
    "DP2 experts": ("DP2 EP2", "fp32", jobs.EXPERTS),
    "DP2 layers that run once": ("DP2", "bf16", {**SCALED_SPAN, "gate_input": "hidden"}),
    "TP2 layers that run once": ("TP2 SP", None, SCALED_SPAN),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[] if precision == quick else pytest.mark.slow, id=f"{name} {precision}")
        for name, (_, quick, _) in CASES.items()
        for precision in ("fp32", "bf16")
    ],
)
def test_resume_is_bit_for_bit(run_distributed, tmp_path, name, precision):
    words, _, changes = CASES[name]
    layout = {**Layout.of(words).settings, "overlap_grad_reduce": words.startswith(("DP", "CP"))}
    job = (jobs.resume_bit_for_bit, Layout.of(words).world_size, tmp_path, layout, (precision,))
    ranks = run_distributed(*job, all_ranks=True, **changes)
    for outcomes in ranks:
        for whole, whole_digest, resumed, resumed_digest, before in outcomes:
            assert len(whole) == 3 and before[0] != whole[0]
            assert resumed == whole
            assert resumed_digest == whole_digest
