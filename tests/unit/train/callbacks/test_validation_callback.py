"""Sums of validation losses, from a stand-in for the engine."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plt_megatron.train.callbacks.validation import Validation
from tests.unit.train.callbacks.a_run import a_run


def measured(folder: Path, sums: dict[str | None, tuple[float, int]]) -> dict[str, Any]:
    """What two batches of each source give whose sums of losses, and tokens that count, are these."""
    run = a_run(folder)
    run.config.validation.iters = 2
    run.data = SimpleNamespace(
        by_source=[source for source in sums if source],
        validation_batches=lambda source: (sums[source] for _ in range(2)),
        validation_bytes=lambda source: 10,
    )
    run.engine = SimpleNamespace(evaluate=lambda batch, loop_count: batch)
    return Validation(run)._measure(1)


def test_a_source_without_a_token_that_counts_has_no_loss(tmp_path):
    found = measured(tmp_path, {"text": (6.0, 3), "prompts": (0.0, 0)})
    assert found["loss"] == 2 and found["source_loss"] == {"text": 2}
    assert found["bits_per_byte"] == pytest.approx(12 / math.log(2) / 10)
    assert found["source_bits_per_byte"].keys() == {"text"}


@pytest.mark.parametrize("source", [None, "prompts"])
def test_no_token_that_counts_is_not_a_perfect_loss(tmp_path, source):
    found = measured(tmp_path, {source: (0.0, 0)})
    assert math.isnan(found.pop("loss")) and found in ({}, {"source_loss": {}})
