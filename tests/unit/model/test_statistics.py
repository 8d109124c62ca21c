"""Statistics of loops and experts in models of which some layers run once."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import checkpoint_jobs as jobs
from tests.unit.model.tiny_models import build, draw

pytestmark = pytest.mark.usefixtures("one_process")


def test_a_loop_without_experts_has_no_statistics_of_them():
    from plt_megatron.train.callbacks.train_log import _empty

    experts = {
        "moe.num_experts": 4,
        "moe.ffn_hidden_size": 12,
        "moe.z_loss_coeff": 1e-3,
        "moe.first_k_dense_replace": 1,
    }
    engine, batches = jobs.build(jobs.run_config(num_layers=2, loop_span=[0, 1], **experts)), jobs.batches_of(1)
    batches[0].statistics = _empty(engine.config.model, 2)
    engine.train_step(batches)
    record = batches[0].statistics.reduce()
    assert all(norm > 0 for norm in record["hidden_norm"])
    assert record["expert_overlap"] == [None, None]
    for name in ("expert_load", "expert_load_max", "dropped_tokens", "dropped_share", "aux_loss", "z_loss"):
        assert record[name][0] is not None and record[name][1] is None, name


@pytest.mark.parametrize(("span", "norms"), [([0, 1], 3), ([0, 2], 3)], ids=["coda", "no coda"])
def test_the_last_loop_is_normed_where_something_reads_it(span, norms):
    """Of three loops; with a coda it is the coda's output that the head reads normed."""
    from plt_megatron.model.loop_context import LoopStatistics
    from plt_megatron.model.looped_gpt import MicroBatch

    stage, calls, tokens = build({"loop_norm": "final", "loop_count": 3, "loop_span": span}), [], draw()["tokens"]
    stage.final_layernorm.register_forward_hook(lambda *call: calls.append(call))
    without = stage(MicroBatch(tokens))
    assert len(calls) == norms
    statistics = LoopStatistics(3, 2, tokens.device)
    assert stage(MicroBatch(tokens, statistics=statistics)).equal(without)
    assert all(norm == pytest.approx(4, rel=0.5) for norm in statistics.reduce()["hidden_norm"]), "of 16 channels"


def test_a_loop_that_moves_nothing_has_a_step_of_zero_and_only_an_unknown_step_is_none():
    from plt_megatron.model.loop_context import LoopStatistics

    first, second = torch.zeros(3, 2, 4), torch.ones(3, 2, 4)
    for seen, expected in (((first, second, second), [2, 0]), ((None, second, second), [None, 0])):
        statistics = LoopStatistics(2, 1, torch.device("cpu"))
        for loop, hidden_states in enumerate(seen):
            if hidden_states is not None:
                statistics.add_hidden(loop, hidden_states)
        record = statistics.reduce()
        assert (record["step_size"], record["hidden_norm"]) == (expected, [2, 2])


def test_the_load_of_an_expert_is_relative_to_an_even_one_however_few_tokens_there_are():
    from plt_megatron.model.loop_context import ExpertStatistics

    statistics, chosen = ExpertStatistics(1, 1, 8, torch.device("cpu")), torch.zeros(4, 8, dtype=torch.bool)
    chosen[:, 3] = True
    statistics.add_routing(1, 1, chosen, chosen)
    assert statistics.reduce()["expert_load"] == [[8, 0, 0, 0, 0, 0, 0, 0]]
