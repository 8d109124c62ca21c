"""What a configuration with experts may ask for, by what its refusal says."""

from __future__ import annotations

import pytest

from plt_megatron.config.layout import layout_of
from plt_megatron.config.validation import find_problems
from tests.unit.config.test_validation import change, good

EXPERTS = {"model__moe__num_experts": 8, "model__moe__ffn_hidden_size": 96}

BIASES = {"model__moe__router_score_function": "sigmoid", "model__moe__router_bias_update_rate": 1e-3}


def problems(world_size: int | None = None, **settings: object) -> list[str]:
    config = change(good(), **{**EXPERTS, **settings})
    return find_problems(config, world_size=world_size, check_files=False)


def test_good_configurations_pass():
    assert problems() == []
    assert problems(model__moe__shared_expert_intermediate_size=64, model__moe__expert_capacity_factor=1.25) == []
    assert problems(model__moe__router_load_balancing_type="none", model__moe__router_topk=8) == []
    assert problems(model__moe__router_topk=1, model__moe__router_score_function="pre_softmax") == []
    sigmoid = {"model__moe__router_score_function": "sigmoid"}
    assert problems(**sigmoid, model__moe__router_topk=1) == [], "its weight is its score"
    biases = {**sigmoid, "model__moe__router_bias_update_rate": 0.01}
    assert problems(**biases) == problems(**biases, model__moe__router_load_balancing_type="none") == []
    assert problems(parallel__expert_model_parallel_size=4, parallel__data_parallel_size=4) == []
    assert problems(4, parallel__expert_model_parallel_size=4) == []
    shared = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    assert problems(parallel__expert_model_parallel_size=2, **shared) == [], "tensor-parallel ranks share out experts"
    assert problems(parallel__expert_model_parallel_size=4, parallel__context_parallel_size=2, **shared) == []


def test_launching_takes_as_many_processes_as_share_out_the_experts():
    for tensor, expected in ((1, 4), (2, 4), (4, 4), (8, 8)):
        config = change(good(), **EXPERTS, parallel__expert_model_parallel_size=4)
        config.parallel.tensor_model_parallel_size = tensor
        assert layout_of(config).world_size == expected


def test_an_ffn_that_is_not_there_need_not_be_divisible():
    shared = {"parallel__tensor_model_parallel_size": 4, "parallel__sequence_parallel": True}
    assert problems(model__ffn_hidden_size=7, **shared) == []
    (line,) = problems(model__moe__shared_expert_intermediate_size=6, **shared)
    assert line == (
        "model.moe.shared_expert_intermediate_size 6 is not divisible by parallel.tensor_model_parallel_size 4"
    )


def test_dense_layers_are_split_beside_shared_experts():
    """Where there are some: both must be divisible; and only they are what `mlp` recomputes."""
    shared = {"parallel__tensor_model_parallel_size": 4, "parallel__sequence_parallel": True}
    dense = {**shared, "model__moe__first_k_dense_replace": 1}
    assert problems(**dense) == problems(model__moe__shared_expert_intermediate_size=64, **dense) == []
    (line,) = problems(model__ffn_hidden_size=7, **dense)
    assert line == "model.ffn_hidden_size 7 is not divisible by parallel.tensor_model_parallel_size 4"
    recomputed = {"parallel__recompute_granularity": "selective", "parallel__recompute_modules": ["core_attn", "mlp"]}
    assert problems(**recomputed, model__moe__first_k_dense_replace=1) == []
    assert "layers have no dense FFN" in problems(**recomputed)[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model__moe__num_experts": 1}, "model.moe.num_experts must be at least 2, got 1"),
        ({"model__moe__router_topk": 9}, "model.moe.router_topk 9 is more than model.moe.num_experts 8"),
        ({"model__moe__router_topk": 1}, "the router learns nothing; set model.moe.router_score_function=pre_softmax"),
        (
            {"model__moe__router_bias_update_rate": 1e-3},
            "model.moe.router_bias_update_rate needs scores that do not depend on one another; set "
            "model.moe.router_score_function=sigmoid",
        ),
        (
            {**BIASES, "model__moe__expert_capacity_factor": 1.5},
            "model.moe.router_bias_update_rate with model.moe.expert_capacity_factor 1.5: tokens that an expert",
        ),
        ({**BIASES, "model__moe__router_bias_update_rate": 0.0}, "model.moe.router_bias_update_rate must be above 0"),
        (
            {"model__moe__first_k_dense_replace": 4},
            "model.moe.first_k_dense_replace 4 leaves none of model.num_layers 4 for experts",
        ),
        ({"model__moe__aux_loss_coeff": -1.0}, "model.moe.aux_loss_coeff must be at least 0, got -1.0"),
        ({"model__moe__expert_capacity_factor": 0.0}, "model.moe.expert_capacity_factor must be above 0, got 0.0"),
        (
            {
                "parallel__expert_model_parallel_size": 3,
                "parallel__data_parallel_size": 3,
                "training__global_batch_size": 9,
            },
            "model.moe.num_experts 8 is not divisible by parallel.expert_model_parallel_size 3",
        ),
        (
            {"parallel__expert_model_parallel_size": 2, "parallel__data_parallel_size": 1},
            "(tensor 1 x context 1 x data 1), 1 is not divisible by parallel.expert_model_parallel_size 2",
        ),
        (
            {"parallel__tensor_model_parallel_size": 2},
            "model.moe with parallel.tensor_model_parallel_size 2 needs parallel.sequence_parallel=true",
        ),
        (
            {"training__fp8__format": "hybrid", "training__fp8__recipe": "delayed", "model__backend": "te"},
            "training.fp8.recipe delayed with model.moe: experts on several ranks would share their scales; set "
            "training.fp8.recipe=tensorwise",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(settings, expected):
    (line,) = problems(**settings)
    assert expected in line and "\n" not in line


def test_a_dense_model_has_nothing_to_share_out():
    (line,) = find_problems(change(good(), parallel__expert_model_parallel_size=2), check_files=False)
    assert line.startswith("parallel.expert_model_parallel_size 2 needs experts: set model.moe.num_experts, or ")
