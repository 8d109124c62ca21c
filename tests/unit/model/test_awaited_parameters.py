"""`overlap_param_gather` covers every parameter: it belongs to the module whose forward reads it first."""

from __future__ import annotations

import pytest
import torch
from test_parameter_table import MODELS
from tiny_models import BASE, build, draw

from plt_megatron.config.schema import ModelConfig
from plt_megatron.model.parameters import parameters_of
from tests.reference.awaited import early_and_unread
from tests.settings import make

pytestmark = pytest.mark.usefixtures("one_process")


# Of the models with the same parameters, the last.
DISTINCT = {
    frozenset(parameter.name for parameter in parameters_of(make(ModelConfig, {**BASE, **settings}))): name
    for name, settings in MODELS.items()
}


@pytest.mark.parametrize("name", DISTINCT.values())
def test_no_parameter_is_read_before_its_modules_forward(name):
    from plt_megatron.model.looped_gpt import MicroBatch

    stage, batch = build(MODELS[name]).train(), draw()
    early, unread = early_and_unread(stage, lambda: stage(MicroBatch(batch["tokens"], labels=batch["labels"])))
    assert not early and not unread


def test_one_that_another_module_reads_is_found():
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.ones(3))})
            self.never = torch.nn.Linear(3, 3, bias=False)
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.linear(hidden * self.norm["weight"])

    reader = Reader()
    assert early_and_unread(reader, lambda: reader(torch.ones(3))) == ({"norm.weight"}, {"never.weight"})
