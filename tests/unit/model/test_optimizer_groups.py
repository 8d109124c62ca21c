"""Each parameter of a stage is in one group of its optimizer, with the rates of its kind."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from plt_megatron.config.schema import (
    DecayFactors,
    ModelConfig,
    OptimizerConfig,
    RateFactors,
    RunConfig,
    TrainingConfig,
)

pytestmark = pytest.mark.usefixtures("one_process")


def _config(tied: bool = True) -> RunConfig:
    optimizer = OptimizerConfig(
        lr=1e-3,
        min_lr=1e-4,
        lr_mult=RateFactors(embedding=4.0, head=0.5),
        wd_mult=DecayFactors(embedding=3.0, head=2.0),
    )
    model = ModelConfig(share_embeddings_and_output_weights=tied)
    return RunConfig(model=model, training=TrainingConfig(train_iters=1), optimizer=optimizer)


def _last_stage() -> nn.Module:
    stage = nn.Module()
    stage.final_layernorm, stage.output_layer = nn.RMSNorm(3), nn.Linear(3, 4, bias=False)
    return stage


def _built(config: RunConfig, stage: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    from megatron.core.optimizer import _get_param_groups

    from plt_megatron.train.optimizers import group_overrides, megatron_settings

    groups = _get_param_groups([stage], megatron_settings(config), group_overrides(config))
    return [(parameter, group) for group in groups for parameter in group["params"]]


@pytest.mark.parametrize(("tied", "lr", "decay"), [(True, 4e-3, 3.0), (False, 5e-4, 2.0)])
def test_the_last_stages_matrix_is_the_embeddings_copy_or_a_head(tied, lr, decay):
    from plt_megatron.train.optimizers import check_groups

    config, stage = _config(tied), _last_stage()
    built = _built(config, stage)
    check_groups(config, stage, built)
    (group,) = [group for parameter, group in built if parameter is stage.output_layer.weight]
    assert (group["max_lr"], group["min_lr"], group["wd_mult"]) == (lr, lr / 10, decay)


def _in_another(built: list[Any]) -> list[Any]:
    (norm, of_norms), (matrix, _) = built
    return [(norm, of_norms), (matrix, of_norms)]


@pytest.mark.parametrize(
    "change",
    [
        lambda built: built[:1],
        lambda built: [*built, built[1]],
        _in_another,
        lambda built: [(parameter, {**group, "wd_mult": 7.0}) for parameter, group in built],
    ],
    ids=["none", "two", "another kind's", "another rate"],
)
def test_another_grouping_is_found(change):
    from plt_megatron.train.optimizers import check_groups

    config, stage = _config(), _last_stage()
    with pytest.raises(AssertionError):
        check_groups(config, stage, change(_built(config, stage)))


def test_a_parameter_that_is_not_in_the_models_table_is_named():
    from plt_megatron.train.optimizers import check_groups

    config, stage = _config(), _last_stage()
    stage.decoder = nn.Linear(2, 2, bias=False)
    with pytest.raises(AssertionError, match=r"decoder\.weight is in the groups \[\]"):
        check_groups(config, stage, [(each, None) for each in stage.parameters()])
