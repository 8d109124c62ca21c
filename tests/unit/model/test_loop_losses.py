"""Losses on every loop's output (`training.loop_loss_weights`): every gradient against the plain-PyTorch PLT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    LOOPCODER_V2,
    VANILLA_LOOP,
    build,
    differences,
    draw,
    gradients,
    losses_and_gradients,
    plain_of,
)

pytestmark = pytest.mark.usefixtures("one_process")

WEIGHTS = (0.7, 0.3)


def expected(stage: Any, data: dict[str, torch.Tensor], loops: int, weights: tuple[float, ...]) -> dict:
    plain = plain_of(stage)
    # A model of fewer loops ends where this one's earlier loop does.
    each = [plain.losses(data["tokens"], data["labels"], None, count) for count in range(1, loops + 1)]
    total = sum(weight * losses for weight, losses in zip((*weights[: loops - 1], 1.0), each, strict=True))
    (total * data["loss_mask"]).sum().backward()
    return {"losses": each[-1].detach(), **gradients(plain.weights)}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("settings", [{}, LOOPCODER_V2, VANILLA_LOOP], ids=["PLT", "LoopCoder-v2", "vanilla loop"])
def test_every_gradient_has_its_part_of_every_loss(settings, recompute):
    stage, data = build({**settings, "loop_count": 3}, recompute=recompute), draw()
    stage.loop_loss_weights = WEIGHTS
    for loops in (3, 2):
        wrong = differences(losses_and_gradients(stage, data, loops), expected(stage, data, loops, WEIGHTS))
        assert max(wrong.values()) <= 2e-5, (loops, wrong)
    control = differences(losses_and_gradients(stage, data, 3), expected(stage, data, 3, (0.7, 0.0)))
    assert control["losses"] <= 1e-5 and max(control.values()) > 1e-2, "the comparison sees a weight"


def test_evaluation_and_a_weight_of_zero_have_the_last_loss_alone():
    stage, data = build({"loop_count": 3}), draw()
    alone = losses_and_gradients(stage, data, 3)
    stage.loop_loss_weights = (0.0, 0.0)
    assert all(torch.equal(value, alone[name]) for name, value in losses_and_gradients(stage, data, 3).items())
    stage.loop_loss_weights = WEIGHTS
    stage.eval()
    assert all(torch.equal(value, alone[name]) for name, value in losses_and_gradients(stage, data, 3).items())
