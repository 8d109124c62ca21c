"""Whole runs through the command a user types, for tests that inject faults."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from plt_megatron.config.schema import RunConfig
from plt_megatron.run_folder.checkpoints import step_of
from plt_megatron.run_folder.folder import RunFolder, save_config
from tests.settings import changed

# Fields that depend on clock and machine: identical runs differ only in these.
MACHINE_FIELDS = ("tokens_per_second", "model_tflops", "mfu", "peak_memory_bytes", "step_seconds")
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240.0  # seconds that anything here may take on a machine that does much else


def folder(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.name


def numbers(config: RunConfig, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, or those of a kind, without what a clock decides."""
    return [
        {name: value for name, value in record.items() if name not in MACHINE_FIELDS}
        for record in RunFolder(folder(config)).records()
        if kind in (None, record["kind"])
    ]


def assert_close(run: RunConfig, other: RunConfig, *fields: str, rel: float = 1e-5, kind: str | None = "train") -> None:
    """The records of one run have the other's numbers in these fields."""
    for field in fields:
        ours, theirs = ([record[field] for record in numbers(each, kind)] for each in (run, other))
        assert ours == pytest.approx(theirs, rel=rel), field


def as_after_step(config: RunConfig, step: int, name: str, output_dir: Path, **changes: dict[str, Any]) -> RunConfig:
    """A copy of a run as it was at its checkpoint of `step`, perhaps with other settings of some sections."""
    other = dataclasses.replace(config, name=name, output_dir=str(output_dir))
    for section, settings in changes.items():
        setattr(other, section, changed(getattr(config, section), settings))
    shutil.copytree(folder(config), folder(other))
    for path in (folder(other) / "checkpoints").glob("step_*"):
        if step_of(path) > step:
            shutil.rmtree(path)
    (folder(other) / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")
    return other


def last_step(config: RunConfig) -> int:
    """The step of the last record; 0 before there is one."""
    return RunFolder(folder(config)).last_step()


class LocalRun:
    """`plt train` at work, or another command that starts a configuration's ranks.

    Args:
        command: without the path of the configuration, which comes last.
        python: runs plt train if no command is given; tests/warm_python.py spares each process its imports, but has
            children that are not the launcher's, so that `pid` and `signal` find none.
    """

    def __init__(
        self,
        config: RunConfig,
        command: list[str] | None = None,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.config = config
        path = Path(config.output_dir) / f"{config.name}.yaml"
        save_config(config, path)
        command = command or [python, str(ROOT / "launch/train.py")]
        self.process = subprocess.Popen(
            [*command, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
            start_new_session=True,
        )
        self.out = self.err = ""

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds; an error if the run ends first."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, f"exit status {self.finish()}\n{self.out}{self.err}"
            assert time.monotonic() < deadline, "the run is too slow, or stuck"
            time.sleep(0.05)

    def pid(self, rank: int) -> int:
        """The process of a rank, once it is there."""
        found: list[int] = []
        self.until(lambda: bool(found.extend(_rank_processes(self.process.pid, rank)) or found))
        return found[0]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pid(rank), number)

    def finish(self) -> int:
        """Wait for the end; returns the exit status. `out` and `err` hold what was printed."""
        try:
            self.out, self.err = self.process.communicate(timeout=LIMIT)
        finally:
            self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """Kill what is left of it."""
        for pid in [*_rank_processes(self.process.pid, None)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _rank_processes(parent: int, rank: int | None) -> Iterator[int]:
    """The children of the launcher that are ranks (one rank, or all)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if any(entry.startswith(b"RANK=") and rank in (None, int(entry[5:])) for entry in environment):
                    yield int(child)
