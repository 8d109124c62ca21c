"""Which settings of losses on earlier loops a checkpoint is resumed with unasked."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError
from plt_megatron.run_folder import resuming

NAME = "training.loop_loss_weights"


def run(weights: list[float], loops: int) -> RunConfig:
    config = RunConfig()
    config.training.train_iters, config.training.loop_loss_weights, config.model.loop_count = 10, weights, loops
    return config


@pytest.mark.parametrize("earlier_version", [False, True])
@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        (([0.5], 1), ([0.5], 2), None),
        (([0.5], 2), ([0.5], 1), None),
        (([0.5], 2), ([0.5], 3), None),
        (([0.5, 0.25], 3), ([0.5, 0.25], 4), None),
        (([0.5, 0.5], 3), ([0.5], 3), None),
        (([0.5], 3), ([0.5, 0.5], 3), None),
        (([0.5], 3), ([0.25], 3), "[0.5] (now [0.25]);"),
        (([0.5], 2), ([], 2), "[0.5] (now []);"),
        (([0.5], 2), ([0.5, 0.25], 3), "[0.5] (now [0.5, 0.25]);"),
    ],
)
def test_what_was_set_is_compared_and_what_it_stands_for(before, now, refused, earlier_version):
    saved, own = run(*before), run(*now)
    schedule = resuming.schedule(saved, 1)
    if earlier_version:  # which wrote down a weight for each loop
        schedule[NAME] = derived.loop_loss_weights(saved, saved.model.loop_count)
    progress: dict[str, Any] = {
        "schedule": schedule,
        "config": dataclasses.asdict(saved),
        "schedule_step_tokens": 1,
        "step": 5,
        "consumed_tokens": 5,
    }
    with nullcontext() if refused is None else pytest.raises(UserError) as error:
        resuming.check_schedule(Path("checkpoint"), json.loads(json.dumps(progress)), own, allow_other=False)
    assert refused is None or f"was trained with {NAME} {refused}" in str(error.value)
