"""Cluster profiles: one YAML file per cluster, configs/clusters/NAME.yaml or any path."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_megatron.config.fields import Count, Positive, PositiveCount
from plt_megatron.config.loader import check, load
from plt_megatron.errors import UserError
from plt_megatron.installation import CONFIGS, find_config
from plt_megatron.launcher.job import JobHandling, JobSettings, JobSize, fields_of
from plt_megatron.predict.cards import card_names
from plt_megatron.slurm.client import parse_duration

CLUSTERS = Path("configs") / "clusters"
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class SbatchOptions:
    """sbatch options from a profile or from plt submit, whose options take precedence. None: Slurm's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None


@dataclass(frozen=True)
class Container:
    """Container image in which the launcher and the ranks run."""

    runtime: Literal["pyxis", "apptainer"]
    image: str  # pyxis: a .sqsh file or registry#image; apptainer: a .sif file
    mounts: list[str] = field(default_factory=list)  # folders, mounted at the same path; or HOST:CONTAINER
    options: list[str] = field(default_factory=list)  # additional options of srun (pyxis) or apptainer exec


@dataclass(frozen=True, kw_only=True)
class ClusterProfile(SbatchOptions, JobHandling):
    """Settings of a cluster; options of plt submit override them."""

    name: str = ""
    gpus_per_node: Count | None = None  # 0: a CPU cluster; None: ask Slurm
    processes_per_node: PositiveCount | None = None  # CPU clusters only; with GPUs there is one process per GPU
    cpus_per_process: PositiveCount | None = None  # None: a fair share of the node's CPUs
    memory_per_node: str | None = None  # sbatch's --mem, as in 64G; "0": all of the node's memory
    gpu: str | None = None  # the card, by its name in predict/ (h100); None: derived from Slurm's GPU type, else h100
    tflops_per_process: Positive | None = None  # CPU clusters: a process's matrix product rate, for estimated times
    default_time: str | None = None
    setup: list[str] = field(default_factory=list)  # shell lines, run verbatim before the modules are loaded
    modules: list[str] = field(default_factory=list)
    container: Container | None = None
    python: str | None = None  # None: the submitting interpreter; in a container python3
    sbatch_options: list[str] = field(default_factory=list)  # additional ones, as in --exclusive

    @property
    def interpreter(self) -> str:
        """Python interpreter of the job's processes, in the container if there is one."""
        return self.python or ("python3" if self.container else sys.executable)

    @property
    def packages_are_here(self) -> bool:
        """Whether jobs import the packages that this process does: not a container's, nor another interpreter's."""
        return self.interpreter == sys.executable

    def limit_seconds(self, given: str | None) -> int:
        """Return a job's time limit: `given` (--time), else `default_time`. Raises `UserError` if neither is valid."""
        text = given or self.default_time
        if text is None:
            raise UserError("give --time, as in --time 24:00:00 (or default_time in the cluster's profile)")
        seconds = parse_duration(text)
        if not seconds:
            source = "--time" if given else "default_time"
            raise UserError(f"{source} {text}: expected a time as in 24:00:00, 90 (minutes) or 2-12:00:00 (days-hours)")
        return seconds

    def job_settings(self, size: JobSize, name: str, seconds: int, **others: Any) -> JobSettings:
        """Return the settings of a job of this name, size and time limit; `others`: fields of `JobSettings`."""
        ours = fields_of(JobSize, size) | fields_of(JobHandling, self)
        return JobSettings(**ours, job_name=name, time_limit_seconds=seconds, python=self.interpreter, **others)


def load_profile(name: str) -> ClusterProfile:
    """Load a profile by the name of a file in configs/clusters, here or shipped with the package, or by its path.
    Raises `UserError` if it is missing or invalid, with one line per problem."""
    path = Path(name)
    if not name.endswith((".yaml", ".yml")) and os.sep not in name:
        path = find_config(CLUSTERS / f"{name}.yaml")
        if not path.is_file():
            folders = (CLUSTERS, CONFIGS / CLUSTERS.name)
            known = sorted({found.stem for folder in folders for found in folder.glob("*.yaml")})
            raise UserError(f"--cluster {name}: no {CLUSTERS / path.name}; available: {', '.join(known) or 'none'}")
    profile = load(ClusterProfile, path)
    check(profile, _problems(profile))
    return dataclasses.replace(profile, name=profile.name or path.stem)


def complete(profile: ClusterProfile, options: SbatchOptions) -> ClusterProfile:
    """Return the profile with options of the command line first, and last those of sbatch's environment."""
    names = ("partition", "account", "qos", "constraint")
    environment = {name: os.environ.get(f"SBATCH_{name.upper()}") for name in names}
    ours: dict[str, Any] = {
        name: given or getattr(profile, name) or environment.get(name)
        for name, given in fields_of(SbatchOptions, options).items()
    }
    return dataclasses.replace(profile, **ours)


def _problems(profile: ClusterProfile) -> Iterator[str]:
    yield from (f"setup: {problem}" for problem in _syntax_problems("".join(f"{line}\n" for line in profile.setup)))
    if profile.processes_per_node and profile.gpus_per_node:
        yield "processes_per_node is for CPU clusters; with GPUs there is one process per GPU"
    if profile.gpu is not None and profile.gpu not in card_names():
        yield f"gpu: no card {profile.gpu} in the table; known: {', '.join(card_names())}"
    for name in profile.environment:
        if not _VARIABLE_NAME.fullmatch(name):
            yield f"environment: {name!r} is not a valid variable name"
    if profile.scratch is not None and not profile.scratch.startswith(("/", "$")):
        yield f"scratch: {profile.scratch!r} must be an absolute path, as in $HOME/scratch"
    for option in profile.sbatch_options:
        if not option.startswith("-"):
            yield f"sbatch_options: {option!r} is not an option; write --exclusive or the like"
        if option.startswith(("-M", "--clusters")):
            yield f"sbatch_options: {option!r}: plt status would not find the jobs; export SLURM_CLUSTERS instead"
    for mount in profile.container.mounts if profile.container else []:
        if not mount.startswith(("/", "$")) or "," in mount:
            yield f"container.mounts: {mount!r} must be an absolute path without commas"


def _syntax_problems(script: str) -> list[str]:
    """Return the first syntax error that bash finds in a script, as one line: `line 2: syntax error near unexpected
    token ...`; nothing if there is no bash."""
    if not script or shutil.which("bash") is None:
        return []
    done = subprocess.run(["bash", "-n", "/dev/stdin"], input=script, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("/dev/stdin: ") for line in done.stderr.splitlines()]
    return lines[:1]  # later lines quote the error, or follow from it
