"""Whole runs of a mixture of experts: what their metrics say of the experts, and that no layout changes it."""

from __future__ import annotations

import pytest

from tests.distributed.params import slow
from tests.distributed.training_jobs import run_config, train
from tests.distributed.whole_runs import folder, numbers

EXPERTS = {
    "moe.num_experts": 4,
    "moe.ffn_hidden_size": 24,
    "moe.z_loss_coeff": 1e-3,
    "moe.first_k_dense_replace": 1,  # of two layers
    "moe.router_score_function": "sigmoid",
}
SHORT = {"train_iters": 3, "micro_batch_size": 4}
# One microbatch a step in each: the one that is logged is the same.
LAYOUTS = {
    "EP2": (2, {"expert_model_parallel_size": 2}, {**SHORT}),
    "TP2 EP2, full recomputation": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "recompute_granularity": "full",
        },
        {**SHORT, "micro_batch_size": 8},
    ),
}
FIELDS = (
    "loss",
    "grad_norm",
    "aux_loss",
    "z_loss",
    "expert_load",
    "expert_load_max",
    "expert_overlap",
    "dropped_tokens",
)


def records(run_distributed, world_size: int, config) -> list[dict]:
    assert run_distributed(train, world_size, config) is True
    return numbers(config, "train")


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory, run_distributed) -> list[dict]:
    runs = tmp_path_factory.mktemp("one")
    config = run_config("one", runs, data, model=EXPERTS, training={**SHORT, "micro_batch_size": 8})
    return records(run_distributed, 1, config)


def test_each_loop_is_told_apart(one_process):
    for record in one_process:
        assert record["expert_overlap"][0] is None and 0 < record["expert_overlap"][1] < 1
        assert [len(loads) for loads in record["expert_load"]] == [4, 4]
        for loads, busiest in zip(record["expert_load"], record["expert_load_max"], strict=True):
            assert loads == sorted(loads, reverse=True) and sum(loads) == pytest.approx(4, abs=1e-3)
            assert 1 < busiest <= 2, "two of four experts are chosen: E / k at most"
            assert loads[0] == pytest.approx(busiest, abs=1e-4)
        assert all(1 <= loss < 2 for loss in record["aux_loss"]) and record["aux_loss"][0] != record["aux_loss"][1]
        assert all(loss > 0 for loss in record["z_loss"])
        assert record["dropped_tokens"] == [0, 0] and record["dropped_share"] == [0.0, 0.0]


@pytest.mark.parametrize("name", [slow("EP2"), "TP2 EP2, full recomputation"])
def test_no_layout_changes_what_is_reported(one_process, data, tmp_path, run_distributed, name):
    world_size, parallel, training = LAYOUTS[name]
    config = run_config(name, tmp_path, data, model=EXPERTS, parallel=parallel, training=training)
    for record, expected in zip(records(run_distributed, world_size, config), one_process, strict=True):
        for field in FIELDS:
            assert flat(record[field]) == pytest.approx(flat(expected[field]), rel=1e-4), field


def flat(value) -> list[float]:
    if isinstance(value, list):
        return [number for part in value for number in flat(part)]
    return [0.0 if value is None else value]


@pytest.mark.usefixtures("warm_starts")
def test_a_run_that_shares_out_experts_exports(data, tmp_path, run_distributed):
    """The training model's logits, by the exported model."""
    from plt_megatron.hf.exporting import ExportOptions, export

    parallel = {"expert_model_parallel_size": 2}
    config = run_config("shared", tmp_path, data, model=EXPERTS, parallel=parallel, training=SHORT)
    records(run_distributed, 2, config)
    options = ExportOptions(folder(config), tmp_path / "exported", verify=True)
    result = export(options, say=lambda line: None)
    assert result.difference is not None and result.difference < 1e-4


def test_a_run_goes_on_where_half_of_the_ranks_hold_an_expert(data, tmp_path, run_distributed):
    """Reading its checkpoint, the others take part in sending what they do not keep."""
    parallel = {"data_parallel_size": 4, "expert_model_parallel_size": 2}
    training = {"train_iters": 3, "micro_batch_size": 2}
    settings = {"model": EXPERTS, "parallel": parallel, "training": training}
    whole = run_config("whole", tmp_path, data, **settings, checkpoint={"save_interval": 2})
    expected = records(run_distributed, 4, whole)
    load = str(folder(whole) / "checkpoints" / "step_00000002")
    branch = run_config("branch", tmp_path, data, **settings, checkpoint={"load": load})
    (record,) = records(run_distributed, 4, branch)
    assert [record[name] for name in FIELDS] == [expected[-1][name] for name in FIELDS]


def test_what_exceeds_the_capacity_is_dropped_and_counted(data, tmp_path, run_distributed):
    """In one layer, where the loads say what has to go: all that is above an even load."""
    model = {**EXPERTS, "num_layers": 1, "moe.first_k_dense_replace": 0, "moe.expert_capacity_factor": 1.0}
    config = run_config("dropping", tmp_path, data, model=model, training={**SHORT, "micro_batch_size": 8})
    sent = 2 * 8 * 32  # experts a token, sequences, tokens
    for record in records(run_distributed, 1, config):
        fields = (record[name] for name in ("dropped_tokens", "dropped_share", "expert_load"))
        for count, share, loads in zip(*fields, strict=True):
            assert count > 0 and share == pytest.approx(count / sent)
            assert share == pytest.approx(sum(max(load - 1, 0) for load in loads) / 4, abs=1e-3)
