"""The layout's sizes and groups; tests/unit/runtime/test_process_groups.py compares them with megatron-core's."""

from __future__ import annotations

import itertools

import pytest

from plt_megatron.config.layout import ParallelLayout, layout_of
from plt_megatron.config.schema import ParallelConfig, RunConfig

DIMENSIONS = ("tp", "cp", "dp", "pp")
LAYOUTS = [
    ParallelLayout(tensor, pipeline, context, data, expert)
    for tensor, pipeline, context, data in itertools.product((1, 2, 3), (1, 2, 4), (1, 2), (1, 2, 5))
    for expert in (1, 2, 4)
    if tensor * context * data % expert == 0
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_is_in_one_group_of_each_kind_with_its_coordinates(layout):
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len({tuple(place[name] for name in DIMENSIONS) for place in places}) == layout.world_size
    assert len({tuple(place[name] for name in ("ep", "edp", "pp")) for place in places}) == layout.world_size
    for names in (("tp",), ("cp",), ("dp", "cp"), ("tp", "pp"), ("ep",), ("edp",), ("ep", "pp"), DIMENSIONS):
        groups = layout.groups(*names)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        for group in groups:
            assert len({tuple(places[rank][name] for name in names) for rank in group}) == len(group)
    assert {len(group) for group in layout.groups("dp", "cp")} == {layout.shards}
    assert {len(group) for group in layout.groups("edp")} == {layout.expert_shards}
    assert {len(group) for group in layout.groups("tp", "cp", "dp")} == {layout.ranks_per_stage}
    assert {len(group) for group in layout.groups("tp", "cp", "pp")} == {layout.model_parallel_size}


def test_a_large_layout_is_no_work():
    layout = ParallelLayout(tensor=8, pipeline=8, context=2, data=8, expert=16)
    assert layout.coordinates(1023) == {"tp": 7, "cp": 1, "dp": 7, "pp": 7, "ep": 15, "edp": 7}
    assert layout.groups("pp")[0] == list(range(0, 1024, 128))


def test_dense_and_expert_dimensions_do_not_mix():
    with pytest.raises(ValueError, match="tp and ep"):
        ParallelLayout(tensor=2, expert=2).groups("tp", "ep")


def test_data_parallelism_is_what_is_left():
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2, expert_model_parallel_size=8)
    assert [ParallelLayout.of(parallel, world_size).data for world_size in (None, 4, 8, 32)] == [2, 1, 2, 8]
    parallel.data_parallel_size = 3
    assert [ParallelLayout.of(parallel, world_size).data for world_size in (None, 8)] == [3, 3]


def test_a_world_that_a_layout_does_not_fill_is_told_so():
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    assert layout.world_size_problem(8) is None
    assert layout.world_size_problem(6) == "6 processes: tensor 2 x pipeline 2 parallel needs a multiple of 4"
    assert layout.world_size_problem(4) == "tensor 2 x pipeline 2 x data 2 parallel needs 8 processes, got 4"


def test_loops_are_virtual_stages_where_there_is_a_pipeline():
    assert ParallelLayout(pipeline=2, loops=3).virtual_stages == 3
    assert ParallelLayout(pipeline=2).virtual_stages is None and ParallelLayout(loops=3).virtual_stages is None
    config = RunConfig()
    config.parallel.pipeline_model_parallel_size = 2
    assert layout_of(config).virtual_stages == config.model.loop_count == 2


def test_stages_hold_all_layers_in_order():
    layout = ParallelLayout(pipeline=4)
    assert layout.stage_layers(8) == [range(2), range(2, 4), range(4, 6), range(6, 8)]


@pytest.mark.parametrize(
    ("settings", "layers", "stages"),
    [
        ({"num_layers_in_first_pipeline_stage": 1}, 7, [1, 2, 2, 2]),
        ({"num_layers_in_last_pipeline_stage": 3}, 9, [2, 2, 2, 3]),
        ({"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}, 8, [3, 2, 2, 1]),
        (
            {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            6,
            [1, 2, 2, 1],
        ),
        (
            {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            2,
            [0, 1, 1, 0],
        ),
        ({"account_for_loss_in_pipeline_split": True}, 11, [3, 3, 3, 2]),
    ],
)
def test_uneven_stages_hold_all_layers_in_order(settings, layers, stages):
    """As megatron-core divides them."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from plt_megatron.config.schema import ModelConfig
    from plt_megatron.model.transformer_config import transformer_config

    parallel = ParallelConfig(pipeline_model_parallel_size=4, **settings)
    layout = ParallelLayout.of(parallel)
    held = layout.stage_layers(layers)
    assert [len(stage) for stage in held] == stages
    assert [layer for stage in held for layer in stage] == list(range(layers))
    assert layout.fewest_stage_layers(layers) == min(size for size in stages if size)
    config = transformer_config(ModelConfig(num_layers=layers, backend="torch"), parallel)
    assert [get_num_layers_to_build(config, pp_rank=rank) for rank in range(4)] == stages
    first = [get_transformer_layer_offset(config, pp_rank=rank) for rank in range(4)]
    assert [start for start, size in zip(first, stages, strict=True) if size] == [stage[0] for stage in held if stage]


def test_names():
    layout = ParallelLayout(tensor=2, pipeline=4, context=2, data=8, expert=4, sequence_parallel=True)
    assert str(layout) == "TP2 SP PP4 CP2 DP8 EP4" and layout.in_words() == "tensor 2 x pipeline 4 x context 2 x data 8"
    assert str(ParallelLayout()) == "TP1 PP1 DP1" and ParallelLayout().in_words() == "tensor 1 x pipeline 1 x data 1"
    parallel = ParallelConfig(**layout.sizes, sequence_parallel=True)
    assert ParallelLayout.of(parallel) == layout
