"""Inspect this machine: hardware, packages, tools. Works on a bare Python with nothing installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plt_megatron.extras import EXTRAS
from plt_megatron.installation import ROOT, is_checkout
from plt_megatron.runtime.local_processes import output_of, query_gpus, usable_cores

_IMPORT_TIMEOUT_SECONDS = 180

# Distribution -> module. These are compiled against torch or a driver, so installed does not mean that they load.
_PROBED = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine.pytorch",
    "flash-attn": "flash_attn",
    "deepspeed": "deepspeed",
}
_OPTIONAL = {module.replace("_", "-") for module in EXTRAS} | {"flash-attn", "pytest", "ruff", "mypy"}

_TORCH_PROBE = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if cuda else 0)]
print(json.dumps({
    "devices": [(p.name, (p.major, p.minor), p.total_memory) for p in properties],
    "cuda_build": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if cuda else None,
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}))
"""


@dataclass(frozen=True)
class Device:
    """A GPU; `memory` in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass
class Machine:
    """The result of `observe`. Sizes are in bytes; None: absent."""

    python: tuple[int, int, int] = (0, 0, 0)
    executable: str = ""
    packages: dict[str, str] = field(default_factory=dict)  # distribution -> version, if installed
    requirements: dict[str, str] = field(default_factory=dict)  # distribution -> version range that this project needs
    import_errors: dict[str, str] = field(default_factory=dict)  # distribution -> why it does not load
    cuda_build: str | None = None  # the CUDA version torch was built for
    cudnn: int | None = None  # as cuDNN counts: 91900 is 9.19.0
    devices: list[Device] = field(default_factory=list)
    gloo: bool = False
    nccl: bool = False
    nvidia_driver: str | None = None
    nvidia_device_files: bool = False
    compiler: str | None = None
    python_headers: bool = False
    cores: int = 1
    memory: int = 0
    disk_free: int = 0
    slurm: str | None = None


def observe() -> Machine:
    """Inspect this machine. Takes seconds, since it imports heavy packages, each in its own process."""
    requirements = _project_requirements()
    packages = {}
    for distribution in {*requirements, *_OPTIONAL}:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[distribution] = importlib.metadata.version(distribution)
    present = [distribution for distribution in _PROBED if distribution in packages]
    with ThreadPoolExecutor(min(4, usable_cores())) as pool:
        probes = dict(zip(present, pool.map(_probe_import, present), strict=True))
    torch: dict[str, Any] = json.loads(probes.get("torch", ("", ""))[0] or '{"devices": []}')
    devices = [Device(name, (major, minor), memory) for name, (major, minor), memory in torch.pop("devices")]
    return Machine(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        executable=sys.executable,
        packages=packages,
        requirements=requirements,
        import_errors={distribution: error for distribution, (_, error) in probes.items() if error},
        **torch,
        devices=devices,
        nvidia_driver=next((row[0] for row in query_gpus("driver_version")), None),
        nvidia_device_files=Path("/dev/nvidiactl").exists(),
        compiler=shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").is_file(),
        cores=usable_cores(),
        memory=_memory(),
        disk_free=shutil.disk_usage(Path.cwd()).free,
        slurm=(output_of(["sbatch", "--version"], seconds=20) or "").strip().partition("\n")[0] or None,
    )


def _project_requirements() -> dict[str, str]:
    """Return the version ranges from `pyproject.toml`, or from the installed package's metadata."""
    if is_checkout(ROOT):
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        requirements = tomllib.loads(pyproject)["project"]["dependencies"]
    else:
        requirements = importlib.metadata.requires("plt-megatron") or []
    # Requirements with markers belong to extras: our own dependencies have none.
    parts = (re.match(r"([\w.-]+)(.*)", each) for each in requirements if ";" not in each)
    return {part[1]: part[2].strip() for part in parts if part is not None}


def _probe_import(distribution: str) -> tuple[str, str]:
    """Import a package in its own process, since a broken one may crash it. Return the last line that the process
    printed, and the error ("" if there was none)."""
    # torch first: Transformer Engine finds CUDA's libraries only through torch.
    program = _TORCH_PROBE if distribution == "torch" else f"import torch, {_PROBED[distribution]}"
    command = [sys.executable, "-W", "ignore", "-c", program]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_IMPORT_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"importing it took more than {_IMPORT_TIMEOUT_SECONDS} s"
    if done.returncode < 0:
        return "", f"importing it crashed ({signal.Signals(-done.returncode).name})"
    *_, last = ["", *(done.stderr if done.returncode else done.stdout).strip().splitlines()]
    if done.returncode:
        return "", last or f"importing it exited with status {done.returncode}"
    return last, ""


def _memory() -> int:
    """Return the memory of this machine, or of the container if that is less, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:  # no cgroup, or cgroup v1
        return total
    return min(total, int(limit)) if limit.isdigit() else total
