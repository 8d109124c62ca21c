"""Checkpoints of a mixture of experts: resumed bit for bit, and in layouts that share out the experts otherwise."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import checkpoint_jobs as jobs

EXPERTS = {
    "moe.num_experts": 4,
    "moe.ffn_hidden_size": 24,
    "moe.z_loss_coeff": 1e-3,
    "moe.router_score_function": "sigmoid",
    "moe.router_bias_update_rate": 0.02,
    "moe.first_k_dense_replace": 1,
}
EP2 = {"expert_model_parallel_size": 2}
TP2_EP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, **EP2}


@pytest.fixture(scope="module")
def one_process(run_distributed, tmp_path_factory):
    """Six steps of one process, saved after the third."""
    directory = tmp_path_factory.mktemp("one")
    return run_distributed(jobs.train_and_save, 1, directory, jobs.run_config(**EXPERTS), then=3), directory


@pytest.fixture(scope="module")
def two_processes(run_distributed, tmp_path_factory):
    """The same of two that share out the experts; gradients are reduced in several buckets."""
    directory = tmp_path_factory.mktemp("ep2")
    config = jobs.run_config({**EP2, "overlap_grad_reduce": True}, **EXPERTS)
    return run_distributed(jobs.train_and_save, 2, directory, config, then=3), directory


def test_experts_shared_out_are_gathered_with_optimizer_state(run_distributed, one_process, two_processes):
    resumed = run_distributed(jobs.load_and_train, 1, two_processes[1], jobs.run_config(**EXPERTS))
    assert_same_numbers(resumed["after"], one_process[0]["after"])
    assert_same_numbers(two_processes[0]["after"], one_process[0]["after"])


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        pytest.param(TP2_EP2, 2, id="TP2xEP2", marks=pytest.mark.slow),
        pytest.param({"pipeline_model_parallel_size": 2, **EP2}, 4, id="PP2xEP2", marks=pytest.mark.slow),
        pytest.param({"expert_model_parallel_size": 4}, 4, id="EP4", marks=pytest.mark.slow),
    ],
)
def test_experts_are_shared_out_with_optimizer_state(run_distributed, one_process, layout, world_size):
    resumed = run_distributed(jobs.load_and_train, world_size, one_process[1], jobs.run_config(layout, **EXPERTS))
    assert_same_numbers(resumed["after"], one_process[0]["after"])
    assert not any("in the checkpoint" in line for line in resumed["log"])


def test_resuming_is_exact(run_distributed, two_processes):
    config = jobs.run_config({**EP2, "overlap_grad_reduce": True}, **EXPERTS)
    resumed = run_distributed(jobs.load_and_train, 2, two_processes[1], config)
    assert resumed["after"] == two_processes[0]["after"] and resumed["digest"] == two_processes[0]["digest"]


def test_weights_are_read_expert_by_expert(one_process, two_processes):
    from plt_megatron.train.checkpoint import read_weights
    from plt_megatron.train.checkpoint.reading import Weights

    weights, others = (dict(read_weights(directory)) for _, directory in (one_process, two_processes))
    assert weights.keys() == others.keys()
    names = [name for name in weights if ".mlp.experts." in name]
    assert len(names) == 3 * 4 * 2 and "decoder.layers.0.mlp.linear_fc1.weight" in weights
    assert weights["decoder.layers.3.mlp.experts.2.linear_fc1.weight"].shape == (2 * 24, 40)
    biases = [weights[f"decoder.layers.{layer}.mlp.router.expert_bias"] for layer in range(1, 4)]
    assert all(bias.shape == (4,) and 0.01 < bias.abs().max() < 0.07 for bias in biases), "three steps of 0.02"
    main = Weights(one_process[0]["path"], "main weights")
    assert set(main.names) == weights.keys(), "biases, which no optimizer has, go with any"
    assert torch.equal(main.read("decoder.layers.1.mlp.router.expert_bias"), biases[1])
    for name in names + [name for name in weights if name.endswith("expert_bias")]:
        assert (weights[name] - others[name]).abs().max() < 1e-5 * weights[name].abs().max(), name


def assert_same_numbers(ours, expected):
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
