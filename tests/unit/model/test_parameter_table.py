"""The table of parameters, against the models that are built, megatron-core's own rules, and index arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_against_reference import CASES, EXPERTS
from tiny_models import BASE, PADDED_VOCAB_SIZE, build

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.parameters import (
    TABLE,
    Sizes,
    find,
    hidden_matrix,
    layer_of,
    only_in_loops,
    parameters_of,
    tensors_of,
)
from plt_megatron.predict.parameters import Weights
from tests.settings import make

pytestmark = pytest.mark.usefixtures("one_process")

POST = {"norm_placement": "post", "qk_layernorm": True}
MODELS = CASES | {
    "post-norm": POST,
    "post-norm, hidden gate, one loop": {**POST, "gate_input": "hidden", "loop_count": 1},
    "post-norm experts": {**POST, **EXPERTS, "moe.shared_expert_intermediate_size": 8},
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def stage(request, one_process):
    return build(request.param, random=False)


def test_it_has_what_the_built_model_has(stage):
    """Names, shapes, counts, initial constants, and the axis that megatron-core's layers say they split."""
    from plt_megatron.model.build import global_tensors

    sizes = Sizes.of(stage.plt, PADDED_VOCAB_SIZE)
    left = {(parameter.name, layer) for parameter in tensors_of(stage.plt) for layer in parameter.layers(stage.plt)}
    for name, tensor in global_tensors(stage):
        parameter = find(stage.plt, name)
        left.discard((parameter.name, layer_of(name) or 0))
        assert parameter.is_buffer != isinstance(tensor, torch.nn.Parameter)
        assert sizes.shape(parameter.dims) == tuple(tensor.shape), name
        if not parameter.per_expert:  # they are built as split over one rank
            axis = tensor.partition_dim if getattr(tensor, "tensor_model_parallel", False) else None
            assert {"rows": 0, "columns": 1, None: None}[parameter.split] == axis, name
        constant = parameter.constant(stage.plt)
        if constant is not None:
            assert torch.all(tensor == torch.tensor(constant)), name
    assert not left, "in the table, but not in the model"
    counted = sum(number for _, number in Weights(stage.plt, PADDED_VOCAB_SIZE).elements())
    assert counted == sum(parameter.numel() for parameter in stage.parameters())


def test_weight_decay_is_megatrons(stage):
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    from plt_megatron.config.schema import RunConfig
    from plt_megatron.train.optimizers import groups

    overrides = get_standard_config_overrides(OptimizerConfig())
    own = groups(RunConfig(model=stage.plt))
    for name, tensor in stage.named_parameters():
        undecayed = any(key.matches(tensor, name) and how["wd_mult"] == 0 for key, how in overrides.items())
        (group,) = [group for group in own if group.has(f"module.{name}")]
        assert group.decay == (0 if undecayed else 1), name


def test_what_only_loops_have_is_what_one_loop_lacks(stage):
    model = stage.plt
    one = {parameter.name for parameter in parameters_of(dataclasses.replace(model, loop_count=1))}
    for parameter in parameters_of(model):
        assert parameter.only_in_loops == (parameter.name not in one)
        fixed = parameter.constant(model) is not None
        assert fixed or not parameter.only_in_loops, "imports have no seed to draw from"


def test_every_name_is_one_parameters():
    """Also behind prefixes, of one expert and without a layer's number, as checkpoints' keys are. With dense layers
    before the experts, two of our norms are one of Hugging Face's."""
    for settings in MODELS.values():
        model = make(ModelConfig, {**BASE, **settings})
        mixed = model.moe is not None and model.moe.first_k_dense_replace > 0
        for parameter in tensors_of(model):
            for name in (parameter.name, *(() if mixed else parameter.hf)):
                name = name.format(layer=11, expert=3)
                for alias in (name, f"module.module.{name}", f"optimizer.state.exp_avg.{name.replace('11.', '')}"):
                    assert [other for other in tensors_of(model) if other.is_named(alias)] == [parameter], alias


def test_the_last_stages_matrix_is_the_embedding_where_they_are_tied():
    for tied, name in ((True, "embedding.word_embeddings.weight"), (False, "output_layer.weight")):
        model = ModelConfig(share_embeddings_and_output_weights=tied)
        for alias in ("output_layer.weight", "module.module.output_layer.weight"):
            assert [other.name for other in tensors_of(model) if other.is_named(alias)] == [name]


def test_experts_have_three_more_names():
    model = make(ModelConfig, {**BASE, **EXPERTS})
    expert = "decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight"
    for name in ("0.mlp.experts.local_experts.3.linear_fc2.weight", "mlp.experts.experts.linear_fc2.weight"):
        assert find(model, f"decoder.layers.{name}").name == expert
    assert find(model, "decoder.layers.0.mlp.experts.linear_fc2.weight3").name == expert


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.linear_fc3.weight", "x_output_layer.weight", ""])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(KeyError, match="not in the table"):
        find(ModelConfig(), name)
    with pytest.raises(KeyError, match="not in the table"):
        hidden_matrix(name)
    assert not only_in_loops(name)
    with pytest.raises(KeyError):
        find(ModelConfig(loop_count=1), "decoder.layers.0.self_attention.core_attention.plt_gate.bias")


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_parts_by_index(ranks):
    for parameter in TABLE:
        whole = torch.arange(16.0) if not parameter.is_matrix else torch.arange(16 * 8.0).view(16, 8)
        for rank in range(ranks):
            rows = torch.arange(16)
            if parameter.split == "rows" and parameter.form == "gate_up":  # [gate; up] on every rank
                half = 8 // ranks
                rows = torch.cat([torch.arange(half) + rank * half, torch.arange(half) + 8 + rank * half])
            elif parameter.split == "rows":
                rows = rows[rank * 16 // ranks : (rank + 1) * 16 // ranks]
            expected = whole[rows]
            if parameter.split == "columns":
                expected = whole[:, rank * 8 // ranks : (rank + 1) * 8 // ranks]
            assert torch.equal(parameter.part_of_rank(whole, rank, ranks), expected), parameter.name
