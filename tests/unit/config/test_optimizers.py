"""The registry of optimizers agrees with the schema."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from plt_megatron.config.deepspeed_settings import DECIDED_BY, written
from plt_megatron.config.optimizers import OPTIMIZERS, settings_of_others
from plt_megatron.config.schema import OptimizerConfig, RunConfig, TrainingConfig, ZeroConfig


def test_every_name_of_the_schema_is_an_optimizer():
    assert set(typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])) == OPTIMIZERS.keys()


def test_what_one_optimizer_alone_reads_is_named_for_it():
    """Everything else in the section holds whatever the optimizer is. Muon reads Adam's too."""
    fields = {field.name for field in dataclasses.fields(OptimizerConfig)}
    for name, spec in OPTIMIZERS.items():
        own = {field for field in fields if field.startswith(f"{name}_")}
        beside = {field for field in fields if field.startswith("adam_")} if spec.megatron(OptimizerConfig()) else set()
        assert own | beside == set(spec.settings)
        assert not settings_of_others(OptimizerConfig(name=name)) & own
    assert {name for name in settings_of_others(OptimizerConfig()) if not name.startswith("muon_")} == {"sgd_momentum"}
    assert settings_of_others(OptimizerConfig(name="muon")) == {"sgd_momentum"}


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.deepspeed is not None])
def test_what_deepspeed_is_told_of_an_optimizer_cannot_be_contradicted(name):
    config = RunConfig(
        engine="deepspeed",
        zero=ZeroConfig(),
        optimizer=OptimizerConfig(name=name),
        training=TrainingConfig(train_iters=1),
    )
    told = {key for key in written(config) if key.startswith("optimizer.")} - {"optimizer.params.torch_adam"}
    assert told == {key for key in DECIDED_BY if key.startswith("optimizer.")}
