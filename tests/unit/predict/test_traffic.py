"""What a rank of the busiest stage sends, by hand."""

from __future__ import annotations

import pytest

from plt_megatron.predict.run_estimate import estimate_run
from tests.unit.predict.test_run_estimate import run

STEP = 32  # microbatches
WHOLE = 256 * 512 * 2  # one microbatch's hidden states in bf16: what an all-reduce on two ranks sends
LAYER = 2 * 4 * WHOLE  # two all-reduces each way in each of two loops
ENDS = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}


def sent(what: str, stages: int, training: dict | None = None, parallel: dict | None = None, **model) -> float:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": stages, **(parallel or {})}
    return estimate_run(run(model, training, **sizes)).communication.get(what, 0.0)


@pytest.mark.parametrize("training", [None, {"loop_loss_weights": [0.5]}])
def test_the_busiest_stage_has_no_end_that_is_another_ones(training):
    """Stages of 1, 2, 2 and 1 layers; those between the ends have the most."""
    assert sent("tensor parallel", 4, training, ENDS, num_layers=6) == STEP * 2 * LAYER


def test_an_end_counts_where_it_makes_its_stage_the_busiest():
    even, uneven = (
        sent("tensor parallel", 2, None, parallel, num_layers=4)
        for parallel in ({}, {"num_layers_in_first_pipeline_stage": 1})
    )
    assert even == STEP * (2 * LAYER + 2 * WHOLE)  # the embedding in each loop, or the output layer
    assert STEP * 3 * LAYER < uneven <= STEP * (3 * LAYER + 2 * WHOLE + 3 * 256 * 4)


def test_matrix_updates_are_those_of_the_stage_with_the_most_matrices():
    """The first stage has the most parameters, the second one more matrices."""
    muon = run({"num_layers": 6}, None, tensor_model_parallel_size=2, pipeline_model_parallel_size=4, **ENDS)
    muon.optimizer.name = "muon"
    twice = estimate_run(muon).communication["matrix updates"]
    even = run({"num_layers": 8}, None, tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    even.optimizer.name = "muon"
    assert twice == estimate_run(even).communication["matrix updates"] > 0


def test_norms_over_all_heads_reduce_a_number_per_token():
    plain, normed = (
        sent("tensor parallel", 1, num_layers=4, norm_placement="post", qk_layernorm=norms) for norms in (False, True)
    )
    assert normed - plain == STEP * 4 * 2 * 4 * 256 * 4  # layers, loops, Q and K each way, tokens, bytes
