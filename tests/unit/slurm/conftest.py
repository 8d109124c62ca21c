"""What the tests of submitting share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from fake_slurm import RUN, FakeSlurm, write_tokens
from submitting import IN_JOB, LAUNCHER, ROOT, SRUN, directives

from plt_megatron.slurm import run_files


@pytest.fixture
def whole_code() -> None:
    """For tests of the snapshot itself."""


@pytest.fixture(autouse=True)
def little_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the files go into snapshots: a hundred submissions would leave 40,000."""
    if "whole_code" not in request.fixturenames:
        parts = ("plt_megatron/slurm", "plt_megatron/launcher", "launch", "pyproject.toml")
        monkeypatch.setattr(run_files, "_CHECKOUT", parts)


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


@pytest.fixture
def checkout(tmp_path):
    """A small one, with a launcher that only notes how it was called."""
    copy = tmp_path / "checkout"
    parts = ("plt_megatron/errors.py", "plt_megatron/slurm/job.sbatch", "launch/submit.py", "tools/doctor.py")
    for part in (*parts, "pyproject.toml"):
        (copy / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, copy / part)
    (copy / LAUNCHER).parent.mkdir()
    (copy / LAUNCHER).write_text(IN_JOB.replace("VERSION", "submitted"))
    return copy


@pytest.fixture
def job(folder, slurm):
    """Starts a job script as Slurm does."""
    (slurm.bin / "srun").write_text(SRUN)
    (slurm.bin / "srun").chmod(0o755)
    started = []

    def start(script: Path, **env: str) -> subprocess.Popen[bytes]:
        chdir = directives(script)["--chdir"]
        # From a copy, as slurmd's spool has it.
        copy = slurm.folder / "slurm_script"
        shutil.copy(script, copy)
        process = subprocess.Popen(["bash", str(copy)], cwd=chdir, env=os.environ | env)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
