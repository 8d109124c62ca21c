"""Costs of a step besides its kernels: waits of the host, choices of kernels, copies of Q, K and V."""

from __future__ import annotations

import pytest

from tests.distributed.cases import Case, Layout
from tests.te import te_jobs as jobs

LAYERS, LOOPS, MICROBATCHES = 2, 2, 2
PER_MICROBATCH = LAYERS * (2 * LOOPS - 1)  # attentions
NONE_SHARED = {"share_kv": False, "gated_window": False}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed documents"])
def test_one_wait_few_choices_and_no_copy_that_a_kernel_does_not_need(run_te, packed):
    seen = run_te(jobs.overhead_of_a_step, 1, packed, gate_input="hidden")
    assert len(seen.waits) == 1, seen.waits
    ((place, count),) = seen.waits.items()
    assert "train/megatron_engine.py" in place and count == 1
    # Global attention and window keep their choice; the number of documents is part of what it depends on.
    assert seen.selections <= (2 * MICROBATCHES if packed else 0)
    assert len(seen.read) == MICROBATCHES * PER_MICROBATCH
    for first in range(0, len(seen.read), PER_MICROBATCH):
        calls = seen.read[first : first + PER_MICROBATCH]
        for layer in range(LAYERS):
            once, shared, window = calls[layer], *calls[LAYERS + 2 * layer : LAYERS + 2 * layer + 2]
            assert once[2:] == shared[2:], "later loops read the first loop's K and V where they lie"
            assert shared[1] == window[1] and shared[0] != window[0], "both attentions read the same Q"


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "model",
    [{}, {"gated_window": False}, {"share_values": False}, NONE_SHARED, {**NONE_SHARED, "full_attention": "last_loop"}],
    ids=["PLT", "KV sharing", "own V", "none", "last loop"],
)
@pytest.mark.parametrize(
    ("packed", "kinds"),
    [(True, ("a2a", "a2a")), (False, ("p2p", "a2a")), (False, ("a2a", "all_gather")), (False, ("all_gather", "a2a"))],
    ids=["packed", "p2p and a2a", "a2a and all_gather", "all_gather and a2a"],
)
def test_what_ranks_of_a_sequence_exchange_is_what_the_estimate_says(run_te, packed, kinds, model, recompute):
    how = dict(zip(("cp_comm_type", "window_cp_comm_type"), kinds, strict=True))
    case = Case(3, recompute, packed=packed, parallel=how, model=model)
    sent, estimated = run_te(jobs.exchanged_and_estimated, 2, Layout(cp=2), jobs.on_te(case))
    assert sent == estimated > 0
