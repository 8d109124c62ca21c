"""A cluster's facts, from one YAML file: configs/clusters/NAME.yaml, or any path."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from plt_megatron.errors import UserError
from plt_megatron.estimate.gpu_specs import card_names
from plt_megatron.launcher.job import read_dataclass

CLUSTERS = Path("configs") / "clusters"
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Container:
    """An image the launcher and the ranks run in."""

    runtime: Literal["pyxis", "apptainer"]
    image: str  # pyxis: a .sqsh file or registry#image; apptainer: a .sif file
    mounts: list[str] = field(default_factory=list)  # folders, seen under the same path; or HERE:THERE
    options: list[str] = field(default_factory=list)  # further options of srun (pyxis) or apptainer exec


@dataclass(frozen=True)
class ClusterProfile:
    """What one writes down once about a cluster. Options of launch/submit.py win over it."""

    name: str = ""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None  # 0: a CPU cluster; None: ask Slurm
    processes_per_node: int | None = None  # CPU clusters only: with GPUs there is one process each
    cpus_per_process: int | None = None  # None: a fair share of the node's
    memory_per_node: str | None = None  # sbatch's --mem, as in 64G; "0": all of the node's
    gpu: str | None = None  # the card, as estimate/ knows it (h100); None: Slurm's name for it, else h100
    tflops_per_process: float | None = None  # CPU clusters: a process's matrix product rate, for estimated times
    default_time: str | None = None
    setup: list[str] = field(default_factory=list)  # shell lines before the modules, as they are
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # NCCL_SOCKET_IFNAME and the like; $NAMES are expanded
    scratch: str | None = None  # each node's own fast folder; TMPDIR of the job
    container: Container | None = None
    python: str | None = None  # None: the one that submits; in a container python3
    sbatch_options: list[str] = field(default_factory=list)  # further ones, as in --exclusive
    signal_margin_seconds: int = 300
    max_restarts: int = 1
    max_exclusions: int = 2
    max_requeues_without_progress: int = 1


def load_profile(name: str, root: Path) -> ClusterProfile:
    """Read a profile.

    Args:
        name: of a file in `root`/configs/clusters, or a path.
        root: of the checkout.

    Raises:
        UserError: there is none, or it does not fit; one line.
    """
    path = Path(name)
    if not name.endswith((".yaml", ".yml")) and os.sep not in name:
        path = root / CLUSTERS / f"{name}.yaml"
        if not path.is_file():
            known = sorted(found.stem for found in (root / CLUSTERS).glob("*.yaml"))
            raise UserError(f"--cluster {name}: no {CLUSTERS / path.name}; there are: {', '.join(known) or 'none'}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--cluster: cannot read {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    profile = read_dataclass(ClusterProfile, values, str(path))
    _check(profile, str(path))
    return dataclasses.replace(profile, name=profile.name or path.stem)


def _check(profile: ClusterProfile, where: str) -> None:
    for key in ("processes_per_node", "cpus_per_process", "tflops_per_process", "signal_margin_seconds"):
        value = getattr(profile, key)
        if value is not None and value <= 0:
            raise UserError(f"{where}: {key} must be above 0, got {value}")
    for key in ("gpus_per_node", "max_restarts", "max_exclusions", "max_requeues_without_progress"):
        value = getattr(profile, key)
        if value is not None and value < 0:
            raise UserError(f"{where}: {key} must not be negative, got {value}")
    if profile.processes_per_node and profile.gpus_per_node:
        raise UserError(f"{where}: processes_per_node is for CPU clusters; with GPUs there is one process each")
    if profile.gpu is not None and profile.gpu not in card_names():
        raise UserError(f"{where}: gpu: no card {profile.gpu} in the table; known: {', '.join(card_names())}")
    for name in profile.environment:
        if not _VARIABLE_NAME.fullmatch(name):
            raise UserError(f"{where}: environment: {name!r} is no name for a variable")
    for option in profile.sbatch_options:
        if not option.startswith("-"):
            raise UserError(f"{where}: sbatch_options: {option!r} is no option, as in --exclusive")
    for mount in profile.container.mounts if profile.container else []:
        if not mount.startswith(("/", "$")) or "," in mount:
            raise UserError(f"{where}: container.mounts: {mount!r} must be an absolute path without commas")
