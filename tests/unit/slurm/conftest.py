"""What the tests of submitting share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from fake_slurm import RUN, FakeSlurm, write_tokens

from plt_megatron.slurm import snapshot


@pytest.fixture
def whole_code() -> None:
    """For tests of the snapshot itself."""


@pytest.fixture(autouse=True)
def little_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the files go into snapshots: a hundred submissions would leave 40,000."""
    if "whole_code" not in request.fixturenames:
        parts = ("plt_megatron/slurm", "plt_megatron/launcher", "launch", "pyproject.toml")
        monkeypatch.setattr(snapshot, "_CHECKOUT", parts)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("FAKE_SLURM", str(fake.folder))
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    return fake


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: run.yaml and its data."""
    path = tmp_path / "work"
    write_tokens(path / "data" / "corpus")
    (path / "run.yaml").write_text(yaml.safe_dump(RUN))
    monkeypatch.chdir(path)
    monkeypatch.setenv("PWD", str(path))
    return path
