"""The head's z-loss (`training.z_loss_coeff`): every gradient against the plain-PyTorch PLT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    LOOPCODER_V2,
    build,
    differences,
    draw,
    gradients,
    losses_and_gradients,
    plain_of,
)

pytestmark = pytest.mark.usefixtures("one_process")

COEFFICIENT = 0.05


def with_z_loss(settings: dict[str, Any], coefficient: float = COEFFICIENT) -> Any:
    from plt_megatron.model.z_loss import HeadZLoss

    stage = build(settings)
    stage.z_loss = HeadZLoss(coefficient, stage.pg_collection.tp)
    return stage


def run(stage: Any, data: dict[str, torch.Tensor], loops: int) -> dict[str, torch.Tensor]:
    """Losses and gradients of the weighted sum that a step differentiates; the weight is DeepSpeed's way."""
    return losses_and_gradients(stage, data, loops, factor=3.0)


def expected(
    stage: Any, data: dict[str, torch.Tensor], loops: int, coefficient: float, weights: tuple[float, ...] = ()
) -> tuple[dict[str, torch.Tensor], float]:
    """The same of the equations, and the sum of log(Z)^2 over the tokens that count."""
    model = plain_of(stage)
    logits = model.logits(data["tokens"], None, loops)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), data["labels"], reduction="none")
    squares = logits.exp().sum(dim=-1).log() ** 2
    total = losses + coefficient * squares
    for loop, weight in enumerate(weights, start=1):
        total = total + weight * model.losses(data["tokens"], data["labels"], None, loop)
    (3.0 * (total * data["loss_mask"]).sum()).backward()
    found = {"losses": losses.detach(), **gradients(model.weights)}
    return found, float((squares.detach() * data["loss_mask"]).sum())


@pytest.mark.parametrize("settings", [{}, LOOPCODER_V2], ids=["tied", "untied"])
def test_gradients_have_the_z_loss_and_losses_do_not(settings):
    stage, data = with_z_loss({**settings, "loop_count": 2}), draw()
    for loops in (2, 1):
        reference, squares = expected(stage, data, loops, COEFFICIENT)
        wrong = differences(run(stage, data, loops), reference)
        assert max(wrong.values()) <= 2e-5, (loops, wrong)
        assert float(stage.z_loss.take()) == pytest.approx(squares, rel=1e-6)
    control = differences(run(stage, data, 2), expected(stage, data, 2, 0.0)[0])
    assert control["losses"] <= 1e-5 and max(control.values()) > 1e-2, "the comparison sees the z-loss"


def test_evaluation_has_no_z_loss():
    stage, data = with_z_loss({"loop_count": 2}), draw()
    stage.eval()
    wrong = differences(run(stage, data, 2), expected(stage, data, 2, 0.0)[0])
    assert max(wrong.values()) <= 2e-5
    assert float(stage.z_loss.take()) == 0.0


def test_losses_on_earlier_loops_have_none():
    stage, data = with_z_loss({"loop_count": 2}), draw()
    weights = (0.5,)
    stage.loop_loss_weights = tuple(3.0 * weight for weight in weights)  # attached: not scaled with the step's sum
    reference, squares = expected(stage, data, 2, COEFFICIENT, weights)
    wrong = differences(run(stage, data, 2), reference)
    assert max(wrong.values()) <= 2e-5, wrong
    assert float(stage.z_loss.take()) == pytest.approx(squares, rel=1e-6)
