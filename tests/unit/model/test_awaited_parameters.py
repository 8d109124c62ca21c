"""`overlap_param_gather` covers every parameter: it belongs to the module whose forward reads it first."""

from __future__ import annotations

import pytest
import torch
from test_parameter_table import MODELS
from tiny_models import build, draw

from tests.reference.awaited import early_and_unread

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_no_parameter_is_read_before_its_modules_forward(settings):
    from plt_megatron.model.looped_gpt import MicroBatch

    stage, batch = build(settings).train(), draw()
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
