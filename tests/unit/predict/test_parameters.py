"""Parameter counts: against shapes written out by hand and the papers' figures; `test_parameter_table` has built
models."""

from __future__ import annotations

import dataclasses
import math

import pytest

from plt_megatron.config.layout import ParallelLayout
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import ModelConfig, MoeConfig
from plt_megatron.predict.held import count_rank_parameters
from plt_megatron.predict.parameters import Weights, count_parameters
from tests.running import ROOT
from tests.settings import changed


def shipped(name: str) -> ModelConfig:
    return load_config(ROOT / "configs" / "models" / f"{name}.yaml").model


def count(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def test_llama_style_layer_by_hand():
    """8 heads of 16 channels on a hidden size of 96, so that no two dimensions agree by accident."""
    model = ModelConfig(
        num_layers=3,
        hidden_size=96,
        ffn_hidden_size=200,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=1000,
        share_embeddings_and_output_weights=False,
        loop_count=1,
    )
    qkv = [(8 * 16, 96), (2 * 16, 96), (2 * 16, 96)]
    layer = [*qkv, (96, 8 * 16), (200, 96), (200, 96), (96, 200), (96,), (96,)]
    expected = 3 * count(layer) + count([(1024, 96), (96,), (1024, 96)])
    assert count_parameters(model).total == expected
    looped = dataclasses.replace(model, loop_count=3)
    assert count_parameters(looped).total == expected + 3 * count([(8, 16), (8,)])
    by_hidden = dataclasses.replace(looped, gate_input="hidden")
    assert count_parameters(by_hidden).total == expected + 3 * count([(8, 96), (8,), (96,)])
    normed = dataclasses.replace(looped, qk_layernorm=True, norm_placement="pre_ffn_output")
    assert count_parameters(normed).total == count_parameters(looped).total + 3 * count([(16,), (16,), (96,)])
    scaled = dataclasses.replace(looped, learned_hidden_scale="channel")
    assert count_parameters(scaled).total == count_parameters(looped).total + 96
    assert count_rank_parameters(Weights(scaled, 1024), ParallelLayout()).total == count_parameters(scaled).total
    assert count_parameters(dataclasses.replace(scaled, loop_count=1)).total == expected
    some = dataclasses.replace(looped, loop_span=[1, 2])
    assert count_parameters(some).total == expected + count([(8, 16), (8,)])
    half = count_rank_parameters(Weights(some, 1024), ParallelLayout(tensor=2)).layers
    assert half == (3 * count(layer[:-2]) + 136) // 2 + 3 * count(layer[-2:])
    biased = dataclasses.replace(looped, qkv_bias=True)
    biases = [(8 * 16,), (2 * 16,), (2 * 16,)]
    assert count_parameters(biased).total == count_parameters(looped).total + 3 * count(biases)


def test_the_baselines_have_no_extra_parameters():
    model = shipped("plt2_1b")
    plain = count_parameters(dataclasses.replace(model, loop_count=1))
    ungated = count_parameters(dataclasses.replace(model, gated_window=False))
    assert plain == ungated and plain.gates == 0
    looped = count_parameters(model)
    assert looped.total - plain.total == looped.gates == 16 * 32 * 65  # the paper: P and ~P


def test_vocabulary():
    model = ModelConfig(hidden_size=8, num_attention_heads=1, vocab_size=None)
    with pytest.raises(ValueError, match="vocab_size"):
        count_parameters(model)
    assert count_parameters(model, 129).embedding == 256 * 8
    assert count_parameters(model, 129, tensor_model_parallel_size=4).embedding == 512 * 8
    tied = count_parameters(model, 129)
    untied = count_parameters(dataclasses.replace(model, share_embeddings_and_output_weights=False), 129)
    assert tied.output_layer == 0 and untied.total - tied.total == 256 * 8
    assert tied.non_embedding == untied.non_embedding


@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        # "1.2B": two digits; the paper does not give the vocabulary (here 100,278).
        ("plt2_1b", 1.2e9, 0.02),
        # No figure is published for the ablation size; ours follows from reading "MLP 8192" as gate and up.
        ("plt2_ablation", 0.55e9, 0.01),
    ],
)
def test_shipped_models_have_the_papers_size(name, published, tolerance):
    assert count_parameters(shipped(name)).total == pytest.approx(published, rel=tolerance)


def test_loopcoder_by_hand():
    layer = 5120 * 5120 * 2 + 2 * 5120 * 1024 + 3 * 5120 * 27648 + 2 * 5120
    gate = 40 * 5120 + 40 + 5120
    assert count_parameters(shipped("loopcoder_7b")).total == 14 * (layer + gate) + 2 * 76800 * 5120 + 5120


def test_the_demo_model_is_small_enough_for_a_laptop():
    assert 2e6 < count_parameters(shipped("plt2_demo"), 8192, 2).total < 6e6


def test_experts_by_hand():
    model = ModelConfig(
        num_layers=3,
        hidden_size=96,
        num_attention_heads=8,
        vocab_size=1000,
        loop_count=1,
        moe=MoeConfig(8, router_topk=2, ffn_hidden_size=40, shared_expert_intermediate_size=56),
    )
    counted = count_parameters(model)
    layer = [*[(96, 96)] * 4, (8, 96), *[(40, 96)] * 3 * 8, *[(56, 96)] * 3, (96,), (96,)]
    assert counted.total == 3 * count(layer) + count([(1024, 96), (96,)])
    assert counted.total - counted.active == 3 * 6 * 3 * 40 * 96, "six of eight experts are idle"
    one = count_rank_parameters(Weights(model, 1024), ParallelLayout())
    assert one.total == counted.total and one.experts == counted.experts == 3 * 8 * 3 * 40 * 96
    shared_out = count_rank_parameters(Weights(model, 1024), ParallelLayout(tensor=2, expert=4))
    assert shared_out.experts == counted.experts // 4, "experts are shared out over ranks, and never split"
    split = 4 * 96 * 96 + 3 * 56 * 96
    assert shared_out.layers == 3 * (split // 2 + 8 * 96 + 2 * 96)


def test_dense_layers_before_the_experts_by_hand():
    """Of six layers the first two; a pipeline's first stage has them, and of three layers one with experts."""
    model = ModelConfig(
        num_layers=6,
        hidden_size=96,
        ffn_hidden_size=200,
        moe=MoeConfig(8, ffn_hidden_size=40, shared_expert_intermediate_size=56, first_k_dense_replace=2),
    )
    counted = count_parameters(model, 1000)
    assert counted.experts == 4 * 8 * 3 * 40 * 96 and counted.router == 4 * 8 * 96
    assert counted.ffn == (2 * 200 + 4 * 56) * 3 * 96
    assert counted.total - counted.active == 4 * 6 * 3 * 40 * 96
    assert counted.norms == count_parameters(changed(model, {"moe.first_k_dense_replace": 0}), 1000).norms
    first, second = (
        count_rank_parameters(Weights(model, 1024), ParallelLayout(tensor=2, pipeline=2), stage) for stage in (0, 1)
    )
    assert (first.experts, second.experts) == (8 * 3 * 40 * 96, 3 * 8 * 3 * 40 * 96)
    assert first.layers - second.layers == 2 * ((200 - 56) * 3 * 96 // 2 - 8 * 96), "and no routers"


def test_the_mixture_of_experts_has_the_papers_size():
    counted = count_parameters(shipped("plt2_moe_1b_7b"))
    assert counted.total == pytest.approx(6.9e9, rel=0.01), "7B"
    assert counted.active == pytest.approx(1.3e9, rel=0.02), "1B"
