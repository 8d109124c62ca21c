"""Submitting from a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plt_megatron.errors import UserError
from plt_megatron.slurm.submission import Options, Submission, submit

ROOT = Path(__file__).resolve().parents[3]


def submit_run(*overrides: str, root: Path = ROOT, **options: Any) -> Submission:
    """`plt-submit run.yaml OVERRIDES`, an hour on one node unless `options` say otherwise."""
    config = None if {"array", "branch_from"} & set(options) else "run.yaml"
    defaults: dict[str, Any] = {"config": config, "time": "01:00:00"}
    submission = submit(Options(overrides=list(overrides), **(defaults | options)), root)
    assert submission is not None
    return submission


def refusal(*overrides: str, **options: Any) -> list[str]:
    """The lines a submission is refused with."""
    with pytest.raises(UserError) as caught:
        submit_run(*overrides, **options)
    return str(caught.value).splitlines()
