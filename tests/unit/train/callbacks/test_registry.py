"""Which callbacks a rank of a run has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from plt_megatron.config.schema import ExportsConfig, LoopStage, StragglerConfig, UploadsConfig
from plt_megatron.train.callbacks.registry import CALLBACKS, is_needed
from tests.unit.train.callbacks.a_run import a_run


def names(run: Any) -> set[str]:
    return {callback.__name__ for callback in CALLBACKS if is_needed(callback, run)}


@pytest.mark.parametrize(
    ("section", "settings", "on_all", "on_first"),
    [
        ("checkpoint", {}, set(), set()),
        ("checkpoint", {"exports": ExportsConfig(4)}, set(), {"Exports"}),
        ("checkpoint", {"uploads": UploadsConfig("s3://bucket")}, set(), {"Uploads"}),
        ("checkpoint", {"exports": ExportsConfig(4, "s3://bucket")}, set(), {"Exports", "Uploads"}),
        ("training", {"ema_decay": 0.9}, {"WeightEMA"}, set()),
        ("training", {"loop_schedule": [LoopStage(1)]}, {"LoopLosses"}, set()),
        ("logging", {"straggler": StragglerConfig(2)}, {"Stragglers"}, set()),
        ("validation", {"iters": 2}, {"Validation"}, set()),
    ],
)
def test_a_rank_has_what_its_run_needs(tmp_path, section, settings, on_all, on_first):
    run = a_run(tmp_path)
    run.config.validation.iters, run.data = 0, SimpleNamespace(validation=object())
    for name, value in settings.items():
        setattr(getattr(run.config, section), name, value)
    always = {"Profiling", "Throughput", "Incidents", "LoopMeasures", "TrainLog"}
    assert names(run) == always | {"ProgressBar", "Metrics"} | on_all | on_first
    run.is_first_rank = False
    assert names(run) == always | on_all
    run.data.validation = None
    assert "Validation" not in names(run)
