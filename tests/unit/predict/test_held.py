"""Where hidden matrices are updated, on paper and in megatron-core."""

from __future__ import annotations

import random

import pytest

from plt_megatron.config.loader import load_config
from plt_megatron.predict.held import RankMatrix, given_out, stages_of
from plt_megatron.predict.layout import estimate_layout
from plt_megatron.predict.memory import checkpoint_bytes, persistent_bytes, saving_bytes
from plt_megatron.predict.parameters import Weights, count_parameters
from plt_megatron.predict.step import Step

MUON = ["optimizer.name=muon", "model.vocab_size=1000"]


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("bucket", [None, 5000])
def test_matrices_are_given_out_as_megatron_core_does(ranks, bucket):
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    draw = random.Random(ranks)
    sizes = [draw.randint(1, 60) * draw.choice((10, 64)) for _ in range(40)]
    layout = LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(
        [torch.nn.Parameter(torch.empty(size)) for size in sizes], bucket, ranks, DistributedDataParallelConfig()
    )
    ours, padded = given_out([RankMatrix(size, False, ()) for size in sizes], ranks, bucket)
    assert ranks * padded == layout.bucket_indices[-1][1]
    theirs = [0] * ranks
    for parameter, (start, _, number) in layout.param_index_map.items():
        begin, end = layout.bucket_indices[number]
        theirs[(start - begin) * ranks // (end - begin)] += parameter.numel()
    assert [sum(matrix.size for matrix in rank) for rank in ours] == theirs


def test_a_rank_holds_what_the_fullest_one_does():
    """Of a dense model on 4 ranks: momentum for matrices, two moments for all else, and buffers with padding."""
    config = load_config("configs/runs/plt2_1b.yaml", [*MUON, "parallel.overlap_grad_reduce=false"])
    layout = estimate_layout(config, 4)
    (stage,) = stages_of(config, layout, 1000)
    dense, most = stage.dense, stage.dense.most
    assert dense.in_matrices == _in_matrices(config.model) and dense.in_matrices <= 4 * most
    held = persistent_bytes(dense, config, layout)
    assert dense.divided + dense.in_matrices == dense.size and dense.part == dense.divided // 4
    assert held["optimizer state"] == 8 * dense.part + 4 * most
    assert held["main weights"] == 4 * (dense.part + most)
    padding = 4 * dense.padded - dense.in_matrices
    assert held["gradients"] == 4 * (dense.size + padding) and 0 <= padding < 0.02 * dense.size


@pytest.mark.parametrize(("tensor", "expert", "together"), [(1, 1, True), (1, 2, False), (2, 1, False)])
def test_experts_that_are_divided_among_no_ranks_share_the_buffers_of_the_others(tensor, expert, together):
    """As megatron-core marks the parameters of its layers."""
    sizes = [f"parallel.tensor_model_parallel_size={tensor}", f"parallel.expert_model_parallel_size={expert}"]
    moe = ["model.moe.num_experts=2", "model.moe.first_k_dense_replace=3", "model.num_layers=4"]
    config = load_config("configs/runs/plt2_tiny.yaml", [*MUON, *moe, *sizes, "parallel.sequence_parallel=true"])
    (stage,) = stages_of(config, estimate_layout(config, 4), 1000)
    assert (stage.experts.size == 0) is together
    assert stage.dense.size + stage.experts.size == stage.parameters.total
    of_experts = [matrix for rank in stage.experts.matrices for matrix in rank]
    assert len(of_experts) == (0 if together else 2 * 2 // expert)
    assert sum(map(len, stage.dense.matrices)) == 4 * 2 + 3 * 2 + 1 + (4 if together else 0)


def test_a_checkpoint_has_one_moment_of_a_matrix():
    config = load_config("configs/runs/plt2_1b.yaml", MUON)
    total, matrices = count_parameters(config.model, 1000).total, _in_matrices(config.model)
    assert checkpoint_bytes(config, 1000) == 14 * total - 4 * matrices
    assert 0.9 * total < matrices < total


def test_an_iteration_works_on_the_short_side():
    """X X^T, its square, and their product with X."""
    for shape in ((2, 3), (3, 2)):
        assert RankMatrix(6, False, (shape,)).flops == 2 * 2 * 2 * 3 + 2 * 2 * 2 * 2 + 2 * 2 * 2 * 3


def _in_matrices(model):
    return sum(number for parameter, number in Weights(model).elements() if parameter.is_hidden_matrix)


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_ranks_with_few_matrices_write_most_weights(optimizer):
    """Of two layers on 6 ranks: state stays where it is, and each weight goes to the rank with the least to write."""
    config = load_config("configs/runs/plt2_1b.yaml", [f"optimizer.name={optimizer}", "model.num_layers=2"])
    layout = estimate_layout(config, 6)
    (stage,) = stages_of(config, layout, 8192)
    dense, table = stage.dense, 2 * stage.parameters.embedding
    assert optimizer == "adam" or len({sum(matrix.size for matrix in rank) for rank in dense.matrices}) > 1
    shares = dense.matrices * (6 // len(dense.matrices))
    load = [12 * dense.part + 8 * sum(matrix.size for matrix in rank) for rank in shares]
    small = (2 * dense.size - table) // 1000
    for weights in [table, *[small] * 1000]:
        load[load.index(min(load))] += weights
    assert saving_bytes(Step.of(config, layout, 8192)) == pytest.approx(max(load), rel=0.01)
